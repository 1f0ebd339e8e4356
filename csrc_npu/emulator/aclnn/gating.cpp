// Ops that choose the experts of a token, and the replica of each expert.
//
// Contracts: op-plugin's documents of npu_moe_gating_top_k, npu_moe_gating_top_k_softmax(_v2) and
// npu_moe_update_expert, and CANN's kernels for details. Of equal scores, the one with the lowest index comes first.
#include <algorithm>
#include <limits>

#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kMaxGatingExperts = 2048;
constexpr int64_t kMaxSoftmaxTopK = 1024;
constexpr int64_t kMinExpertsInGroup = 3;
constexpr int64_t kGroupMultiple = 32;
constexpr int64_t kSoftmax = 0;
constexpr int64_t kSigmoid = 1;
constexpr int64_t kByMaximum = 0;  // score of a group of experts
constexpr int64_t kByTopTwo = 1;
constexpr int64_t kByRank = 0;  // how update_expert spreads tokens over replicas
constexpr int64_t kByToken = 1;

// Returns the indices of the k largest values along the last dimension. torch.topk does not define the order of equal
// values.
at::Tensor largest(const at::Tensor& scores, int64_t k) {
  return at::argsort(-scores, /*stable=*/true, -1, /*descending=*/false).narrow(-1, 0, k);
}

// Returns the scores, with -inf for the experts outside the group_limit best groups.
at::Tensor keep_best_groups(const at::Tensor& choice, int64_t group_count, int64_t group_limit, int64_t select_mode) {
  const at::Tensor groups = choice.view({choice.size(0), group_count, -1});
  const at::Tensor scores = select_mode == kByTopTwo ? std::get<0>(groups.topk(2, -1)).sum(-1) : groups.amax(-1);
  const at::Tensor kept = at::zeros_like(scores, at::kBool).scatter_(1, largest(scores, group_limit), true);
  return at::where(kept.unsqueeze(-1), groups, -std::numeric_limits<float>::infinity()).view(choice.sizes());
}

// A table with the experts of each token id, for layers that route by a hash of the token.
struct ByToken {
  OptionalTensor input_ids;  // [N]
  OptionalTensor table;      // tid2eid: [ids, k]

  using Fields = std::tuple<OptionalTensor, OptionalTensor>;
};

// The parameters of the choice of experts by their scores.
struct Choice {
  int64_t k;
  int64_t group_limit;
  int64_t group_count;
  int64_t group_select_mode;
  int64_t renorm;
  int64_t norm_type;

  using Fields = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
};

struct GatingOutputs {
  bool wants_scores;
  double scaling;
  double epsilon;
  at::Tensor weights;
  at::Tensor expert_ids;
  at::Tensor scores;

  using Fields = std::tuple<bool, double, double, at::Tensor, at::Tensor, at::Tensor>;
};

void check_choice(const Choice& choice, int64_t num_experts) {
  require(num_experts <= kMaxGatingExperts, "x has ", num_experts, " experts; at most ", kMaxGatingExperts);
  require_one_of(choice.renorm, "renorm", {0});
  require_one_of(choice.norm_type, "norm_type", {kSoftmax, kSigmoid});
  require_one_of(choice.group_select_mode, "group_select_mode", {kByMaximum, kByTopTwo});
  const int64_t groups = choice.group_count;
  require(groups > 0 && num_experts % groups == 0, "group_count=", groups, " does not divide ", num_experts,
          " experts");
  require(groups == 1 || num_experts / groups >= kMinExpertsInGroup, "group_count=", groups, " leaves groups of ",
          num_experts / groups, " experts; at least ", kMinExpertsInGroup);
  const int64_t padded = (num_experts / groups + kGroupMultiple - 1) / kGroupMultiple * kGroupMultiple;
  require(groups * padded <= kMaxGatingExperts, "group_count=", groups, " groups of ", num_experts / groups,
          " experts, each padded to a multiple of ", kGroupMultiple, ", are ", groups * padded, " experts; at most ",
          kMaxGatingExperts);
  require(1 <= choice.group_limit && choice.group_limit <= groups, "k_group=", choice.group_limit,
          " is not in 1..group_count=", groups);
  const int64_t eligible = choice.group_limit * (num_experts / groups);
  require(1 <= choice.k && choice.k <= eligible, "k=", choice.k, " is not in 1..", eligible,
          ", the experts of k_group groups");
}

void check_by_token(const ByToken& by_token, const OptionalTensor& bias, const Choice& choice, int64_t num_tokens) {
  require(by_token.input_ids && by_token.table, "input_ids and tid2eid go together");
  require_absent(bias, "bias", "tid2eid chooses the experts");
  require(choice.group_count == 1, "group_count=", choice.group_count, ", but tid2eid chooses the experts");
  require_dtype(*by_token.input_ids, "input_ids", {at::kInt, at::kLong});
  require_shape(*by_token.input_ids, "input_ids", {num_tokens});
  require_dtype(*by_token.table, "tid2eid", {at::kInt, at::kLong});
  require_shape(*by_token.table, "tid2eid", {by_token.table->size(0), choice.k});
}

// Returns the experts of each token from the table, [N, k].
at::Tensor experts_by_token(const ByToken& by_token, int64_t num_experts) {
  const auto require_range = [](const at::Tensor& values, const char* name, int64_t end) {
    require(values.ge(0).logical_and(values < end).all().item<bool>(), name, " has a value outside 0..", end - 1);
  };
  require_range(*by_token.input_ids, "input_ids", by_token.table->size(0));
  const at::Tensor chosen = by_token.table->to(at::kLong).index_select(0, by_token.input_ids->to(at::kLong));
  require_range(chosen, "tid2eid", num_experts);
  return chosen;
}

Plan gating_top_k_v2(at::Tensor x, OptionalTensor bias, ByToken by_token, Choice choice, GatingOutputs outputs) {
  refuse_on_310p("npu_moe_gating_top_k");
  require_dimensions(x, "x", 2);
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  check_choice(choice, x.size(1));
  if (bias) require_shape(*bias, "bias", {x.size(1)});
  if (by_token.input_ids || by_token.table) check_by_token(by_token, bias, choice, x.size(0));
  return [=] {
    const at::Tensor logits = x.to(at::kFloat);
    const at::Tensor scores = choice.norm_type == kSigmoid ? at::sigmoid(logits) : at::softmax(logits, -1);
    at::Tensor chosen;
    if (by_token.table) {
      chosen = experts_by_token(by_token, x.size(1));
    } else {
      at::Tensor ranked = bias ? scores + bias->to(at::kFloat) : scores;
      if (choice.group_count > 1) {
        ranked = keep_best_groups(ranked, choice.group_count, choice.group_limit, choice.group_select_mode);
      }
      chosen = largest(ranked, choice.k);
    }
    at::Tensor weights = scores.gather(1, chosen);
    if (choice.norm_type == kSigmoid) weights = weights / (weights.sum(-1, true) + outputs.epsilon);
    outputs.weights.copy_(weights * outputs.scaling);
    outputs.expert_ids.copy_(chosen);
    if (outputs.wants_scores)
      outputs.scores.copy_(scores);
    else
      fill_undefined(outputs.scores);
  };
}

Plan gating_top_k(at::Tensor x, OptionalTensor bias, Choice choice, GatingOutputs outputs) {
  return gating_top_k_v2(x, bias, {}, choice, outputs);
}

void check_softmax(const at::Tensor& x, const OptionalTensor& finished, int64_t k) {
  refuse_on_310p("npu_moe_gating_top_k_softmax");
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  require(1 <= k && k <= std::min(x.size(-1), kMaxSoftmaxTopK), "k=", k, " is not in 1..",
          std::min(x.size(-1), kMaxSoftmaxTopK));
  if (finished) {
    require_dtype(*finished, "finished", {at::kBool});
    require_shape(*finished, "finished", x.sizes().slice(0, x.dim() - 1));
  }
}

// Writes the ids. A finished row gets the id E, which no expert has.
void write_ids(const at::Tensor& out, const at::Tensor& ids, const OptionalTensor& finished, int64_t experts) {
  out.copy_(finished ? at::where(finished->unsqueeze(-1), experts, ids) : ids);
}

Plan gating_top_k_softmax(at::Tensor x, OptionalTensor finished, int64_t k, at::Tensor weights, at::Tensor expert_ids,
                          at::Tensor row_ids) {
  check_softmax(x, finished, k);
  return [=] {
    const at::Tensor scores = at::softmax(x.to(at::kFloat), -1);
    const at::Tensor chosen = largest(scores, k);
    weights.copy_(scores.gather(-1, chosen));
    write_ids(expert_ids, chosen, finished, x.size(-1));
    row_ids.copy_(at::arange(row_ids.numel()).view({k, -1}).t().view(row_ids.sizes()));
  };
}

// renorm 0: softmax over all experts, then the choice. renorm 1: the choice, then softmax over the chosen experts.
Plan gating_top_k_softmax_v2(at::Tensor x, OptionalTensor finished, int64_t k, int64_t renorm, bool wants_scores,
                             at::Tensor weights, at::Tensor expert_ids, OptionalTensor scores_out) {
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

// Returns physical expert ids. Row e of the table has the number of replicas of logical expert e, their physical ids,
// and padding.
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

Plan update_expert(at::Tensor expert_ids, at::Tensor table, OptionalTensor scales, OptionalTensor threshold,
                   OptionalTensor active_mask, int64_t rank, int64_t world_size, int64_t balance_mode,
                   at::Tensor physical_ids, at::Tensor mask) {
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
ACLNN_OP(aclnnMoeGatingTopKV2, gating_top_k_v2);
ACLNN_OP(aclnnMoeGatingTopKSoftmax, gating_top_k_softmax);
ACLNN_OP(aclnnMoeGatingTopKSoftmaxV2, gating_top_k_softmax_v2);
ACLNN_OP(aclnnMoeUpdateExpert, update_expert);

}  // namespace vllm_npu::emulator::aclnn
