// Dispatch: sends the row of each active token to the ranks of its experts.
#include <algorithm>

#include "distribute.h"
#include "distribute_limits.h"
#include "exchange.h"
#include "numerics.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kNoQuant = 0;
constexpr int64_t kDynamicQuant = 2;
constexpr int64_t kCumsum = 0;
constexpr int64_t kCount = 1;

struct Inputs {
  at::Tensor x;                  // [B, H]
  at::Tensor expert_ids;         // [B, K] int32
  OptionalTensor smooth_scales;  // [shared experts + routed experts, H] float32
  OptionalTensor mask;           // [B] or [B, K] bool
  OptionalTensor weights;        // [B, K] float32

  using Fields = std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

struct Outputs {
  at::Tensor expand_x;
  at::Tensor dynamic_scales;
  at::Tensor combine_index;  // version 1: expand_idx; else assist_info_for_combine
  at::Tensor expert_token_nums;
  at::Tensor recv_counts;
  OptionalTensor tp_recv_counts;
  OptionalTensor expand_scales;

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, OptionalTensor, OptionalTensor>;
};

struct Dispatch : Inputs, Outputs {
  std::string version;  // "1", or "2" for all later versions
  Placement place;
  SpecialExperts special;
  int64_t quant_mode;
  int64_t token_nums_type;

  int64_t num_tokens() const { return expert_ids.size(0); }
  int64_t top_k() const { return expert_ids.size(1); }
};

// The tensors of a message to one rank. They have a row for each pair of a token and an expert, in the order of the
// tokens.
enum Field { kSlot, kToken, kTopK, kValues, kScales, kWeights, kTokensAndMask };

// Makes one message. For each pair, `slots` has the receiver's local expert and `smooth` the row of smooth_scales.
Message rows_for_rank(const Dispatch& op, const at::Tensor& slots, const at::Tensor& tokens, const at::Tensor& ks,
                      const at::Tensor& smooth) {
  const at::Tensor rows = op.x.index_select(0, tokens);
  Quantized sent{rows, at::empty({0})};
  if (op.quant_mode == kDynamicQuant) {
    at::Tensor values = rows.to(at::kFloat);
    if (op.smooth_scales) values = values * op.smooth_scales->index_select(0, smooth);
    sent = quantize_by_product(values);
  }
  at::Tensor weights = at::ones({tokens.size(0)}, at::kFloat);
  if (op.weights) {
    const at::Tensor routed = op.weights->index({tokens, ks.clamp_max(op.top_k() - 1)});
    weights = at::where(ks < op.top_k(), routed, weights);
  }
  const at::Tensor facts = at::tensor({op.num_tokens(), static_cast<int64_t>(op.mask.has_value())});
  return {slots, tokens, ks, sent.values, sent.scales, weights, facts};
}

Message routed_rows(const Dispatch& op, const at::Tensor& active, int64_t receiver) {
  const Placement& place = op.place;
  const at::Tensor ids = op.expert_ids.to(at::kLong).flatten();
  const int64_t first_expert = (receiver - place.shared_ranks) * place.experts_per_rank();
  const at::Tensor here =
      active.flatten().logical_and(ids >= first_expert).logical_and(ids < first_expert + place.experts_per_rank());
  const at::Tensor pairs = here.nonzero().squeeze(-1);
  const at::Tensor experts = ids.index_select(0, pairs);
  // In version 1, all shared experts have one row of scales together.
  const int64_t first_smooth = op.version == "1" ? static_cast<int64_t>(place.shared_ranks > 0) : place.shared_experts;
  return rows_for_rank(op, experts - first_expert, pairs.floor_divide(op.top_k()), pairs.remainder(op.top_k()),
                       experts + first_smooth);
}

Message shared_rows(const Dispatch& op, const at::Tensor& active, int64_t receiver) {
  const Placement& place = op.place;
  const int64_t shared = receiver / (place.shared_ranks / place.shared_experts);
  const bool serves_this_rank = place.shared_rank(shared) == receiver;
  const at::Tensor tokens = serves_this_rank ? active.any(-1).nonzero().squeeze(-1) : at::empty({0}, at::kLong);
  return rows_for_rank(op, at::zeros_like(tokens), tokens, at::full_like(tokens, op.top_k() + shared),
                       at::full_like(tokens, shared));
}

std::vector<Message> outgoing(const Dispatch& op, const at::Tensor& active) {
  check_ids(op.expert_ids, active, op.place.moe_experts + op.special.total());
  std::vector<Message> messages;
  for (int64_t receiver = 0; receiver < op.place.world_size; ++receiver) {
    messages.push_back(receiver < op.place.shared_ranks ? shared_rows(op, active, receiver)
                                                        : routed_rows(op, active, receiver));
  }
  return messages;
}

// With a mask, all ranks must have the same number of tokens. No rank may have more tokens than global_bs allows.
void check_tokens_of_ranks(const Dispatch& op, const std::vector<Message>& received) {
  std::vector<int64_t> tokens;
  bool any_mask = false;
  for (const Message& message : received) {
    tokens.push_back(message[kTokensAndMask][0].item<int64_t>());
    any_mask = any_mask || message[kTokensAndMask][1].item<bool>();
  }
  const auto [least, most] = std::minmax_element(tokens.begin(), tokens.end());
  require(*least == *most || !op.place.is_hierarchical() || current_soc().family == Family::kA2,
          "comm_alg=hierarchy on ", current_soc().name,
          " needs the same number of tokens on all ranks; the ranks have ", at::IntArrayRef(tokens));
  require(*least == *most || !any_mask, "x_active_mask needs the same number of tokens on all ranks; the ranks have ",
          at::IntArrayRef(tokens));
  require(*most <= op.place.max_tokens(), "global_bs=", op.place.global_bs, " allows ", op.place.max_tokens(),
          " tokens a rank; the ranks have ", at::IntArrayRef(tokens));
}

at::Tensor joined(const std::vector<Message>& received, Field field) {
  std::vector<at::Tensor> parts;
  for (const Message& message : received) parts.push_back(message[field]);
  return at::cat(parts);
}

// The third output of version 1. For each pair, it counts the earlier pairs of this rank that go to the same expert.
at::Tensor ordinals(const at::Tensor& expert_ids, const at::Tensor& active) {
  const at::Tensor ids = at::where(active, expert_ids.to(at::kLong), -1).flatten();
  const at::Tensor order = at::argsort(ids, /*stable=*/true, 0, /*descending=*/false);
  const at::Tensor sorted = ids.index_select(0, order);
  const at::Tensor position = at::arange(ids.numel()) - at::searchsorted(sorted, sorted);
  return at::empty_like(ids).index_copy_(0, order, position).to(at::kInt);
}

// Writes the outputs. Rows are ordered by local expert, then source rank, then token.
void assemble(const Dispatch& op, const std::vector<Message>& received, const at::Tensor& active) {
  const int64_t world_size = op.place.world_size;
  const int64_t num_local = op.place.num_local_experts();
  std::vector<at::Tensor> ranks;
  for (int64_t source = 0; source < world_size; ++source) {
    ranks.push_back(at::full({received[source][kSlot].size(0)}, source, at::kLong));
  }
  const at::Tensor slots = joined(received, kSlot);
  const at::Tensor sources = at::cat(ranks);
  const at::Tensor order = at::argsort(slots, /*stable=*/true, 0, /*descending=*/false);
  require(order.size(0) <= op.expand_x.size(0), "expand_x has ", op.expand_x.size(0), " rows and ", order.size(0),
          " arrived; global_bs=", op.place.global_bs, " is too small");
  write_front(op.expand_x, joined(received, kValues).index_select(0, order));
  if (op.quant_mode == kDynamicQuant)
    write_front(op.dynamic_scales, joined(received, kScales).index_select(0, order));
  else
    fill_undefined(op.dynamic_scales);
  if (op.expand_scales) {
    if (op.weights)
      write_front(*op.expand_scales, joined(received, kWeights).index_select(0, order));
    else
      fill_undefined(*op.expand_scales);
  }
  if (op.tp_recv_counts) fill_undefined(*op.tp_recv_counts);

  const at::Tensor counts = at::bincount(slots * world_size + sources, {}, num_local * world_size);
  const at::Tensor recv_counts = counts.cumsum(0).to(at::kInt);
  write_front(op.recv_counts, recv_counts);
  const at::Tensor token_nums = counts.view({num_local, world_size}).sum(1);
  op.expert_token_nums.copy_(op.token_nums_type == kCount ? token_nums : token_nums.cumsum(0));

  const at::Tensor triples =
      at::stack({sources, joined(received, kToken), joined(received, kTopK)}, 1).index_select(0, order);
  const at::Tensor index = op.version == "1" ? ordinals(op.expert_ids, active) : triples.flatten().to(at::kInt);
  write_front(op.combine_index, index);
  remember_dispatch(op.place.group, {op.version, op.expert_ids.clone(), active, triples, recv_counts, index});
}

void check_shapes(const Dispatch& op) {
  require_dimensions(op.x, "x", 2);
  require_dtype(op.x, "x", {at::kHalf, at::kBFloat16});
  require_dimensions(op.expert_ids, "expert_ids", 2);
  require_dtype(op.expert_ids, "expert_ids", {at::kInt});
  require(op.x.size(0) == op.num_tokens(), "x has ", op.x.size(0), " rows and expert_ids has ", op.num_tokens());
  check_mask(op.place, op.expert_ids, op.mask);
  require(!op.mask || op.version != "1", "x_active_mask is given, but version 1 of the op takes none");
  if (op.place.is_hierarchical()) {
    if (!op.weights) refuse(Code::kMissing, "expert_scales is missing: comm_alg=hierarchy needs it");
    require(!op.smooth_scales || current_soc().family != Family::kA2, "scales is given, but comm_alg=hierarchy on ",
            current_soc().name, " takes none");
  }
  if (op.weights) {
    require_dtype(*op.weights, "expert_scales", {at::kFloat});
    require_shape(*op.weights, "expert_scales", op.expert_ids.sizes());
  }
}

void check(const Dispatch& op) {
  check_shapes(op);
  require_one_of(op.quant_mode, "quant_mode", {kNoQuant, kDynamicQuant});
  require_one_of(op.token_nums_type, "expert_token_nums_type", {kCumsum, kCount});
  check_special(op.place, op.special);
  if (op.smooth_scales) {
    require(op.quant_mode == kDynamicQuant, "scales is given, but quant_mode=", op.quant_mode, " uses none");
    const int64_t shared_rows =
        op.version == "1" ? static_cast<int64_t>(op.place.shared_ranks > 0) : op.place.shared_experts;
    require_dtype(*op.smooth_scales, "scales", {at::kFloat});
    require_shape(*op.smooth_scales, "scales", {shared_rows + op.place.moe_experts, op.x.size(1)});
  }
  require_dtype(op.expand_x, "y_dtype", {op.quant_mode == kNoQuant ? op.x.scalar_type() : at::kChar});
  check_limits(op.place, op.version == "1", op.num_tokens(), op.x.size(1), op.top_k());
}

Plan plan(const Dispatch& op) {
  check(op);
  trace("MoeDistributeDispatch", "comm_alg=%s quant_mode=%d", op.place.comm_alg.c_str(),
        static_cast<int>(op.quant_mode));
  const std::string agreed =
      agreed_facts(op.version, op.place, op.special, op.top_k(), op.x.size(1), op.x.scalar_type()) +
      c10::str(" quant_mode=", op.quant_mode);
  const ExchangeCall call{op.place.group, op.place.world_size, op.place.rank, "MoeDistributeDispatch", agreed};
  return [op, call] {
    at::Tensor active;
    const std::vector<Message> received = exchange(call, [&] {
      active = active_pairs(op.expert_ids, op.mask);
      return outgoing(op, active);
    });
    check_tokens_of_ranks(op, received);
    assemble(op, received, active);
  };
}

Plan dispatch_v4(Inputs inputs, OptionalTensor elastic_info, OptionalTensor performance_info, Members members,
                 int64_t quant_mode, int64_t global_bs, int64_t expert_token_nums_type, std::string comm_alg,
                 SpecialExperts special, Outputs outputs) {
  const Placement place = make_placement(members, global_bs, comm_alg, elastic_info, performance_info);
  return plan({inputs, outputs, "2", place, special, quant_mode, expert_token_nums_type});
}

Plan dispatch_v3(Inputs inputs, OptionalTensor elastic_info, Members members, int64_t quant_mode, int64_t global_bs,
                 int64_t expert_token_nums_type, std::string comm_alg, SpecialExperts special, Outputs outputs) {
  return dispatch_v4(inputs, elastic_info, /*performance_info=*/std::nullopt, members, quant_mode, global_bs,
                     expert_token_nums_type, comm_alg, special, outputs);
}

Plan dispatch_v2(Inputs inputs, Members members, int64_t quant_mode, int64_t global_bs, int64_t expert_token_nums_type,
                 std::string comm_alg, Outputs outputs) {
  return dispatch_v3(inputs, /*elastic_info=*/std::nullopt, members, quant_mode, global_bs, expert_token_nums_type,
                     comm_alg, {0, 0, 0}, outputs);
}

Plan dispatch_v1(Inputs inputs, Members members, int64_t quant_mode, int64_t global_bs, int64_t expert_token_nums_type,
                 Outputs outputs) {
  return plan(
      {inputs, outputs, "1", make_placement(members, global_bs), {0, 0, 0}, quant_mode, expert_token_nums_type});
}

}  // namespace

ACLNN_OP(aclnnMoeDistributeDispatch, dispatch_v1);
ACLNN_OP(aclnnMoeDistributeDispatchV2, dispatch_v2);
ACLNN_OP(aclnnMoeDistributeDispatchV3, dispatch_v3);
ACLNN_OP(aclnnMoeDistributeDispatchV4, dispatch_v4);

}  // namespace vllm_npu::emulator::aclnn
