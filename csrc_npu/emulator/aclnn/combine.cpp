// Combine: the experts' rows go back to their tokens and are added up.
#include "distribute.h"
#include "distribute_limits.h"
#include "exchange.h"
#include "numerics.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kNoQuant = 0;
constexpr int64_t kInt8Groups = 2;
constexpr int64_t kInt8Group = 8;

using OptionalTensor = std::optional<at::Tensor>;

struct Combine {
  std::string version;
  Placement place;
  SpecialExperts special;
  at::Tensor expand_x;       // [A, H]: the experts' output
  at::Tensor expert_ids;     // [B, K] int32
  at::Tensor combine_index;  // version 1: expand_idx; else assist_info_for_combine
  at::Tensor send_counts;    // dispatch's ep_recv_counts
  at::Tensor weights;        // [B, K] float32
  OptionalTensor mask;
  OptionalTensor shared_expert_x;  // [B, H]: added as it is
  OptionalTensor original_x;       // [B, H], for copy and constant experts
  OptionalTensor constant_alpha_1;
  OptionalTensor constant_alpha_2;
  OptionalTensor constant_value;  // [constant experts, H]
  int64_t comm_quant_mode;
  at::Tensor out;

  int64_t num_tokens() const { return expert_ids.size(0); }
  int64_t top_k() const { return expert_ids.size(1); }
  int64_t width() const { return expand_x.size(1); }
};

// What goes back to one rank.
enum Field { kToken, kTopK, kRows };

std::vector<Message> outgoing(const Combine& op, const PendingDispatch& dispatch) {
  at::Tensor rows = op.expand_x.narrow(0, 0, dispatch.sources.size(0));
  if (op.comm_quant_mode == kInt8Groups) rows = through_int8_groups(rows);
  std::vector<Message> messages;
  for (int64_t receiver = 0; receiver < op.place.world_size; ++receiver) {
    const at::Tensor index = (dispatch.sources.select(1, 0) == receiver).nonzero().squeeze(-1);
    const at::Tensor sources = dispatch.sources.index_select(0, index);
    messages.push_back({sources.select(1, 1), sources.select(1, 2), rows.index_select(0, index)});
  }
  return messages;
}

// [B, K + shared experts, H] float32: what came back for each pair; NaN where nothing did.
at::Tensor returned_rows(const Combine& op, const std::vector<Message>& received) {
  at::Tensor rows = at::empty({op.num_tokens(), op.top_k() + op.place.shared_experts, op.width()}, at::kFloat);
  fill_undefined(rows);
  for (const Message& message : received) {
    rows.index_put_({message[kToken], message[kTopK]}, message[kRows].to(at::kFloat));
  }
  return rows;
}

// What constant experts give: alpha_1 * x + alpha_2 * v. Rows whose id is of another kind hold nothing of use.
at::Tensor constant_rows(const Combine& op, const at::Tensor& x, const at::Tensor& ids) {
  const int64_t first = op.place.moe_experts + op.special.zero + op.special.copy;
  const at::Tensor index = (ids - first).clamp(0, op.special.constant - 1);
  const auto coefficient = [&](const at::Tensor& alpha) {
    return alpha.to(at::kFloat).index_select(0, index).unsqueeze(-1);
  };
  return x * coefficient(*op.constant_alpha_1) +
         op.constant_value->to(at::kFloat).index_select(0, index) * coefficient(*op.constant_alpha_2);
}

// float32, k ascending, a multiply and an add rounded apart; then the shared experts, unweighted.
void add_up(const Combine& op, const at::Tensor& rows, const at::Tensor& active) {
  const int64_t zero = op.place.moe_experts;
  const int64_t copy = zero + op.special.zero;
  const int64_t constant = copy + op.special.copy;
  const at::Tensor x = op.original_x ? op.original_x->to(at::kFloat) : at::Tensor();
  at::Tensor total = at::zeros({op.num_tokens(), op.width()}, at::kFloat);
  for (int64_t k = 0; k < op.top_k(); ++k) {
    const at::Tensor ids = op.expert_ids.select(1, k).to(at::kLong);
    const at::Tensor weight = op.weights.select(1, k).unsqueeze(-1);
    const auto add = [&](const at::Tensor& chosen, const at::Tensor& addend) {
      const at::Tensor here = chosen.logical_and(active.select(1, k)).unsqueeze(-1);
      total = at::where(here, total + addend * weight, total);
    };
    add(ids < zero, rows.select(1, k));
    if (op.special.copy > 0) add((ids >= copy).logical_and(ids < constant), x);
    if (op.special.constant > 0) add(ids >= constant, constant_rows(op, x, ids));
  }
  for (int64_t shared = 0; shared < op.place.shared_experts; ++shared) {
    total = total + rows.select(1, op.top_k() + shared);
  }
  if (op.shared_expert_x) total = total + op.shared_expert_x->reshape(total.sizes()).to(at::kFloat);
  fill_undefined(op.out);
  const at::Tensor tokens = active.any(-1).nonzero().squeeze(-1);
  op.out.index_copy_(0, tokens, total.index_select(0, tokens).to(op.out.scalar_type()));
}

void check_special(const Combine& op) {
  require(op.special.zero >= 0 && op.special.copy >= 0 && op.special.constant >= 0,
          "zero_expert_num, copy_expert_num and const_expert_num must not be negative");
  const std::vector<int64_t> like_out{op.num_tokens(), op.width()};
  const auto check = [&](const OptionalTensor& tensor, const char* name, bool is_needed, at::IntArrayRef sizes) {
    if (!is_needed) return require_absent(tensor, name, "there are no experts that use it");
    if (!tensor)
      refuse(Code::kMissing, name, " is missing: copy_expert_num=", op.special.copy,
             " and const_expert_num=", op.special.constant, " need it");
    require_shape(*tensor, name, sizes);
    require_dtype(*tensor, name, {op.expand_x.scalar_type()});
  };
  const bool constants = op.special.constant > 0;
  check(op.original_x, "ori_x", constants || op.special.copy > 0, like_out);
  check(op.constant_alpha_1, "const_expert_alpha_1", constants, {op.special.constant});
  check(op.constant_alpha_2, "const_expert_alpha_2", constants, {op.special.constant});
  check(op.constant_value, "const_expert_v", constants, {op.special.constant, op.width()});
}

void check(const Combine& op) {
  require_dimensions(op.expand_x, "expand_x", 2);
  require_dtype(op.expand_x, "expand_x", {at::kHalf, at::kBFloat16});
  require_dimensions(op.expert_ids, "expert_ids", 2);
  require_dtype(op.expert_ids, "expert_ids", {at::kInt});
  require_dtype(op.combine_index, "assist_info_for_combine", {at::kInt});
  require_dtype(op.send_counts, "ep_send_counts", {at::kInt});
  require_dtype(op.weights, "expert_scales", {at::kFloat});
  require_shape(op.weights, "expert_scales", op.expert_ids.sizes());
  check_mask(op.expert_ids, op.mask);
  check_special(op);
  if (op.shared_expert_x) {
    require_dtype(*op.shared_expert_x, "shared_expert_x", {op.expand_x.scalar_type()});
    require(op.shared_expert_x->numel() == op.num_tokens() * op.width(), "shared_expert_x has the shape ",
            op.shared_expert_x->sizes(), "; it must have ", op.num_tokens(), " rows of ", op.width());
  }
  require_one_of(op.comm_quant_mode, "comm_quant_mode", {kNoQuant, kInt8Groups});
  require(op.comm_quant_mode == kNoQuant || op.width() % kInt8Group == 0, "comm_quant_mode=2 needs H=", op.width(),
          " to be a multiple of ", kInt8Group);
  check_limits({op.version == "1", op.place.world_size, std::max(op.num_tokens(), op.place.max_tokens()), op.width(),
                op.place.moe_experts, op.place.experts_per_rank(), op.top_k()});
}

Plan plan(const Combine& op) {
  check(op);
  const std::string agreed =
      c10::str("version=", op.version, " K=", op.top_k(), " H=", op.width(), " dtype=", op.expand_x.scalar_type(),
               " experts=", op.place.moe_experts, " shared=", op.place.shared_experts, "/", op.place.shared_ranks,
               " special=", op.special.zero, "/", op.special.copy, "/", op.special.constant,
               " comm_quant_mode=", op.comm_quant_mode, " global_bs=", op.place.global_bs);
  const ExchangeCall call{op.place.group, op.place.world_size, op.place.rank, "MoeDistributeCombine", agreed};
  return [op, call] {
    at::Tensor active;
    const std::vector<Message> received = exchange(call, [&] {
      active = active_pairs(op.expert_ids, op.mask);
      const PendingDispatch dispatch =
          take_dispatch(op.place.group, op.version, op.expert_ids, active, op.combine_index, op.send_counts);
      require(op.expand_x.size(0) >= dispatch.sources.size(0), "expand_x has ", op.expand_x.size(0),
              " rows and the dispatch gave ", dispatch.sources.size(0));
      return outgoing(op, dispatch);
    });
    add_up(op, returned_rows(op, received), active);
  };
}

// What combine's later versions have for a quantised expand_x, which no version of the op honours yet.
void check_reserved(const OptionalTensor& activation_scale, const OptionalTensor& weight_scale,
                    const OptionalTensor& group_list, int64_t out_dtype, int64_t group_list_type) {
  const char* reason = "it is reserved";
  require_absent(activation_scale, "activation_scale", reason);
  require_absent(weight_scale, "weight_scale", reason);
  require_absent(group_list, "group_list", reason);
  require_one_of(out_dtype, "out_dtype", {0});
  require_one_of(group_list_type, "group_list_type", {0});
}

// tp_send_counts and expand_scales are dispatch's own outputs, for tensor parallelism and the hierarchical algorithm.
Plan combine_v4(at::Tensor expand_x, at::Tensor expert_ids, at::Tensor assist_info, at::Tensor ep_send_counts,
                at::Tensor expert_scales, OptionalTensor /*tp_send_counts*/, OptionalTensor mask,
                OptionalTensor activation_scale, OptionalTensor weight_scale, OptionalTensor group_list,
                OptionalTensor /*expand_scales*/, OptionalTensor shared_expert_x, OptionalTensor elastic_info,
                OptionalTensor ori_x, OptionalTensor const_expert_alpha_1, OptionalTensor const_expert_alpha_2,
                OptionalTensor const_expert_v, OptionalTensor performance_info, std::string group_ep,
                int64_t ep_world_size, int64_t ep_rank_id, int64_t moe_expert_num, std::string /*group_tp*/,
                int64_t tp_world_size, int64_t /*tp_rank_id*/, int64_t expert_shard_type, int64_t shared_expert_num,
                int64_t shared_expert_rank_num, int64_t global_bs, int64_t out_dtype, int64_t comm_quant_mode,
                int64_t group_list_type, std::string comm_alg, int64_t zero_expert_num, int64_t copy_expert_num,
                int64_t const_expert_num, at::Tensor out) {
  check_reserved(activation_scale, weight_scale, group_list, out_dtype, group_list_type);
  const Placement place =
      make_placement(group_ep, ep_world_size, ep_rank_id, moe_expert_num, shared_expert_num, shared_expert_rank_num,
                     global_bs, {tp_world_size, expert_shard_type, elastic_info, performance_info, comm_alg});
  return plan({"2",
               place,
               {zero_expert_num, copy_expert_num, const_expert_num},
               expand_x,
               expert_ids,
               assist_info,
               ep_send_counts,
               expert_scales,
               mask,
               shared_expert_x,
               ori_x,
               const_expert_alpha_1,
               const_expert_alpha_2,
               const_expert_v,
               comm_quant_mode,
               out});
}

Plan combine_v3(at::Tensor expand_x, at::Tensor expert_ids, at::Tensor assist_info, at::Tensor ep_send_counts,
                at::Tensor expert_scales, OptionalTensor tp_send_counts, OptionalTensor mask,
                OptionalTensor activation_scale, OptionalTensor weight_scale, OptionalTensor group_list,
                OptionalTensor expand_scales, OptionalTensor shared_expert_x, OptionalTensor elastic_info,
                OptionalTensor ori_x, OptionalTensor const_expert_alpha_1, OptionalTensor const_expert_alpha_2,
                OptionalTensor const_expert_v, std::string group_ep, int64_t ep_world_size, int64_t ep_rank_id,
                int64_t moe_expert_num, std::string group_tp, int64_t tp_world_size, int64_t tp_rank_id,
                int64_t expert_shard_type, int64_t shared_expert_num, int64_t shared_expert_rank_num, int64_t global_bs,
                int64_t out_dtype, int64_t comm_quant_mode, int64_t group_list_type, std::string comm_alg,
                int64_t zero_expert_num, int64_t copy_expert_num, int64_t const_expert_num, at::Tensor out) {
  return combine_v4(expand_x, expert_ids, assist_info, ep_send_counts, expert_scales, tp_send_counts, mask,
                    activation_scale, weight_scale, group_list, expand_scales, shared_expert_x, elastic_info, ori_x,
                    const_expert_alpha_1, const_expert_alpha_2, const_expert_v, /*performance_info=*/std::nullopt,
                    group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size, tp_rank_id,
                    expert_shard_type, shared_expert_num, shared_expert_rank_num, global_bs, out_dtype, comm_quant_mode,
                    group_list_type, comm_alg, zero_expert_num, copy_expert_num, const_expert_num, out);
}

Plan combine_v2(at::Tensor expand_x, at::Tensor expert_ids, at::Tensor assist_info, at::Tensor ep_send_counts,
                at::Tensor expert_scales, OptionalTensor tp_send_counts, OptionalTensor mask,
                OptionalTensor activation_scale, OptionalTensor weight_scale, OptionalTensor group_list,
                OptionalTensor expand_scales, OptionalTensor shared_expert_x, std::string group_ep,
                int64_t ep_world_size, int64_t ep_rank_id, int64_t moe_expert_num, std::string group_tp,
                int64_t tp_world_size, int64_t tp_rank_id, int64_t expert_shard_type, int64_t shared_expert_num,
                int64_t shared_expert_rank_num, int64_t global_bs, int64_t out_dtype, int64_t comm_quant_mode,
                int64_t group_list_type, std::string comm_alg, at::Tensor out) {
  return combine_v3(expand_x, expert_ids, assist_info, ep_send_counts, expert_scales, tp_send_counts, mask,
                    activation_scale, weight_scale, group_list, expand_scales, shared_expert_x, {}, {}, {}, {}, {},
                    group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size, tp_rank_id,
                    expert_shard_type, shared_expert_num, shared_expert_rank_num, global_bs, out_dtype, comm_quant_mode,
                    group_list_type, comm_alg, 0, 0, 0, out);
}

Plan combine_v1(at::Tensor expand_x, at::Tensor expert_ids, at::Tensor expand_idx, at::Tensor ep_send_counts,
                at::Tensor expert_scales, OptionalTensor /*tp_send_counts*/, OptionalTensor mask,
                OptionalTensor activation_scale, OptionalTensor weight_scale, OptionalTensor group_list,
                OptionalTensor /*expand_scales*/, std::string group_ep, int64_t ep_world_size, int64_t ep_rank_id,
                int64_t moe_expert_num, std::string /*group_tp*/, int64_t tp_world_size, int64_t /*tp_rank_id*/,
                int64_t expert_shard_type, int64_t shared_expert_num, int64_t shared_expert_rank_num, int64_t global_bs,
                int64_t out_dtype, int64_t comm_quant_mode, int64_t group_list_type, at::Tensor out) {
  check_reserved(activation_scale, weight_scale, group_list, out_dtype, group_list_type);
  const Placement place =
      make_placement(group_ep, ep_world_size, ep_rank_id, moe_expert_num, shared_expert_num, shared_expert_rank_num,
                     global_bs, {tp_world_size, expert_shard_type, std::nullopt, std::nullopt, ""});
  return plan({"1",
               place,
               {0, 0, 0},
               expand_x,
               expert_ids,
               expand_idx,
               ep_send_counts,
               expert_scales,
               mask,
               std::nullopt,
               std::nullopt,
               std::nullopt,
               std::nullopt,
               std::nullopt,
               comm_quant_mode,
               out});
}

}  // namespace

ACLNN_OP(aclnnMoeDistributeCombine, combine_v1);
ACLNN_OP(aclnnMoeDistributeCombineV2, combine_v2);
ACLNN_OP(aclnnMoeDistributeCombineV3, combine_v3);
ACLNN_OP(aclnnMoeDistributeCombineV4, combine_v4);

}  // namespace vllm_npu::emulator::aclnn
