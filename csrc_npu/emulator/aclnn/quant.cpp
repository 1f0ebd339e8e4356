// Dynamic quantisation: the scales are computed from the rows.
//
// Contract: op-plugin's document of npu_dynamic_quant. Values are rounded half to even. The device's may differ by one
// unit.
#include "numerics.h"
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr float kInt8Max = 127.0F;
constexpr float kInt4Max = 7.0F;
constexpr int64_t kInt4InInt32 = 8;

// Packs eight int4 values of a row into one int32. The first value has the lowest bits.
at::Tensor pack_int4(const at::Tensor& values) {
  std::vector<int64_t> sizes = values.sizes().vec();
  sizes.back() /= kInt4InInt32;
  sizes.push_back(kInt4InInt32);
  const at::Tensor nibbles = values.to(at::kLong).bitwise_and(0xF).view(sizes);
  const at::Tensor shifts = at::arange(kInt4InInt32, at::kLong) * 4;
  return nibbles.bitwise_left_shift(shifts).sum(-1).to(at::kInt);
}

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

}  // namespace

ACLNN_OP(aclnnDynamicQuant, dynamic_quant);
ACLNN_OP(aclnnDynamicQuantV2, dynamic_quant_v2);

}  // namespace vllm_npu::emulator::aclnn
