// The choice of the logits that a sampler draws from.
//
// Contract: op-plugin's document of npu_top_k_top_p. Probabilities are computed in float32.
#include <limits>

#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

// Keeps the k largest logits of each row, then the fewest of the largest whose probabilities sum up to more than p, at
// least one. The others become -infinity. A missing p or k keeps all.
Plan apply_top_k_top_p(at::Tensor logits, OptionalTensor p, OptionalTensor k, at::Tensor out) {
  refuse_on_310p("npu_top_k_top_p");
  require_dimensions(logits, "logits", 2);
  require_dtype(logits, "logits", {at::kFloat, at::kHalf, at::kBFloat16});
  if (p) {
    require_dtype(*p, "p", {logits.scalar_type()});
    require_shape(*p, "p", {logits.size(0)});
  }
  if (k) {
    require_dtype(*k, "k", {at::kInt});
    require_shape(*k, "k", {logits.size(0)});
  }
  return [=] {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    auto [sorted, order] = logits.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/false);
    const int64_t width = logits.size(1);
    if (k) {
      const at::Tensor first = width - k->to(at::kLong);
      require(first.ge(0).logical_and(first < width).all().item<bool>(), "k is not between 1 and ", width);
      sorted = sorted.masked_fill(sorted < sorted.gather(1, first.unsqueeze(1)), -kInfinity);
    }
    if (p) {
      const at::Tensor sums = sorted.to(at::kFloat).softmax(-1).cumsum(-1);
      at::Tensor dropped = sums <= 1 - p->to(at::kFloat).unsqueeze(1);
      dropped.select(1, width - 1).fill_(false);
      sorted = sorted.masked_fill(dropped, -kInfinity);
    }
    out.scatter_(1, order, sorted);
  };
}

}  // namespace

ACLNN_OP(aclnnApplyTopKTopP, apply_top_k_top_p);

}  // namespace vllm_npu::emulator::aclnn
