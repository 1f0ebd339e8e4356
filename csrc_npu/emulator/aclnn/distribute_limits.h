// Sizes that the device's dispatch and combine take.
#pragma once

#include <cstdint>

namespace vllm_npu::emulator::aclnn {

struct DistributeSizes {
  bool version_1;
  int64_t world_size;
  int64_t tokens;
  int64_t width;
  int64_t moe_experts;
  int64_t experts_per_rank;
  int64_t top_k;
};

// Refuses sizes that the emulated chip's kernels refuse. VLLM_NPU_EMULATOR_LIMITS=none lets all sizes pass, for small
// models; a chip without the ops is refused even then.
void check_limits(const DistributeSizes& sizes);

}  // namespace vllm_npu::emulator::aclnn
