// The roundings of the device that differ from torch's, or between ops.
#pragma once

#include <ATen/ATen.h>

namespace vllm_npu::emulator::aclnn {

struct Quantized {
  at::Tensor values;  // [n, H] int8
  at::Tensor scales;  // [n] float32: a row is values * scale
};

// Rounds like dispatch with quant_mode 2: rint(x * (127 / max|x|)), with scale 1 / (127 / max|x|). A row of zeros gives
// zeros with scale 0. The kernel would compute 0 * inf for this row.
Quantized quantize_by_product(const at::Tensor& rows);  // [n, H] float32

// Rounds like init_routing with quant_mode 1. The scale is max|x| / 127. x / scale is truncated to fp16, then rounded
// half away from zero. A row of zeros gives zeros with scale 0.
Quantized quantize_by_quotient(const at::Tensor& rows);  // [n, H] float32

constexpr int64_t kInt8Group = 8;  // numbers with one scale

// Rounds like combine with comm_quant_mode 2. Quantises `rows` to int8 in groups of 8, with scales in the dtype of
// `rows`, and back.
at::Tensor through_int8_groups(const at::Tensor& rows);  // [n, H] float16 or bfloat16

// Rounds like the hierarchy's combine with comm_quant_mode 2 on A2. Quantises sums of rows of `type` to int8 and back,
// float16 in groups of 16. Before that, float16 sums are rounded to float16. bfloat16 sums stay float32.
int64_t int8_group_of_sums(at::ScalarType type);
at::Tensor sums_through_int8(const at::Tensor& sums, at::ScalarType type);  // [n, H] float32

}  // namespace vllm_npu::emulator::aclnn
