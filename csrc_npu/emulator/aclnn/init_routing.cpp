// Init routing: copies the row of each token once for each of its experts, and sorts the rows by expert.
//
// Contracts: op-plugin's documents of npu_moe_init_routing, npu_moe_init_routing_v2 and npu_moe_compute_expert_tokens. The
// second op rounds like CANN's moe_init_routing_v3 kernels.
#include <algorithm>
#include <limits>

#include "numerics.h"
#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kNoQuant = -1;
constexpr int64_t kStaticQuant = 0;
constexpr int64_t kDynamicQuant = 1;
constexpr int64_t kCumsum = 0;
constexpr int64_t kCount = 1;
constexpr int64_t kKeyValue = 2;
constexpr int64_t kGather = 0;
constexpr int64_t kMaxExperts = 10240;  // 5120 with key-value counts
constexpr int64_t kMaxExpertsKeyValue = 5120;
constexpr int64_t kMaxExpertsByTokens = 2048;  // of compute_expert_tokens

struct InitRouting {
  at::Tensor x;           // [N, H]
  at::Tensor expert_ids;  // [N, K] int32
  OptionalTensor scale;
  OptionalTensor offset;
  int64_t active_num;
  int64_t expert_capacity;
  int64_t expert_num;
  bool drop_pad;
  int64_t counts_type;
  int64_t quant_mode;
  int64_t first_expert;  // first expert of the active range
  int64_t end_expert;
  int64_t row_index_type;
  at::Tensor expanded_x;
  at::Tensor expanded_row_index;
  OptionalTensor counts;
  OptionalTensor expanded_scale;

  int64_t top_k() const { return expert_ids.size(1); }
  int64_t num_active_experts() const { return end_expert - first_expert; }
};

// The pairs of a token and one of its experts in the active range, sorted by expert. A pair's number is token * top_k +
// k.
struct SortedPairs {
  at::Tensor pairs;        // [V] int64
  at::Tensor experts;      // [V] int64, ascending
  at::Tensor counts;       // [num_active_experts] int64
  at::Tensor group_start;  // [num_active_experts] int64: where each expert's pairs begin
};

SortedPairs sort_pairs(const InitRouting& op) {
  const at::Tensor ids = op.expert_ids.flatten().to(at::kLong);
  const at::Tensor active = (ids >= op.first_expert).logical_and(ids < op.end_expert);
  const at::Tensor keys = at::where(active, ids, std::numeric_limits<int32_t>::max());
  const at::Tensor order = at::argsort(keys, /*stable=*/true, 0, /*descending=*/false);
  SortedPairs sorted;
  sorted.pairs = order.narrow(0, 0, active.sum().item<int64_t>());
  sorted.experts = ids.index_select(0, sorted.pairs);
  sorted.counts = at::bincount(sorted.experts - op.first_expert, {}, op.num_active_experts());
  sorted.group_start = sorted.counts.cumsum(0) - sorted.counts;
  return sorted;
}

void write_counts(const InitRouting& op, const at::Tensor& counts) {
  if (!op.counts) return;
  if (op.counts_type == kKeyValue) {
    const at::Tensor used = counts.nonzero().squeeze(-1);
    op.counts->zero_();
    op.counts->narrow(0, 0, used.size(0)).copy_(at::stack({used + op.first_expert, counts.index_select(0, used)}, 1));
  } else {
    op.counts->copy_(op.counts_type == kCumsum ? counts.cumsum(0) : counts);
  }
}

// Rows of expanded_x, and their scales if the op has scales.
struct Rows {
  at::Tensor values;
  OptionalTensor scales;
};

Rows take_rows(const InitRouting& op, const at::Tensor& pairs, const at::Tensor& experts) {
  const at::Tensor tokens = pairs.floor_divide(op.top_k());
  const at::Tensor rows = op.x.index_select(0, tokens);
  if (op.quant_mode == kNoQuant) {
    if (!op.scale) return {rows, std::nullopt};
    return {rows, op.scale->index_select(0, tokens)};
  }
  if (op.quant_mode == kStaticQuant) {
    const at::Tensor scaled = rows.to(at::kFloat) * *op.scale + *op.offset;
    return {scaled.round().clamp(-128, 127).to(at::kChar), std::nullopt};
  }
  at::Tensor values = rows.to(at::kFloat);
  if (op.scale) {
    const bool shared = op.scale->size(0) == 1;
    values = values * (shared ? *op.scale : op.scale->index_select(0, experts - op.first_expert));
  }
  const Quantized quantized = quantize_by_quotient(values);
  return {quantized.values, quantized.scales};
}

void route_dropless(const InitRouting& op) {
  const SortedPairs sorted = sort_pairs(op);
  const int64_t num_valid = sorted.pairs.size(0);
  const int64_t num_rows = std::min(num_valid, op.expanded_x.size(0));
  const Rows rows = take_rows(op, sorted.pairs.narrow(0, 0, num_rows), sorted.experts.narrow(0, 0, num_rows));
  write_front(op.expanded_x, rows.values);
  if (op.expanded_scale) {
    if (rows.scales)
      write_front(*op.expanded_scale, *rows.scales);
    else
      fill_undefined(*op.expanded_scale);
  }
  if (op.row_index_type == kGather) {
    op.expanded_row_index.fill_(-1);
    op.expanded_row_index.index_copy_(0, sorted.pairs, at::arange(num_valid, at::kInt));
  } else {
    write_front(op.expanded_row_index, sorted.pairs);
  }
  write_counts(op, sorted.counts);
}

// Each expert has expert_capacity slots. Pairs beyond the capacity are dropped and get row index -1. Unused slots are
// zeros.
void route_with_capacity(const InitRouting& op) {
  const SortedPairs sorted = sort_pairs(op);
  const at::Tensor slot_in_expert =
      at::arange(sorted.pairs.size(0)) - sorted.group_start.index_select(0, sorted.experts);
  const at::Tensor kept = (slot_in_expert < op.expert_capacity).nonzero().squeeze(-1);
  const at::Tensor pairs = sorted.pairs.index_select(0, kept);
  const at::Tensor experts = sorted.experts.index_select(0, kept);
  const at::Tensor slots = experts * op.expert_capacity + slot_in_expert.index_select(0, kept);
  const Rows rows = take_rows(op, pairs, experts);
  op.expanded_x.zero_();
  op.expanded_x.flatten(0, 1).index_copy_(0, slots, rows.values);
  if (op.expanded_scale) {
    if (rows.scales)
      op.expanded_scale->zero_().index_copy_(0, slots, *rows.scales);
    else
      fill_undefined(*op.expanded_scale);
  }
  op.expanded_row_index.fill_(-1);
  op.expanded_row_index.index_copy_(0, pairs, slots.to(at::kInt));
  write_counts(op, sorted.counts);
}

void check_quant(const InitRouting& op) {
  require_one_of(op.quant_mode, "quant_mode", {kNoQuant, kStaticQuant, kDynamicQuant});
  const int64_t width = op.x.size(1);
  if (op.scale) require_dtype(*op.scale, "scale", {at::kFloat});
  if (op.quant_mode == kNoQuant) {
    require_dtype(op.x, "x", {at::kHalf, at::kBFloat16, at::kFloat, at::kChar});
    require_absent(op.offset, "offset", "only quant_mode=0 takes one");
    if (op.scale) require_shape(*op.scale, "scale", {op.x.size(0)});
    return;
  }
  require_dtype(op.x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  if (op.quant_mode == kStaticQuant) {
    if (!op.scale || !op.offset) refuse(Code::kMissing, "quant_mode=0 needs scale and offset");
    require_dtype(*op.offset, "offset", {at::kFloat});
    require_shape(*op.scale, "scale", {1});
    require_shape(*op.offset, "offset", {1});
    return;
  }
  require_absent(op.offset, "offset", "only quant_mode=0 takes one");
  if (op.scale && op.scale->size(0) != 1) require_shape(*op.scale, "scale", {op.num_active_experts(), width});
  if (op.scale && op.scale->size(0) == 1) require_shape(*op.scale, "scale", {1, width});
}

void check(const InitRouting& op) {
  require_dimensions(op.x, "x", 2);
  require_dimensions(op.expert_ids, "expert_idx", 2);
  require_dtype(op.expert_ids, "expert_idx", {at::kInt});
  require(op.x.size(0) == op.expert_ids.size(0), "x has ", op.x.size(0), " rows and expert_idx has ",
          op.expert_ids.size(0));
  require_one_of(op.counts_type, "expert_tokens_num_type", {kCumsum, kCount, kKeyValue});
  require_one_of(op.row_index_type, "row_idx_type", {0, 1});
  const int64_t most_experts = op.counts_type == kKeyValue ? kMaxExpertsKeyValue : kMaxExperts;
  require(op.expert_num > 0 && op.expert_num <= most_experts, "expert_num=", op.expert_num, " is not in 1..",
          most_experts);
  require(op.active_num >= -1, "active_num=", op.active_num, " is less than -1");
  require(0 <= op.first_expert && op.first_expert < op.end_expert && op.end_expert <= op.expert_num,
          "active_expert_range=[", op.first_expert, ", ", op.end_expert, ") does not lie in [0, ", op.expert_num, ")");
  check_quant(op);
  if (!op.drop_pad) return;
  require(op.first_expert == 0 && op.end_expert == op.expert_num,
          "drop_pad_mode=1 takes all experts: active_expert_range must be [0, ", op.expert_num, ")");
  require(op.counts_type == kCount, "drop_pad_mode=1 needs expert_tokens_num_type=1, not ", op.counts_type);
  require(op.row_index_type == kGather, "drop_pad_mode=1 needs row_idx_type=0, not ", op.row_index_type);
  require(op.expert_capacity > 0 && op.expert_capacity <= op.x.size(0), "expert_capacity=", op.expert_capacity,
          " is not in 1..", op.x.size(0), ", the number of tokens");
}

Plan plan(const InitRouting& op) {
  check(op);
  return [op] { op.drop_pad ? route_with_capacity(op) : route_dropless(op); };
}

Plan init_routing_v3(at::Tensor x, at::Tensor expert_ids, OptionalTensor scale, OptionalTensor offset,
                     int64_t active_num, int64_t expert_capacity, int64_t expert_num, int64_t drop_pad_mode,
                     int64_t counts_type, bool wants_counts, int64_t quant_mode, std::vector<int64_t> active_range,
                     int64_t row_index_type, at::Tensor expanded_x, at::Tensor expanded_row_index, at::Tensor counts,
                     OptionalTensor expanded_scale) {
  require_one_of(drop_pad_mode, "drop_pad_mode", {0, 1});
  if (active_range.empty()) active_range = {0, expert_num};
  require(active_range.size() == 2, "active_expert_range has ", active_range.size(), " numbers; it must have 2");
  const Plan route = plan({x, expert_ids, scale, offset, active_num, expert_capacity, expert_num, drop_pad_mode == 1,
                           counts_type, quant_mode, active_range[0], active_range[1], row_index_type, expanded_x,
                           expanded_row_index, wants_counts ? std::optional(counts) : std::nullopt, expanded_scale});
  // Without a range, op-plugin sizes the counts by a static copy of the expert_num of the process's first such call.
  const int64_t num_counts = active_range[1] - active_range[0];
  require(!wants_counts || counts_type == kKeyValue || counts.numel() == num_counts,
          "expert_tokens_count_or_cumsum has ", counts.numel(), " elements for ", num_counts,
          " experts: without active_expert_range, torch_npu keeps the expert_num of the process's first call; pass "
          "active_expert_range=[0, ", expert_num, "]");
  return [=] {
    if (!wants_counts) fill_undefined(counts);
    route();
  };
}

// The version for 310P, and for CANN before 8.5. It has no quantisation and takes all experts. On 310P, op-plugin does
// not pass quant_mode and active_expert_range, so they are checked by the outputs that op-plugin allocates.
Plan init_routing_v2(at::Tensor x, at::Tensor expert_ids, int64_t active_num, int64_t expert_capacity,
                     int64_t expert_num, int64_t drop_pad_mode, int64_t counts_flag, bool wants_counts_before_capacity,
                     at::Tensor expanded_x, at::Tensor expanded_row_index, at::Tensor counts,
                     at::Tensor counts_before_capacity) {
  constexpr int64_t kCumsumFlag = 1;
  constexpr int64_t kCountFlag = 2;
  require_one_of(drop_pad_mode, "dropPadMode", {0});
  if (current_soc().family == Family::k310P) require_dtype(x, "x on Ascend310P", {at::kHalf});
  require_dtype(expanded_x, "expanded_x (its dtype follows quant_mode)", {x.scalar_type()});
  require_shape(counts, "expert_tokens_count_or_cumsum (its size follows active_expert_range)", {expert_num});
  require_one_of(counts_flag, "expertTokensCountOrCumsumFlag", {kCumsumFlag, kCountFlag});
  require(!wants_counts_before_capacity,
          "expertTokensBeforeCapacityFlag=true needs dropPadMode=1, which is not emulated");
  const Plan route = plan({x, expert_ids, std::nullopt, std::nullopt, active_num, expert_capacity, expert_num,
                           /*drop_pad=*/false, counts_flag == kCumsumFlag ? kCumsum : kCount, kNoQuant, 0, expert_num,
                           kGather, expanded_x, expanded_row_index, counts, std::nullopt});
  return [=] {
    fill_undefined(counts_before_capacity);
    route();
  };
}

// Version 1. row_idx [N, K] names the pairs: pair p is a copy of token p % N. The kernel takes any permutation of them.
Plan init_routing_v1(at::Tensor x, at::Tensor row_idx, at::Tensor expert_ids, int64_t active_num, at::Tensor expanded_x,
                     at::Tensor expanded_row_idx, at::Tensor expanded_expert_ids) {
  require_dimensions(x, "x", 2);
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dtype(row_idx, "row_idx", {at::kInt});
  require_dtype(expert_ids, "expert_idx", {at::kInt});
  require_shape(row_idx, "row_idx", expert_ids.sizes());
  const int64_t tokens = x.size(0);
  require(expert_ids.size(0) == tokens, "x has ", tokens, " rows and expert_idx ", expert_ids.size(0));
  require(expanded_x.size(0) == std::min(active_num, tokens) * expert_ids.size(1), "active_num=", active_num,
          " does not fit: the output has ", expanded_x.size(0), " rows");
  return [=] {
    const auto [ids, order] = expert_ids.flatten().sort(/*stable=*/true, 0, /*descending=*/false);
    const at::Tensor pairs = row_idx.flatten().to(at::kLong).index_select(0, order);
    require((pairs >= 0).logical_and(pairs < pairs.numel()).all().item<bool>(), "row_idx is not in 0..",
            pairs.numel() - 1);
    expanded_expert_ids.copy_(ids);
    expanded_row_idx.index_copy_(0, pairs, at::arange(pairs.numel(), at::kInt));
    expanded_x.copy_(x.index_select(0, pairs.narrow(0, 0, expanded_x.size(0)).remainder(tokens)));
  };
}

// The end of each expert's rows.
Plan compute_expert_tokens(at::Tensor sorted_experts, int64_t num_experts, at::Tensor out) {
  require_dimensions(sorted_experts, "sorted_expert_for_source_row", 1);
  require_dtype(sorted_experts, "sorted_expert_for_source_row", {at::kInt});
  require(num_experts > 0 && num_experts <= kMaxExpertsByTokens, "num_expert=", num_experts, "; it must be in 1..",
          kMaxExpertsByTokens);
  return [=] {
    const at::Tensor experts = at::arange(num_experts, at::kInt);
    out.copy_(at::searchsorted(sorted_experts, experts, /*out_int32=*/true, /*right=*/true));
  };
}

}  // namespace

ACLNN_OP(aclnnMoeInitRouting, init_routing_v1);
ACLNN_OP(aclnnMoeComputeExpertTokens, compute_expert_tokens);
ACLNN_OP(aclnnMoeInitRoutingV2, init_routing_v2);
ACLNN_OP(aclnnMoeInitRoutingV3, init_routing_v3);

}  // namespace vllm_npu::emulator::aclnn
