// The device's roundings, where they differ from torch's or from op to op.
#pragma once

#include <ATen/ATen.h>

namespace vllm_npu::emulator::aclnn {

struct Quantized {
  at::Tensor values;  // [n, H] int8
  at::Tensor scales;  // [n] float32: a row is values * scale
};

// As dispatch's quant_mode 2: rint(x * (127 / max|x|)), scale 1 / (127 / max|x|). A row of zeros, which the kernel
// makes 0 * inf, is zeros with scale 0.
Quantized quantize_by_product(const at::Tensor& rows);  // [n, H] float32

// As init_routing's quant_mode 1: scale max|x| / 127, x / scale truncated to fp16, then rounded half away from zero.
// A row of zeros is zeros with scale 0.
Quantized quantize_by_quotient(const at::Tensor& rows);  // [n, H] float32

// As combine's comm_quant_mode 2: what int8 by groups of 8, with scales in the dtype of `rows`, leaves of them.
at::Tensor through_int8_groups(const at::Tensor& rows);  // [n, H] float16 or bfloat16

}  // namespace vllm_npu::emulator::aclnn
