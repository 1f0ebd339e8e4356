// The sizes that dispatch and combine of the real chips take.
#pragma once

#include "distribute.h"

namespace vllm_npu::emulator::aclnn {

// Refuses sizes of a call that the chip's kernels refuse, and a buffer of the group that is too small for them. For
// small models, VLLM_NPU_EMULATOR_LIMITS=none accepts all sizes. A chip without the ops is refused even then. `tokens`
// is the number of this rank's tokens.
void check_limits(const Placement& place, bool version_1, int64_t tokens, int64_t width, int64_t top_k);

}  // namespace vllm_npu::emulator::aclnn
