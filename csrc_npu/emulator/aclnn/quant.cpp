// Quantisation: dynamic, where the scales are computed from the rows, and static, where they are given.
//
// Contracts: op-plugin's document of npu_dynamic_quant; CANN's documents of aclnnAscendQuant, aclnnAscendQuantV3 and
// aclnnFlatQuant. Values are rounded half to even. The device's may differ by one unit. CANN's documents do not say in which
// precision static quantisation computes; here it is float32. Nor do they say where flat quantisation rounds; here each of its
// two products is rounded to x's type, as in op-plugin's published test.
#include "int4.h"
#include "numerics.h"
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr float kInt8Max = 127.0F;
constexpr float kInt4Max = 7.0F;
constexpr int64_t kFlatQuantMatrices = 262144;  // CANN's document
constexpr int64_t kFlatQuantSide = 256;         // the same

// Returns the smooth row of each row of x, which is that of its group. group_index has the last row + 1 of each group.
at::Tensor smooth_rows(const at::Tensor& smooth, const OptionalTensor& group_index, int64_t num_rows) {
  if (!group_index) return smooth;
  const at::Tensor ends = group_index->to(at::kLong).contiguous();
  const at::Tensor sizes = at::diff(ends, 1, -1, at::zeros({1}, at::kLong));
  require((sizes >= 0).all().item<bool>(), "group_index must not fall");
  require(ends[-1].item<int64_t>() == num_rows, "group_index ends at ", ends[-1].item<int64_t>(), " and x has ",
          num_rows, " rows");
  return at::repeat_interleave(smooth, sizes, 0);
}

Plan dynamic_quant_v2(at::Tensor x, OptionalTensor smooth, OptionalTensor group_index, int32_t /*dst_type: y's dtype*/,
                      at::Tensor y, at::Tensor scale, OptionalTensor offset) {
  refuse_on_310p("npu_dynamic_quant");
  require_dtype(x, "input", {at::kHalf, at::kBFloat16});
  require_absent(offset, "offset", "asymmetric quantisation is not emulated");
  require_dtype(y, "dst_type", {at::kChar, at::kInt});
  const bool int4 = y.scalar_type() == at::kInt;
  const int64_t width = x.size(-1);
  if (smooth) {
    require_dtype(*smooth, "smooth_scales", {x.scalar_type()});
    if (group_index) {
      require_dtype(*group_index, "group_index", {at::kInt});
      require_shape(*smooth, "smooth_scales", {group_index->size(0), width});
    } else {
      require_shape(*smooth, "smooth_scales", {width});
    }
  } else {
    require_absent(group_index, "group_index", "smooth_scales is missing");
  }
  return [=] {
    at::Tensor rows = x.reshape({-1, width}).to(at::kFloat);
    if (smooth) rows = rows * smooth_rows(smooth->to(at::kFloat), group_index, rows.size(0));
    const at::Tensor scales = rows.abs().amax(-1) / (int4 ? kInt4Max : kInt8Max);
    const at::Tensor divisor = scales.unsqueeze(-1);
    const at::Tensor values = at::where(divisor > 0, rows / divisor, 0.0F).round();
    y.copy_((int4 ? pack_int4(values) : values.to(at::kChar)).view(y.sizes()));
    scale.copy_(scales.view(scale.sizes()));
  };
}

Plan dynamic_quant(at::Tensor x, OptionalTensor smooth, at::Tensor y, at::Tensor scale) {
  return dynamic_quant_v2(x, smooth, std::nullopt, ACL_INT8, y, scale, std::nullopt);
}

// Multiplies each matrix of x [M, N1, N2] by p1 from the left and p2 from the right, and quantises it to int4 with one scale.
Plan flat_quant(at::Tensor x, at::Tensor p1, at::Tensor p2, double clip_ratio, at::Tensor y, at::Tensor scale) {
  refuse_on_310p("npu_kronecker_quant");
  require_dtype(x, "x", {at::kHalf, at::kBFloat16});
  require_dtype(p1, "kronecker_p1", {x.scalar_type()});
  require_dtype(p2, "kronecker_p2", {x.scalar_type()});
  require_dtype(y, "dst_dtype", {at::kInt});
  require_dimensions(x, "x", 3);
  require(x.numel() > 0 && x.size(0) <= kFlatQuantMatrices && x.size(1) <= kFlatQuantSide && x.size(2) <= kFlatQuantSide,
          "x has the shape ", x.sizes(), "; at most [", kFlatQuantMatrices, ", ", kFlatQuantSide, ", ", kFlatQuantSide, "]");
  require_shape(p1, "kronecker_p1", {x.size(1), x.size(1)});
  require_shape(p2, "kronecker_p2", {x.size(2), x.size(2)});
  require(clip_ratio > 0 && clip_ratio <= 1, "clip_ratio=", clip_ratio, " is not above 0 and at most 1");
  require_shape(y, "out", {x.size(0), x.size(1), x.size(2) / kInt4InInt32});
  return [=] {
    const at::Tensor right = at::matmul(x.to(at::kFloat), p2.to(at::kFloat)).to(x.scalar_type()).to(at::kFloat);
    const at::Tensor both = at::matmul(p1.to(at::kFloat), right).to(x.scalar_type()).to(at::kFloat);
    const at::Tensor scales = both.abs().amax({1, 2}) * clip_ratio / kInt4Max;
    const at::Tensor divisor = scales.view({-1, 1, 1});
    y.copy_(pack_int4(at::where(divisor > 0, both / divisor, 0.0F).round().clamp(-8, 7)));
    scale.copy_(scales);
  };
}

at::Tensor rounded(const at::Tensor& values, const std::string& mode) {
  if (mode == "round") return values.round();
  if (mode == "floor") return values.floor();
  if (mode == "ceil") return values.ceil();
  if (mode == "trunc") return values.trunc();
  refuse(Code::kInvalid, "roundMode=", mode, " is none of round, floor, ceil, trunc");
}

// Returns `factors` in a shape that broadcasts over x: one for all of x, one for each index of `axis`, or a tensor of x's
// dimensions with 1 everywhere else.
at::Tensor along_axis(const at::Tensor& factors, const char* name, const at::Tensor& x, int64_t axis) {
  std::vector<int64_t> sizes(static_cast<std::size_t>(x.dim()), 1);
  sizes[static_cast<std::size_t>(axis)] = factors.numel() == 1 ? 1 : x.size(axis);
  if (factors.dim() == 1) require_shape(factors, name, {sizes[static_cast<std::size_t>(axis)]});
  else require_shape(factors, name, sizes);
  return factors.to(at::kFloat).view(sizes);
}

Plan ascend_quant_v3(at::Tensor x, at::Tensor scale, OptionalTensor offset, bool sqrt_mode, std::string round_mode,
                     int32_t /*dst_type: y's dtype*/, int32_t axis, at::Tensor y) {
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require_dtype(y, "dstType", {at::kChar});
  for (const auto& [factors, name] : {std::pair{OptionalTensor(scale), "scale"}, std::pair{offset, "offset"}}) {
    if (!factors) continue;
    if (x.scalar_type() == at::kFloat) require_dtype(*factors, name, {at::kFloat, at::kHalf, at::kBFloat16});
    else require_dtype(*factors, name, {x.scalar_type()});
  }
  const int64_t dim = axis < 0 ? axis + x.dim() : axis;
  require(dim >= 0 && dim < x.dim() && dim >= x.dim() - 2, "axis=", axis, " is not one of the last two of ", x.dim());
  rounded(at::empty({0}), round_mode);
  along_axis(scale, "scale", x, dim);
  if (offset) along_axis(*offset, "offset", x, dim);
  return [=] {
    at::Tensor factors = along_axis(scale, "scale", x, dim);
    if (sqrt_mode) factors = factors * factors;
    at::Tensor values = x.to(at::kFloat) * factors;
    if (offset) values = values + along_axis(*offset, "offset", x, dim);
    y.copy_(rounded(values, round_mode).clamp(-128, 127).to(at::kChar));
  };
}

Plan ascend_quant(at::Tensor x, at::Tensor scale, OptionalTensor offset, bool sqrt_mode, std::string round_mode,
                  int32_t dst_type, at::Tensor y) {
  return ascend_quant_v3(x, scale, offset, sqrt_mode, round_mode, dst_type, -1, y);
}

}  // namespace

ACLNN_OP(aclnnAscendQuant, ascend_quant);
ACLNN_OP(aclnnAscendQuantV3, ascend_quant_v3);
ACLNN_OP(aclnnFlatQuant, flat_quant);
ACLNN_OP(aclnnDynamicQuant, dynamic_quant);
ACLNN_OP(aclnnDynamicQuantV2, dynamic_quant_v2);

}  // namespace vllm_npu::emulator::aclnn
