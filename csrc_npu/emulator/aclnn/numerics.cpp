#include "numerics.h"

#include <cmath>

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr float kInt8Max = 127.0F;
constexpr int64_t kInt8GroupOfHalfSums = 16;

at::Tensor largest_of(const at::Tensor& rows) { return rows.abs().amax(-1, /*keepdim=*/true); }

// Rounds towards zero. A C++ conversion would round to the nearest value.
float truncated_to_half(float value) {
  c10::Half half(value);
  if (std::fabs(static_cast<float>(half)) > std::fabs(value)) half.x -= 1;
  return static_cast<float>(half);
}

}  // namespace

Quantized quantize_by_product(const at::Tensor& rows) {
  const at::Tensor largest = largest_of(rows);
  const at::Tensor factor = at::where(largest > 0, at::full_like(largest, kInt8Max) / largest, 0.0F);
  const at::Tensor values = (rows * factor).round().to(at::kHalf).to(at::kChar);
  const at::Tensor scales = at::where(largest > 0, factor.reciprocal(), 0.0F);
  return {values, scales.squeeze(-1)};
}

Quantized quantize_by_quotient(const at::Tensor& rows) {
  const at::Tensor scales = largest_of(rows) / kInt8Max;
  const at::Tensor quotients = at::where(scales > 0, rows / scales, 0.0F).contiguous();
  at::Tensor values = at::empty(rows.sizes(), at::kChar);
  const float* from = quotients.const_data_ptr<float>();
  int8_t* to = values.mutable_data_ptr<int8_t>();
  for (int64_t i = 0; i < quotients.numel(); ++i) {
    to[i] = static_cast<int8_t>(std::round(truncated_to_half(from[i])));  // half away from zero
  }
  return {values, scales.squeeze(-1)};
}

at::Tensor through_int8_groups(const at::Tensor& rows) {
  const at::Tensor groups = rows.to(at::kFloat).view({rows.size(0), rows.size(1) / kInt8Group, kInt8Group});
  const at::Tensor scales = largest_of(groups) * (1.0F / kInt8Max);
  const at::Tensor quotients = at::where(scales > 0, groups / scales, 0.0F);
  const at::Tensor values = quotients.to(at::kHalf).round().to(at::kChar);
  const at::Tensor sent_scales = scales.to(rows.scalar_type()).to(at::kFloat);
  return (values.to(at::kFloat) * sent_scales).view(rows.sizes()).to(rows.scalar_type());
}

int64_t int8_group_of_sums(at::ScalarType type) { return type == at::kHalf ? kInt8GroupOfHalfSums : kInt8Group; }

at::Tensor sums_through_int8(const at::Tensor& sums, at::ScalarType type) {
  const bool is_half = type == at::kHalf;
  const at::Tensor rounded = is_half ? sums.to(at::kHalf).to(at::kFloat) : sums;
  const int64_t group = int8_group_of_sums(type);
  const at::Tensor groups = rounded.view({sums.size(0), sums.size(1) / group, group});
  const at::Tensor scales = largest_of(groups) * (1.0F / kInt8Max);
  const at::Tensor sent_scales = scales.to(type).to(at::kFloat);
  const at::Tensor& divisor = is_half ? sent_scales : scales;
  const at::Tensor values = at::where(divisor > 0, groups / divisor, 0.0F).to(at::kHalf).round().to(at::kChar);
  const at::Tensor restored = (values.to(at::kFloat) * sent_scales).view(sums.sizes());
  return is_half ? restored.to(at::kHalf).to(at::kFloat) : restored;
}

}  // namespace vllm_npu::emulator::aclnn
