// Combine: sends the experts' rows back to the ranks of their tokens and adds them up for each token.
#include "distribute.h"
#include "distribute_limits.h"
#include "exchange.h"
#include "numerics.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kNoQuant = 0;
constexpr int64_t kInt8Groups = 2;

struct Inputs {
  at::Tensor expand_x;       // [A, H]: the experts' output
  at::Tensor expert_ids;     // [B, K] int32
  at::Tensor combine_index;  // version 1: expand_idx; else assist_info_for_combine
  at::Tensor send_counts;    // dispatch's ep_recv_counts
  at::Tensor weights;        // [B, K] float32

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};

struct Options {
  OptionalTensor tp_send_counts;  // dispatch's output, for tensor parallelism; not read
  OptionalTensor mask;
  OptionalTensor activation_scale;  // with the next two, for a quantised expand_x, which no version supports yet
  OptionalTensor weight_scale;
  OptionalTensor group_list;
  OptionalTensor expand_scales;  // dispatch's output; the hierarchy needs it and does not read it

  using Fields =
      std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

struct Constants {
  OptionalTensor original_x;  // [B, H], for copy and constant experts
  OptionalTensor alpha_1;
  OptionalTensor alpha_2;
  OptionalTensor value;  // [constant experts, H]

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

struct Modes {
  int64_t global_bs;
  int64_t out_dtype;
  int64_t comm_quant_mode;
  int64_t group_list_type;

  using Fields = std::tuple<int64_t, int64_t, int64_t, int64_t>;
};

// Writes the outputs. `total` [B, H] float32 has the sum of each token's rows, and is defined only for active tokens.
// `active` is [B] bool.
using Finish = std::function<void(const at::Tensor& total, const at::Tensor& active)>;

struct Combine : Inputs, Options {
  std::string version;
  Placement place;
  SpecialExperts special;
  Constants constants;
  OptionalTensor shared_expert_x;  // [B, H]: added without a weight
  int64_t comm_quant_mode;
  Finish finish;

  int64_t num_tokens() const { return expert_ids.size(0); }
  int64_t top_k() const { return expert_ids.size(1); }
  int64_t width() const { return expand_x.size(1); }
};

// The tensors of a message to one rank.
enum Field { kToken, kTopK, kRows };

std::vector<Message> outgoing(const Combine& op, const PendingDispatch& dispatch) {
  at::Tensor rows = op.expand_x.narrow(0, 0, dispatch.sources.size(0));
  // The hierarchy quantises the sums of servers instead.
  if (op.comm_quant_mode == kInt8Groups && !op.place.is_hierarchical()) rows = through_int8_groups(rows);
  std::vector<Message> messages;
  for (int64_t receiver = 0; receiver < op.place.world_size; ++receiver) {
    const at::Tensor index = (dispatch.sources.select(1, 0) == receiver).nonzero().squeeze(-1);
    const at::Tensor sources = dispatch.sources.index_select(0, index);
    messages.push_back({sources.select(1, 1), sources.select(1, 2), rows.index_select(0, index)});
  }
  return messages;
}

// Returns the row that came back for each pair, [B, K + shared experts, H] float32. Pairs without a row are undefined.
at::Tensor returned_rows(const Combine& op, const std::vector<Message>& received) {
  at::Tensor rows = at::empty({op.num_tokens(), op.top_k() + op.place.shared_experts, op.width()}, at::kFloat);
  fill_undefined(rows);
  for (const Message& message : received) {
    rows.index_put_({message[kToken], message[kTopK]}, message[kRows].to(at::kFloat));
  }
  return rows;
}

// Returns the output of constant experts, alpha_1 * x + alpha_2 * v. Ignore the rows of ids of other experts.
at::Tensor constant_rows(const Combine& op, const at::Tensor& x, const at::Tensor& ids) {
  const int64_t first = op.place.moe_experts + op.special.zero + op.special.copy;
  const at::Tensor index = (ids - first).clamp(0, op.special.constant - 1);
  const auto coefficient = [&](const at::Tensor& alpha) {
    return alpha.to(at::kFloat).index_select(0, index).unsqueeze(-1);
  };
  return x * coefficient(*op.constants.alpha_1) +
         op.constants.value->to(at::kFloat).index_select(0, index) * coefficient(*op.constants.alpha_2);
}

// Adds the rows of each server in float32, by ascending expert id, and rounds after the multiply and after the add. The
// sums of the servers are rounded to the rows' type, or go through int8, and are added up: in float32, but int8 sums of
// float16 in float16. Source: the golden script of A2's combine. No document states this for A3.
at::Tensor sum_by_server(const Combine& op, const at::Tensor& rows, const at::Tensor& active) {
  constexpr int64_t kRanksOfServer = 8;
  const at::ScalarType type = op.expand_x.scalar_type();
  const bool is_quantised = op.comm_quant_mode == kInt8Groups;
  const at::Tensor ids = op.expert_ids.to(at::kLong);
  const at::Tensor order = at::argsort(ids, /*stable=*/true, -1, /*descending=*/false);
  const at::Tensor owners = ids.gather(1, order).floor_divide(op.place.experts_per_rank());
  const at::Tensor weights = op.weights.gather(1, order).unsqueeze(-1);
  const at::Tensor chosen = active.gather(1, order);
  const at::Tensor ordered = rows.gather(1, order.unsqueeze(-1).expand({-1, -1, op.width()}));
  at::Tensor total = at::zeros({op.num_tokens(), op.width()}, at::kFloat);
  for (int64_t first = 0; first < op.place.world_size; first += kRanksOfServer) {
    at::Tensor partial = at::zeros_like(total);
    for (int64_t k = 0; k < op.top_k(); ++k) {
      const at::Tensor owner = owners.select(1, k);
      const at::Tensor here = (owner >= first).logical_and(owner < first + kRanksOfServer);
      const at::Tensor addend = ordered.select(1, k) * weights.select(1, k);
      partial = at::where(here.logical_and(chosen.select(1, k)).unsqueeze(-1), partial + addend, partial);
    }
    total = total + (is_quantised ? sums_through_int8(partial, type) : partial.to(type).to(at::kFloat));
    if (is_quantised && type == at::kHalf) total = total.to(at::kHalf).to(at::kFloat);
  }
  return total;
}

// Adds in float32 with k ascending, and rounds after the multiply and after the add. Then adds the shared experts
// without weights.
at::Tensor sum_of_rows(const Combine& op, const at::Tensor& rows, const at::Tensor& active) {
  const int64_t zero = op.place.moe_experts;
  const int64_t copy = zero + op.special.zero;
  const int64_t constant = copy + op.special.copy;
  const at::Tensor x = op.constants.original_x ? op.constants.original_x->to(at::kFloat) : at::Tensor();
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
  return total;
}

// Writes the rows of active tokens. The rows of inactive tokens become undefined.
void write_active(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& active) {
  fill_undefined(out);
  const at::Tensor tokens = active.nonzero().squeeze(-1);
  const at::Tensor written = rows.index_select(0, tokens).to(out.scalar_type());
  out.view(rows.sizes()).index_copy_(0, tokens, written);
}

void check_constants(const Combine& op) {
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
  check(op.constants.original_x, "ori_x", constants || op.special.copy > 0, like_out);
  check(op.constants.alpha_1, "const_expert_alpha_1", constants, {op.special.constant});
  check(op.constants.alpha_2, "const_expert_alpha_2", constants, {op.special.constant});
  check(op.constants.value, "const_expert_v", constants, {op.special.constant, op.width()});
}

void check_int8_groups(const Combine& op) {
  const bool is_a2 = current_soc().family == Family::kA2;
  require(!is_a2 || op.place.is_hierarchical(), "comm_quant_mode=2: ", current_soc().name,
          " takes it with comm_alg=hierarchy only");
  require(is_a2 || !op.place.is_hierarchical(), "comm_quant_mode=2 with comm_alg=hierarchy is not emulated on ",
          current_soc().name);
  const int64_t group = op.place.is_hierarchical() ? int8_group_of_sums(op.expand_x.scalar_type()) : kInt8Group;
  require(op.width() % group == 0, "comm_quant_mode=2 needs H=", op.width(), " to be a multiple of ", group);
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
  check_mask(op.place, op.expert_ids, op.mask);
  require(!op.mask || op.version != "1", "x_active_mask is given, but version 1 of the op takes none");
  check_special(op.place, op.special);
  check_constants(op);
  if (op.shared_expert_x) {
    require(current_soc().family != Family::kA2, "shared_expert_x is given, but ", current_soc().name, " takes none");
    require(op.place.shared_ranks == 0, "shared_expert_x is given, but shared_expert_rank_num=", op.place.shared_ranks,
            " is not 0");
    require_dtype(*op.shared_expert_x, "shared_expert_x", {op.expand_x.scalar_type()});
    require(op.shared_expert_x->numel() == op.num_tokens() * op.width(), "shared_expert_x has the shape ",
            op.shared_expert_x->sizes(), "; it must have ", op.num_tokens(), " rows of ", op.width());
  }
  require_one_of(op.comm_quant_mode, "comm_quant_mode", {kNoQuant, kInt8Groups});
  if (op.comm_quant_mode == kInt8Groups) check_int8_groups(op);
  check_limits(op.place, op.version == "1", op.num_tokens(), op.width(), op.top_k());
  if (op.place.is_hierarchical()) {
    if (!op.expand_scales)
      refuse(Code::kMissing, "expand_scales is missing: comm_alg=hierarchy needs that of dispatch");
    require(!op.shared_expert_x, "shared_expert_x is given, but comm_alg=hierarchy with it is not emulated");
  }
}

Plan plan(const Combine& op) {
  check(op);
  trace("MoeDistributeCombine", "comm_alg=%s comm_quant_mode=%d", op.place.comm_alg.c_str(),
        static_cast<int>(op.comm_quant_mode));
  const std::string agreed =
      agreed_facts(op.version, op.place, op.special, op.top_k(), op.width(), op.expand_x.scalar_type()) +
      c10::str(" comm_quant_mode=", op.comm_quant_mode);
  const ExchangeCall call{op.place.group, op.place.world_size, op.place.rank, "MoeDistributeCombine", agreed};
  return [op, call] {
    at::Tensor active;
    const std::vector<Message> received = exchange(call, [&] {
      active = active_pairs(op.expert_ids, op.mask);
      const PendingDispatch dispatch =
          take_dispatch(op.place.group, op.version, op.expert_ids, active, op.combine_index, op.send_counts);
      require(op.expand_x.size(0) >= dispatch.sources.size(0), "expand_x has ", op.expand_x.size(0),
              " rows, but the dispatch returned ", dispatch.sources.size(0));
      return outgoing(op, dispatch);
    });
    const at::Tensor rows = returned_rows(op, received);
    const auto sum = op.place.is_hierarchical() ? sum_by_server : sum_of_rows;
    op.finish(sum(op, rows, active), active.any(-1));
  };
}

// Refuses arguments for a quantised expand_x.
void check_reserved(const Options& options, const Modes& modes) {
  const char* reason = "it is reserved";
  require_absent(options.activation_scale, "activation_scale", reason);
  require_absent(options.weight_scale, "weight_scale", reason);
  require_absent(options.group_list, "group_list", reason);
  require_one_of(modes.out_dtype, "out_dtype", {0});
  require_one_of(modes.group_list_type, "group_list_type", {0});
}

Plan combine_v4(Inputs inputs, Options options, OptionalTensor shared_expert_x, OptionalTensor elastic_info,
                Constants constants, OptionalTensor performance_info, Members members, Modes modes,
                std::string comm_alg, SpecialExperts special, at::Tensor out) {
  check_reserved(options, modes);
  const Placement place = make_placement(members, modes.global_bs, comm_alg, elastic_info, performance_info);
  const Finish finish = [out](const at::Tensor& total, const at::Tensor& active) { write_active(out, total, active); };
  return plan({inputs, options, "2", place, special, constants, shared_expert_x, modes.comm_quant_mode, finish});
}

Plan combine_v3(Inputs inputs, Options options, OptionalTensor shared_expert_x, OptionalTensor elastic_info,
                Constants constants, Members members, Modes modes, std::string comm_alg, SpecialExperts special,
                at::Tensor out) {
  return combine_v4(inputs, options, shared_expert_x, elastic_info, constants, /*performance_info=*/std::nullopt,
                    members, modes, comm_alg, special, out);
}

Plan combine_v2(Inputs inputs, Options options, OptionalTensor shared_expert_x, Members members, Modes modes,
                std::string comm_alg, at::Tensor out) {
  return combine_v3(inputs, options, shared_expert_x, /*elastic_info=*/std::nullopt, {}, members, modes, comm_alg,
                    {0, 0, 0}, out);
}

Plan combine_v1(Inputs inputs, Options options, Members members, Modes modes, at::Tensor out) {
  check_reserved(options, modes);
  const Finish finish = [out](const at::Tensor& total, const at::Tensor& active) { write_active(out, total, active); };
  const Placement place = make_placement(members, modes.global_bs);
  return plan({inputs, options, "1", place, {0, 0, 0}, {}, std::nullopt, modes.comm_quant_mode, finish});
}

// --- One op for combine, the addition of a residual, and root mean square normalisation ---

struct Norm {
  at::Tensor residual;  // [B, 1, H]
  at::Tensor gamma;     // [H]

  using Fields = std::tuple<at::Tensor, at::Tensor>;
};

struct NormOutputs {
  at::Tensor y;     // [B, 1, H]: the normalised sum
  at::Tensor rstd;  // [B, 1, 1] float32
  at::Tensor x;     // [B, 1, H]: the sum

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
};

// Rounds like the kernel: the sum and its square are float32, and y is rounded to 16 bits before and after gamma.
void normalise(const Norm& norm, float epsilon, const NormOutputs& outputs, const at::Tensor& total,
               const at::Tensor& active) {
  const at::Tensor x = total + norm.residual.reshape(total.sizes()).to(at::kFloat);
  const at::Tensor rstd = ((x * x).mean(-1, /*keepdim=*/true) + epsilon).sqrt().reciprocal();
  const at::Tensor y = (x * rstd).to(outputs.y.scalar_type()).to(at::kFloat) * norm.gamma.to(at::kFloat);
  write_active(outputs.x, x, active);
  write_active(outputs.rstd, rstd, active);
  write_active(outputs.y, y, active);
}

Plan combine_add_rms_norm_v2(Inputs inputs, Norm norm, Options options, OptionalTensor shared_expert_x,
                             OptionalTensor elastic_info, Constants constants, Members members, Modes modes,
                             std::string comm_alg, float epsilon, SpecialExperts special, NormOutputs outputs) {
  require(current_soc().family == Family::kA3 || current_soc().family == Family::kA5, current_soc().name,
          " has no npu_moe_distribute_combine_add_rms_norm; Ascend910_93 and Ascend950 have it");
  check_reserved(options, modes);
  require_absent(options.expand_scales, "expand_scales", "it is reserved");
  require_one_of(modes.comm_quant_mode, "comm_quant_mode", {kNoQuant});
  require(members.shared_ranks == 0, "shared_expert_rank_num=", members.shared_ranks, " is not 0");
  require(comm_alg.empty(), "comm_alg=", comm_alg, " is reserved; leave it empty");
  require_dtype(inputs.expand_x, "expand_x", {at::kBFloat16});
  require_dtype(norm.residual, "residual_x", {at::kBFloat16});
  require_dtype(norm.gamma, "gamma", {at::kBFloat16});
  require_shape(norm.residual, "residual_x", outputs.x.sizes());
  require_shape(norm.gamma, "gamma", {outputs.x.size(-1)});
  const Placement place = make_placement(members, modes.global_bs, comm_alg, elastic_info);
  const Finish finish = [norm, epsilon, outputs](const at::Tensor& total, const at::Tensor& active) {
    normalise(norm, epsilon, outputs, total, active);
  };
  return plan({inputs, options, "2", place, special, constants, shared_expert_x, kNoQuant, finish});
}

Plan combine_add_rms_norm(Inputs inputs, Norm norm, Options options, OptionalTensor shared_expert_x, Members members,
                          Modes modes, std::string comm_alg, float epsilon, NormOutputs outputs) {
  return combine_add_rms_norm_v2(inputs, norm, options, shared_expert_x, /*elastic_info=*/std::nullopt, {}, members,
                                 modes, comm_alg, epsilon, {0, 0, 0}, outputs);
}

}  // namespace

ACLNN_OP(aclnnMoeDistributeCombine, combine_v1);
ACLNN_OP(aclnnMoeDistributeCombineV2, combine_v2);
ACLNN_OP(aclnnMoeDistributeCombineV3, combine_v3);
ACLNN_OP(aclnnMoeDistributeCombineV4, combine_v4);
ACLNN_OP(aclnnMoeDistributeCombineAddRmsNorm, combine_add_rms_norm);
ACLNN_OP(aclnnMoeDistributeCombineAddRmsNormV2, combine_add_rms_norm_v2);

}  // namespace vllm_npu::emulator::aclnn
