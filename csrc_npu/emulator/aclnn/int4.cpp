// Packed int4 values and packed scales.
#include "int4.h"

#include <vector>

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kKeptBits = 0xFFFFE000;  // of a float32 scale
constexpr int64_t kScaleFlag = int64_t{1} << 46;
constexpr int kOffsetShift = 37;
constexpr int64_t kOffsetMask = 0x1FF;
constexpr int64_t kOffsetSign = 0x100;

at::Tensor as_long(const at::Tensor& scale) { return scale.contiguous().view(at::kLong); }

// Returns the scales in a shape that broadcasts over [K, N].
at::Tensor for_each_weight(const at::Tensor& scale, int64_t inner, int64_t width, int64_t group_size) {
  if (scale.numel() == 1) return scale.to(at::kFloat).reshape({1, 1});
  const at::Tensor parts = scale.to(at::kFloat).reshape({-1, width});
  if (parts.size(0) == 1) return parts;
  const int64_t rows = group_size > 0 ? group_size : inner / parts.size(0);
  return at::repeat_interleave(parts, rows, 0).narrow(0, 0, inner);
}

}  // namespace

at::Tensor pack_int4(const at::Tensor& values) {
  std::vector<int64_t> sizes = values.sizes().vec();
  sizes.back() /= kInt4InInt32;
  sizes.push_back(kInt4InInt32);
  const at::Tensor nibbles = values.to(at::kLong).bitwise_and(0xF).view(sizes);
  const at::Tensor shifts = at::arange(kInt4InInt32, at::kLong) * 4;
  return nibbles.bitwise_left_shift(shifts).sum(-1).to(at::kInt);
}

bool is_transposed(const at::Tensor& matrix) {
  const int64_t rows = matrix.size(-2), columns = matrix.size(-1);
  if (rows == 1 && columns == 1) return false;
  return matrix.stride(-2) == 1 && matrix.stride(-1) == rows;
}

at::Tensor unpack_int4(const at::Tensor& packed) {
  const bool transposed = is_transposed(packed);
  const at::Tensor rows = (transposed ? packed.transpose(-1, -2) : packed).contiguous();
  const at::Tensor shifts = at::arange(kInt4InInt32, at::kInt) * 4;
  const at::Tensor nibbles = rows.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(0xF);
  const at::Tensor values = at::where(nibbles > 7, nibbles - 16, nibbles).to(at::kChar).flatten(-2);
  return transposed ? values.transpose(-1, -2) : values;
}

at::Tensor unpack_scale(const at::Tensor& scale) { return as_long(scale).to(at::kInt).view(at::kFloat); }

at::Tensor unpack_offset(const at::Tensor& scale) {
  const at::Tensor bits = as_long(scale).bitwise_right_shift(kOffsetShift).bitwise_and(kOffsetMask);
  return at::where(bits >= kOffsetSign, bits - 2 * kOffsetSign, bits).to(at::kFloat);
}

at::Tensor pack_scale(const at::Tensor& scale, const std::optional<at::Tensor>& offset) {
  const at::Tensor bits = scale.contiguous().view(at::kInt).to(at::kLong).bitwise_and(kKeptBits);
  at::Tensor packed = bits.bitwise_or(kScaleFlag);
  if (offset) {
    const at::Tensor rounded = offset->round().clamp(-256, 255).to(at::kLong).bitwise_and(kOffsetMask);
    packed = packed.bitwise_or(rounded.bitwise_left_shift(kOffsetShift));
  }
  return packed;
}

at::Tensor dequantised(const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& offset,
                       int64_t group_size, at::ScalarType type) {
  const int64_t inner = weight.size(-2), width = weight.size(-1);
  at::Tensor values = weight.to(at::kFloat);
  if (offset) values = values + for_each_weight(*offset, inner, width, group_size);
  return (values * for_each_weight(scale, inner, width, group_size)).to(type);
}

void require_weight_scale(const at::Tensor& scale, const char* name, int64_t inner, int64_t width, int64_t group_size) {
  if (scale.numel() == 1 && group_size == 0) return;
  require(scale.dim() >= 1 && scale.size(-1) == width && scale.numel() > 0, name, " has the shape ", scale.sizes(),
          " and weight ", width, " columns");
  const int64_t parts = scale.numel() / width;
  if (group_size > 0) {
    const int64_t wanted = (inner + group_size - 1) / group_size;
    require(parts == wanted, name, " has the shape ", scale.sizes(), "; with groups of ", group_size, " of the ", inner,
            " rows of weight, it must have ", wanted, " rows");
  } else {
    require(inner % parts == 0, name, " has the shape ", scale.sizes(), ", and ", inner,
            " rows of weight cannot be divided into ", parts, " equal parts");
  }
}

}  // namespace vllm_npu::emulator::aclnn
