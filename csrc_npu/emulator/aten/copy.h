// Copies between the host and emulated devices.
#pragma once

#include <ATen/core/Tensor.h>

namespace vllm_npu::emulator {

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking);
at::Scalar local_scalar_dense(const at::Tensor& self);

}  // namespace vllm_npu::emulator
