// Masks of dropout: a bit for each value.
#pragma once

#include <ATen/ATen.h>

namespace vllm_npu::emulator::aclnn {

// The first `numel` bits of a mask, [numel] bool: true where a value is kept. The mask must have as many.
at::Tensor kept_by(const at::Tensor& mask, int64_t numel);

}  // namespace vllm_npu::emulator::aclnn
