// Choosing a token's experts, and which replica of an expert serves it.
//
// Contracts: op-plugin's documents of npu_moe_gating_top_k, npu_moe_gating_top_k_softmax(_v2) and
// npu_moe_update_expert; CANN's kernels where they say more. Of equal scores the lowest index comes first.
#include <limits>

#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kMaxGatingExperts = 2048;
constexpr int64_t kMaxSoftmaxTopK = 1024;
constexpr int64_t kMinExpertsInGroup = 3;
constexpr int64_t kSoftmax = 0;
constexpr int64_t kSigmoid = 1;
constexpr int64_t kByMaximum = 0;  // how a group of experts is scored
constexpr int64_t kByTopTwo = 1;
constexpr int64_t kByRank = 0;  // how update_expert spreads tokens over replicas
constexpr int64_t kByToken = 1;

// Indices of the k largest along the last dimension; torch.topk promises no order of equal values.
at::Tensor largest(const at::Tensor& scores, int64_t k) {
  return at::argsort(-scores, /*stable=*/true, -1, /*descending=*/false).narrow(-1, 0, k);
}

// -inf for the experts outside the group_limit best groups.
at::Tensor keep_best_groups(const at::Tensor& choice, int64_t group_count, int64_t group_limit, int64_t select_mode) {
  const at::Tensor groups = choice.view({choice.size(0), group_count, -1});
  const at::Tensor scores = select_mode == kByTopTwo ? std::get<0>(groups.topk(2, -1)).sum(-1) : groups.amax(-1);
  const at::Tensor kept = at::zeros_like(scores, at::kBool).scatter_(1, largest(scores, group_limit), true);
  return at::where(kept.unsqueeze(-1), groups, -std::numeric_limits<float>::infinity()).view(choice.sizes());
}

Plan gating_top_k(at::Tensor x, std::optional<at::Tensor> bias, int64_t k, int64_t group_limit, int64_t group_count,
                  int64_t group_select_mode, int64_t renorm, int64_t norm_type, bool wants_scores, double scaling,
                  double epsilon, at::Tensor weights, at::Tensor expert_ids, at::Tensor scores_out) {
  require_dimensions(x, "x", 2);
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  const int64_t num_experts = x.size(1);
  require(num_experts <= kMaxGatingExperts, "x has ", num_experts, " experts; at most ", kMaxGatingExperts);
  require_one_of(renorm, "renorm", {0});
  require_one_of(norm_type, "norm_type", {kSoftmax, kSigmoid});
  require_one_of(group_select_mode, "group_select_mode", {kByMaximum, kByTopTwo});
  require(group_count > 0 && num_experts % group_count == 0, "group_count=", group_count, " does not divide ",
          num_experts, " experts");
  require(group_count == 1 || num_experts / group_count >= kMinExpertsInGroup, "group_count=", group_count,
          " leaves groups of ", num_experts / group_count, " experts; at least ", kMinExpertsInGroup);
  require(1 <= group_limit && group_limit <= group_count, "k_group=", group_limit,
          " is not in 1..group_count=", group_count);
  require(1 <= k && k <= group_limit * (num_experts / group_count), "k=", k, " is not in 1..",
          group_limit * (num_experts / group_count), ", the experts of k_group groups");
  if (bias) require_shape(*bias, "bias", {num_experts});
  return [=] {
    const at::Tensor logits = x.to(at::kFloat);
    const at::Tensor scores = norm_type == kSigmoid ? at::sigmoid(logits) : at::softmax(logits, -1);
    at::Tensor choice = bias ? scores + bias->to(at::kFloat) : scores;
    if (group_count > 1) choice = keep_best_groups(choice, group_count, group_limit, group_select_mode);
    const at::Tensor chosen = largest(choice, k);
    at::Tensor chosen_scores = scores.gather(1, chosen);
    if (norm_type == kSigmoid) chosen_scores = chosen_scores / (chosen_scores.sum(-1, true) + epsilon);
    weights.copy_(chosen_scores * scaling);
    expert_ids.copy_(chosen);
    if (wants_scores)
      scores_out.copy_(scores);
    else
      fill_undefined(scores_out);
  };
}

void check_softmax(const at::Tensor& x, const std::optional<at::Tensor>& finished, int64_t k) {
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  require(1 <= k && k <= std::min(x.size(-1), kMaxSoftmaxTopK), "k=", k, " is not in 1..",
          std::min(x.size(-1), kMaxSoftmaxTopK));
  if (finished) {
    require_dtype(*finished, "finished", {at::kBool});
    require_shape(*finished, "finished", x.sizes().slice(0, x.dim() - 1));
  }
}

// A finished row's ids are E, which no expert has.
void write_ids(const at::Tensor& out, const at::Tensor& ids, const std::optional<at::Tensor>& finished,
               int64_t experts) {
  out.copy_(finished ? at::where(finished->unsqueeze(-1), experts, ids) : ids);
}

Plan gating_top_k_softmax(at::Tensor x, std::optional<at::Tensor> finished, int64_t k, at::Tensor weights,
                          at::Tensor expert_ids, at::Tensor row_ids) {
  check_softmax(x, finished, k);
  return [=] {
    const at::Tensor scores = at::softmax(x.to(at::kFloat), -1);
    const at::Tensor chosen = largest(scores, k);
    weights.copy_(scores.gather(-1, chosen));
    write_ids(expert_ids, chosen, finished, x.size(-1));
    row_ids.copy_(at::arange(row_ids.numel()).view({k, -1}).t().view(row_ids.sizes()));
  };
}

// renorm 0: softmax over all experts, then the choice. renorm 1: the choice, then softmax over the chosen.
Plan gating_top_k_softmax_v2(at::Tensor x, std::optional<at::Tensor> finished, int64_t k, int64_t renorm,
                             bool wants_scores, at::Tensor weights, at::Tensor expert_ids,
                             std::optional<at::Tensor> scores_out) {
  check_softmax(x, finished, k);
  require_one_of(renorm, "renorm", {0, 1});
  require(!wants_scores || renorm == 0, "output_softmax=true needs renorm=0");
  return [=] {
    const at::Tensor logits = x.to(at::kFloat);
    const at::Tensor scores = at::softmax(logits, -1);
    const at::Tensor chosen = largest(renorm == 1 ? logits : scores, k);
    weights.copy_(renorm == 1 ? at::softmax(logits.gather(-1, chosen), -1) : scores.gather(-1, chosen));
    write_ids(expert_ids, chosen, finished, x.size(-1));
    if (wants_scores) scores_out->copy_(scores);
  };
}

// Row e of the table: the number of replicas of logical expert e, their physical ids, padding.
at::Tensor physical_experts(const at::Tensor& expert_ids, const at::Tensor& table, int64_t rank, int64_t world_size,
                            int64_t balance_mode) {
  const at::Tensor ids = expert_ids.to(at::kLong);
  const at::Tensor bad = (ids < 0).logical_or(ids >= table.size(0));
  require(!bad.any().item<bool>(), "expert_ids has an id outside 0..", table.size(0) - 1);
  const at::Tensor rows = table.index_select(0, ids.flatten()).to(at::kLong);  // [B * K, F]
  const at::Tensor replicas = rows.select(1, 0);
  require(((replicas >= 1).logical_and(replicas < table.size(1))).all().item<bool>(),
          "eplb_table has a number of replicas that is not in 1..", table.size(1) - 1);
  at::Tensor replica;
  if (balance_mode == kByRank) {
    const at::Tensor ranks_per_replica = (world_size + replicas - 1).floor_divide(replicas);
    replica = at::full_like(replicas, rank).floor_divide(ranks_per_replica);
  } else {
    replica = at::arange(ids.size(0)).repeat_interleave(ids.size(1)).remainder(replicas);
  }
  return rows.gather(1, (replica + 1).unsqueeze(1)).view(ids.sizes());
}

void require_prefix(const at::Tensor& mask, const char* name) {
  const at::Tensor flags = mask.to(at::kInt);
  require((flags.diff() <= 0).all().item<bool>(), name, " has a hole: active tokens must come first");
}

Plan update_expert(at::Tensor expert_ids, at::Tensor table, std::optional<at::Tensor> scales,
                   std::optional<at::Tensor> threshold, std::optional<at::Tensor> active_mask, int64_t rank,
                   int64_t world_size, int64_t balance_mode, at::Tensor physical_ids, at::Tensor mask) {
  const Family family = current_soc().family;
  require(family == Family::kA3 || family == Family::kA5, current_soc().name,
          " has no npu_moe_update_expert; Ascend910_93 and Ascend950 have it");
  require_dimensions(expert_ids, "expert_ids", 2);
  require_dtype(expert_ids, "expert_ids", {at::kInt, at::kLong});
  require_dimensions(table, "eplb_table", 2);
  require_dtype(table, "eplb_table", {at::kInt});
  require_one_of(balance_mode, "balance_mode", {kByRank, kByToken});
  if (balance_mode == kByRank) {
    require(2 <= world_size && world_size <= 768, "world_size=", world_size, " is not in 2..768");
    require(0 <= rank && rank < world_size, "local_rank_id=", rank, " is not in 0..", world_size - 1);
  }
  require(scales.has_value() == threshold.has_value(), "expert_scales and pruning_threshold go together");
  require(!active_mask || scales, "active_mask needs expert_scales and pruning_threshold");
  if (scales) {
    require_shape(*scales, "expert_scales", expert_ids.sizes());
    require_dtype(*scales, "expert_scales", {at::kHalf, at::kBFloat16, at::kFloat});
    require_dtype(*threshold, "pruning_threshold", {at::kFloat});
    require(threshold->numel() == expert_ids.size(1), "pruning_threshold has ", threshold->numel(),
            " values; it must have ", expert_ids.size(1));
  }
  if (active_mask) {
    require_dtype(*active_mask, "active_mask", {at::kBool});
    require_shape(*active_mask, "active_mask", {expert_ids.size(0)});
  }
  return [=] {
    physical_ids.copy_(physical_experts(expert_ids, table, rank, world_size, balance_mode));
    if (!scales) return fill_undefined(mask);
    const at::Tensor weights = scales->to(at::kFloat);
    at::Tensor kept = weights >= threshold->view({1, -1}) * weights.sum(-1, true);
    if (active_mask) {
      require_prefix(*active_mask, "active_mask");
      kept = kept.logical_and(active_mask->unsqueeze(-1));
    }
    mask.copy_(kept);
  };
}

}  // namespace

ACLNN_OP(aclnnMoeGatingTopK, gating_top_k);
ACLNN_OP(aclnnMoeGatingTopKSoftmax, gating_top_k_softmax);
ACLNN_OP(aclnnMoeGatingTopKSoftmaxV2, gating_top_k_softmax_v2);
ACLNN_OP(aclnnMoeUpdateExpert, update_expert);

}  // namespace vllm_npu::emulator::aclnn
