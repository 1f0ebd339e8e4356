// What a language model's training adds to its inference: the gradients of the fused ops, and cross entropy.
//
// Contracts: op-plugin's documents and schemas of npu_rms_norm_backward, npu_swiglu_backward, npu_rotary_mul_backward,
// npu_gelu_backward, npu_moe_token_permute_grad, npu_moe_token_unpermute_grad and npu_cross_entropy_loss. They do not say in
// which type sums are added up. Here it is float32, rounded once.
#include "op.h"
#include "rotary.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kHalves = 0;       // rotary mode: pairs of an element of the first half and one of the second
constexpr int64_t kInterleaved = 1;  // rotary mode: pairs of neighbours

void require_float(const at::Tensor& tensor, const char* name) {
  require_dtype(tensor, name, {at::kHalf, at::kBFloat16, at::kFloat});
}

Plan rms_norm_grad(at::Tensor dy, at::Tensor x, at::Tensor rstd, at::Tensor gamma, at::Tensor dx, at::Tensor dgamma) {
  require_float(x, "self");
  require_dtype(dy, "dy", {x.scalar_type()});
  require_shape(dy, "dy", x.sizes());
  require_dtype(rstd, "rstd", {at::kFloat});
  require(gamma.dim() <= x.dim() && x.sizes().slice(x.dim() - gamma.dim()) == gamma.sizes(), "self has the shape ",
          x.sizes(), " and gamma ", gamma.sizes(), "; gamma's dimensions must be self's last");
  return [=] {
    const int64_t width = gamma.numel(), rows = width == 0 ? 0 : x.numel() / width;
    const at::Tensor normed = x.to(at::kFloat).reshape({rows, width}) * rstd.reshape({rows, 1});
    const at::Tensor gradient = dy.to(at::kFloat).reshape({rows, width});
    const at::Tensor scaled = gradient * gamma.to(at::kFloat).reshape({1, width});
    const at::Tensor common = (scaled * normed).mean(-1, /*keepdim=*/true);
    dx.copy_(((scaled - normed * common) * rstd.reshape({rows, 1})).view(dx.sizes()));
    dgamma.copy_((gradient * normed).sum(0).view(dgamma.sizes()));
  };
}

Plan swiglu_grad(at::Tensor gradient, at::Tensor x, int64_t dim, at::Tensor out) {
  require_float(x, "self");
  require(dim >= -x.dim() && dim < x.dim() && x.size(dim) % 2 == 0, "dim=", dim, " of ", x.sizes(),
          " must have an even size");
  return [=] {
    const std::vector<at::Tensor> halves = x.to(at::kFloat).chunk(2, dim);
    const at::Tensor dy = gradient.to(at::kFloat), gate = at::sigmoid(halves[0]);
    const at::Tensor slope = gate * (1 + halves[0] * (1 - gate));
    out.copy_(at::cat({dy * halves[1] * slope, dy * halves[0] * gate}, dim));
  };
}

// Of y = x * cos + turned(x) * sin. The transpose of `turned` is its negative.
Plan rotary_grad(at::Tensor dy, at::Tensor cos, at::Tensor sin, OptionalTensor x, int64_t mode, at::Tensor dx,
                 at::Tensor dcos, at::Tensor dsin) {
  require_float(dy, "dy");
  require_one_of(mode, "rotary_mode", {kHalves, kInterleaved});
  require(dy.size(-1) % 2 == 0 && cos.size(-1) == dy.size(-1), "dy has the shape ", dy.sizes(), " and r1 ",
          cos.sizes());
  require_shape(sin, "r2", cos.sizes());
  return [=] {
    const auto turned = [mode](const at::Tensor& values) {
      return mode == kHalves ? turned_halves(values) : turned_neighbours(values);
    };
    const at::Tensor gradient = dy.to(at::kFloat);
    dx.copy_(gradient * cos.to(at::kFloat) - turned(gradient * sin.to(at::kFloat)));
    if (!x) {  // nobody wants these
      fill_undefined(dcos);
      fill_undefined(dsin);
      return;
    }
    const at::Tensor values = x->to(at::kFloat);
    dcos.copy_(at::sum_to(gradient * values, dcos.sizes()));
    dsin.copy_(at::sum_to(gradient * turned(values), dsin.sizes()));
  };
}

Plan gelu_grad(at::Tensor gradient, at::Tensor x, std::string approximate, at::Tensor out) {
  require_float(x, "self");
  require(approximate == "none" || approximate == "tanh", "approximate=", approximate, " is neither none nor tanh");
  return [=] { out.copy_(at::gelu_backward(gradient.to(at::kFloat), x.to(at::kFloat), approximate)); };
}

// The rows of `rows` at `index` in float32, and zeros where an index is past the last row: npu_moe_token_permute leaves
// such rows out.
at::Tensor rows_or_zeros(const at::Tensor& rows, const at::Tensor& index) {
  require((index >= 0).all().item<bool>(), "sorted_indices has a negative value");
  const at::Tensor padded = at::cat({rows.to(at::kFloat), at::zeros({1, rows.size(1)}, at::kFloat)});
  return padded.index_select(0, index.clamp_max(rows.size(0)));
}

Plan permute_grad(at::Tensor gradient, at::Tensor sorted_indices, int64_t top_k, bool padded_mode, at::Tensor out) {
  require(!padded_mode, "padded_mode=true is not emulated");
  require_float(gradient, "grad_permuted_tokens");
  require_dtype(sorted_indices, "sorted_indices", {at::kInt});
  require(top_k > 0 && sorted_indices.numel() == out.size(0) * top_k, "sorted_indices has ", sorted_indices.numel(),
          " entries for ", out.size(0), " tokens of ", top_k, " experts");
  return [=] {
    const at::Tensor rows = rows_or_zeros(gradient, sorted_indices.flatten().to(at::kLong));
    out.copy_(rows.view({out.size(0), top_k, out.size(1)}).sum(1));
  };
}

Plan unpermute_grad(OptionalTensor permuted, at::Tensor gradient, at::Tensor sorted_indices, OptionalTensor probs,
                    bool padded_mode, std::vector<int64_t> /*restore_shape: only for padded_mode*/, at::Tensor out,
                    at::Tensor grad_probs) {
  require(!padded_mode, "padded_mode=true is not emulated");
  require_float(gradient, "grad_unpermuted_tokens");
  require_dtype(sorted_indices, "sorted_indices", {at::kInt});
  const int64_t top_k = probs ? probs->size(1) : 1;
  require(sorted_indices.numel() == gradient.size(0) * top_k, "sorted_indices has ", sorted_indices.numel(),
          " entries for ", gradient.size(0), " tokens of ", top_k, " experts");
  if (probs && !permuted) refuse(Code::kMissing, "probs needs permuted_tokens");
  return [=] {
    const at::Tensor index = sorted_indices.flatten().to(at::kLong);
    const at::Tensor each = gradient.to(at::kFloat).repeat_interleave(top_k, 0);
    const at::Tensor rows = probs ? each * probs->to(at::kFloat).reshape({-1, 1}) : each;
    const at::Tensor kept = (index >= 0).logical_and(index < out.size(0));
    at::Tensor spread = at::zeros(out.sizes(), at::kFloat);
    spread.index_copy_(0, index.masked_select(kept), rows.index({kept}));
    out.copy_(spread);
    if (probs) grad_probs.copy_((rows_or_zeros(*permuted, index) * each).sum(-1).view(grad_probs.sizes()));
  };
}

// --- cross entropy ---

struct LossOptions {
  std::string reduction;
  int64_t ignore_index;  // negative: none
  double label_smoothing;
  double lse_square_scale_for_zloss;

  using Fields = std::tuple<std::string, int64_t, double, double>;
};

int64_t check_loss(const LossOptions& options) {
  require(options.lse_square_scale_for_zloss == 0, "lse_square_scale_for_zloss is given, but op-plugin's document says "
          "that it is not supported");
  if (options.reduction == "none") return at::Reduction::None;
  if (options.reduction == "sum") return at::Reduction::Sum;
  require(options.reduction == "mean", "reduction=", options.reduction, " is none of mean, sum and none");
  return at::Reduction::Mean;
}

Plan cross_entropy_loss(at::Tensor input, at::Tensor target, OptionalTensor weight, LossOptions options,
                        bool return_zloss, at::Tensor loss, at::Tensor log_prob, at::Tensor /*zloss*/,
                        at::Tensor /*lse_for_zloss*/) {
  require_float(input, "input");
  require_dimensions(input, "input", 2);
  require_dtype(target, "target", {at::kLong});
  require_shape(target, "target", {input.size(0)});
  if (weight) require_dtype(*weight, "weight", {at::kFloat});
  require(!return_zloss, "return_zloss is true, but op-plugin's document says that it is not supported");
  const int64_t reduction = check_loss(options);
  return [=] {
    const at::Tensor logits = input.to(at::kFloat);
    log_prob.copy_(at::log_softmax(logits, 1));
    loss.copy_(at::cross_entropy_loss(logits, target, weight, reduction,
                                      options.ignore_index < 0 ? -100 : options.ignore_index, options.label_smoothing)
                   .view(loss.sizes()));
  };
}

Plan cross_entropy_loss_grad(at::Tensor gradient, at::Tensor log_prob, at::Tensor target, OptionalTensor weight,
                             OptionalTensor grad_zloss, OptionalTensor lse_for_zloss, LossOptions options,
                             at::Tensor out) {
  require_float(log_prob, "log_prob");
  require_dtype(target, "target", {at::kLong});
  // torch_npu passes tensors without elements.
  for (const auto& [tensor, name] : {std::pair(grad_zloss, "grad_zloss"), std::pair(lse_for_zloss, "lse_for_zloss")}) {
    if (tensor && tensor->numel() > 0) {
      require_absent(tensor, name, "op-plugin's document says that the second loss is not supported");
    }
  }
  require(options.label_smoothing == 0,
          "label_smoothing is given, but op-plugin's document says that its gradient is not supported");
  const int64_t reduction = check_loss(options);
  return [=] {
    const int64_t width = log_prob.size(1);
    at::Tensor share = weight ? weight->index_select(0, target) : at::ones({target.size(0)}, at::kFloat);
    if (options.ignore_index >= 0) share = share.masked_fill(target == options.ignore_index, 0);
    if (reduction == at::Reduction::Mean) share = share / share.sum();
    const at::Tensor slopes = at::exp(log_prob.to(at::kFloat)) - at::one_hot(target, width).to(at::kFloat);
    out.copy_(slopes * (share * gradient.to(at::kFloat).flatten()).unsqueeze(1));
  };
}

}  // namespace

ACLNN_OP(aclnnRmsNormGrad, rms_norm_grad);
ACLNN_OP(aclnnSwiGluGrad, swiglu_grad);
ACLNN_OP(aclnnRotaryPositionEmbeddingGrad, rotary_grad);
ACLNN_OP(aclnnGeluBackwardV2, gelu_grad);
ACLNN_OP(aclnnMoeTokenPermuteGrad, permute_grad);
ACLNN_OP(aclnnMoeTokenUnpermuteGrad, unpermute_grad);
ACLNN_OP(aclnnCrossEntropyLoss, cross_entropy_loss);
ACLNN_OP(aclnnCrossEntropyLossGrad, cross_entropy_loss_grad);

}  // namespace vllm_npu::emulator::aclnn
