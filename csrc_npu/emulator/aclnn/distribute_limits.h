// Sizes that the device's dispatch and combine take.
#pragma once

#include "distribute.h"

namespace vllm_npu::emulator::aclnn {

// Refuses sizes that the emulated chip's kernels refuse: those of the call, and a buffer of the group that is too small
// for them. VLLM_NPU_EMULATOR_LIMITS=none lets all sizes pass, for small models; a chip without the ops is refused even
// then. `tokens` are this rank's.
void check_limits(const Placement& place, bool version_1, int64_t tokens, int64_t width, int64_t top_k);

}  // namespace vllm_npu::emulator::aclnn
