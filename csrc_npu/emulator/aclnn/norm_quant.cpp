// Root-mean-square norms with a cast or a quantisation behind them.
//
// Contracts: op-plugin's documents of npu_rms_norm_quant, npu_add_rms_norm_quant and npu_add_rms_norm_dynamic_quant,
// and CANN's of aclnnAddRmsNormCast. The ops compute in float32. Values are rounded half to even; the documents do not
// name the rounding of the dynamic op, and the device's may differ by one unit.
#include "int4.h"
#include "norm.h"
#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {

template <>
struct Argument<std::vector<bool>> {
  using Handle = const aclBoolArray*;
  static std::vector<bool> take(Handle handle) { return handle ? handle->values : std::vector<bool>(); }
};

namespace {

struct Range {
  float least, most;
};

// int8 values, or int4 values that are packed into int32.
Range range_of(const at::Tensor& y) { return y.scalar_type() == at::kInt ? Range{-8, 7} : Range{-128, 127}; }

void write_integers(const at::Tensor& y, const at::Tensor& values) {
  const Range range = range_of(y);
  const at::Tensor integers = values.round().clamp(range.least, range.most);
  y.copy_((y.scalar_type() == at::kInt ? pack_int4(integers) : integers.to(at::kChar)).view(y.sizes()));
}

at::Tensor with_beta(const at::Tensor& normed, const OptionalTensor& beta) {
  return beta ? normed + beta->to(at::kFloat) : normed;
}

void check_beta(const OptionalTensor& beta, const at::Tensor& gamma) {
  if (!beta) return;
  require_dtype(*beta, "beta", {gamma.scalar_type()});
  require_shape(*beta, "beta", gamma.sizes());
}

Plan add_rms_norm_cast(at::Tensor x1, at::Tensor x2, at::Tensor gamma, double epsilon, at::Tensor y1, at::Tensor y2,
                       at::Tensor rstd, at::Tensor sum) {
  refuse_on_310p("npu_add_rms_norm_cast");
  require_added_norm(x1, x2, gamma);
  return [=] {
    const at::Tensor added = x1.to(at::kFloat) + x2.to(at::kFloat);
    const Normed normed = rms_normed(added, gamma, epsilon);
    y2.copy_(normed.values);
    y1.copy_(y2);
    rstd.copy_(normed.rstd.view(rstd.sizes()));
    sum.copy_(added);
  };
}

// --- static quantisation ---

struct Scales {
  at::Tensor scales1;
  OptionalTensor scales2, zero_points1, zero_points2;

  using Fields = std::tuple<at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

void check_factor(const OptionalTensor& factor, const char* name, const at::Tensor& gamma,
                  std::initializer_list<at::ScalarType> types) {
  if (!factor) return;
  require_dtype(*factor, name, types);
  require_shape(*factor, name, gamma.sizes());
}

// y1 and y2 are quantised by scales of their own. y2 has no meaning without scales2.
Plan add_rms_norm_quant_v2(at::Tensor x1, at::Tensor x2, at::Tensor gamma, Scales scales, OptionalTensor beta,
                           int64_t axis, double epsilon, bool divide, at::Tensor y1, at::Tensor y2, at::Tensor sum,
                           OptionalTensor normed_out) {
  require_added_norm(x1, x2, gamma);
  require_one_of(axis, "axis", {-1});
  check_beta(beta, gamma);
  check_factor(scales.scales1, "scales1", gamma, {at::kFloat, at::kBFloat16, at::kHalf});
  check_factor(scales.scales2, "scales2", gamma, {scales.scales1.scalar_type()});
  check_factor(scales.zero_points1, "zero_points1", gamma, {at::kInt, at::kBFloat16, at::kFloat, at::kHalf});
  check_factor(scales.zero_points2, "zero_points2", gamma, {at::kInt, at::kBFloat16, at::kFloat, at::kHalf});
  require_dtype(y1, "dst_type", {at::kChar});
  require_absent(normed_out, "the norm's own output", "op-plugin asks for none");
  return [=] {
    const at::Tensor added = x1.to(at::kFloat) + x2.to(at::kFloat);
    const at::Tensor normed = with_beta(rms_normed(added, gamma, epsilon).values, beta);
    const auto quantised = [&](const at::Tensor& scale, const OptionalTensor& zero_point) {
      const at::Tensor factor = scale.to(at::kFloat);
      const at::Tensor scaled = divide ? normed / factor : normed * factor;
      return zero_point ? scaled + zero_point->to(at::kFloat) : scaled;
    };
    write_integers(y1, quantised(scales.scales1, scales.zero_points1));
    if (scales.scales2) {
      write_integers(y2, quantised(*scales.scales2, scales.zero_points2));
    } else {
      fill_undefined(y2);
    }
    sum.copy_(added);
  };
}

Plan add_rms_norm_quant(at::Tensor x1, at::Tensor x2, at::Tensor gamma, Scales scales, int64_t axis, double epsilon,
                        bool divide, at::Tensor y1, at::Tensor y2, at::Tensor sum) {
  return add_rms_norm_quant_v2(x1, x2, gamma, scales, std::nullopt, axis, epsilon, divide, y1, y2, sum, std::nullopt);
}

Plan rms_norm_quant(at::Tensor x, at::Tensor gamma, at::Tensor beta, at::Tensor scale, at::Tensor offset,
                    double epsilon, at::Tensor y) {
  require_norm(x, gamma.dim() == 2 ? gamma.squeeze(0) : gamma);
  check_beta(beta, gamma);
  require(scale.numel() == 1 && offset.numel() == 1, "scale has the shape ", scale.sizes(), " and offset ",
          offset.sizes(), "; they must have one value");
  require_dtype(offset, "offset", {at::kChar});
  require_dtype(y, "dst_dtype", {at::kChar, at::kInt});
  return [=] {
    const at::Tensor normed = with_beta(rms_normed(x, gamma.view({-1}), epsilon).values, beta.view({-1}));
    write_integers(y, normed * scale.to(at::kFloat) + offset.to(at::kFloat));
  };
}

// --- dynamic quantisation ---

struct DynamicOutputs {
  at::Tensor y1, y2, sum, scale1, scale2;

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};

// Each row of y1 and y2 gets a scale: its largest value over 127, or 7 for int4. Without a mask, y1 is wanted, and y2
// if both smooth scales are given.
Plan add_rms_norm_dynamic_quant(at::Tensor x1, at::Tensor x2, at::Tensor gamma, OptionalTensor smooth1,
                                OptionalTensor smooth2, OptionalTensor beta, double epsilon, std::vector<bool> mask,
                                DynamicOutputs outputs) {
  refuse_on_310p("npu_add_rms_norm_dynamic_quant");
  require_added_norm(x1, x2, gamma);
  require_dimensions(gamma, "gamma", 1);
  check_beta(beta, gamma);
  check_factor(smooth1, "smooth_scale1", gamma, {x1.scalar_type()});
  check_factor(smooth2, "smooth_scale2", gamma, {x1.scalar_type()});
  require(mask.empty() || mask.size() == 2, "output_mask has ", mask.size(), " values; it must have two");
  const bool wants1 = mask.empty() || mask[0], wants2 = mask.empty() ? smooth1 && smooth2 : mask[1];
  require((wants1 || !smooth1) && (wants2 || !smooth2 || mask.empty()),
          "output_mask leaves out an output whose smooth scale is given");
  require_dtype(outputs.y1, "y_dtype", {at::kChar, at::kInt});
  return [=] {
    const at::Tensor added = x1.to(at::kFloat) + x2.to(at::kFloat);
    const at::Tensor normed = with_beta(rms_normed(added, gamma, epsilon).values, beta);
    const auto write = [&](bool wanted, const OptionalTensor& smooth, const at::Tensor& y, const at::Tensor& scale) {
      if (!wanted) {
        fill_undefined(y);
        fill_undefined(scale);
        return;
      }
      const at::Tensor smoothed = smooth ? normed * smooth->to(at::kFloat) : normed;
      const at::Tensor scales = smoothed.abs().amax(-1, /*keepdim=*/true) / range_of(y).most;
      write_integers(y, at::where(scales > 0, smoothed / scales, 0.0F));
      scale.copy_(scales.view(scale.sizes()));
    };
    write(wants1, smooth1, outputs.y1, outputs.scale1);
    write(wants2, smooth2, outputs.y2, outputs.scale2);
    outputs.sum.copy_(added);
  };
}

}  // namespace

ACLNN_OP(aclnnAddRmsNormCast, add_rms_norm_cast);
ACLNN_OP(aclnnAddRmsNormQuant, add_rms_norm_quant);
ACLNN_OP(aclnnAddRmsNormQuantV2, add_rms_norm_quant_v2);
ACLNN_OP(aclnnRmsNormQuant, rms_norm_quant);
ACLNN_OP(aclnnAddRmsNormDynamicQuantV2, add_rms_norm_dynamic_quant);

}  // namespace vllm_npu::emulator::aclnn
