// Dispatch, both matrix products of the experts, the activation between them, and combine, in one operator of
// vllm-ascend.
//
// Source: the source distributions of vllm-ascend 0.23.0.post1 and 0.30.0rc2, csrc/mc2/dispatch_ffn_combine (int8
// weights) and csrc/mc2/dispatch_ffn_combine_bf16 (16-bit weights): the definition, the tiling and the kernel of each.
// Both versions have the same kernels. The limits are those of the tiling, and those that follow from the memory that
// the kernel addresses; the text of a refusal says which.
#include <algorithm>
#include <cmath>

#include "exchange.h"
#include "expert_messages.h"
#include "hccl/communicator.h"
#include "numerics.h"
#include "op.h"
#include "runtime/settings.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kMb = 1 << 20;
constexpr int64_t kMaxRanks = 32;             // MAX_RANK_SIZE of hccl_shmem.hpp
constexpr int64_t kWidthMultiple = 32;        // rows are copied in blocks of 32 bytes
constexpr int64_t kScaleBytes = 32;           // UB_ALIGN: behind each int8 row of the window
constexpr int64_t kTailMb = 2;                // the window's end: counts and flags
constexpr int64_t kGapMb = 1;                 // between the rows sent and the rows that come back
constexpr int64_t kUnifiedBuffer = 192 << 10;  // bytes of a vector core's memory
constexpr int64_t kInt8BytesOfColumn = 24;    // of that memory, for each column of the first product
constexpr int64_t kSixteenBitBytesOfColumn = 26;

struct Inputs {
  at::Tensor x;                     // [M, K] float16 or bfloat16
  std::vector<at::Tensor> weight1;  // one [E, K, N], or E of [K, N]: gate, then up
  std::vector<at::Tensor> weight2;  // one [E, N / 2, K], or E of [N / 2, K]
  at::Tensor expert_idx;            // [M, top_k] int32
  std::vector<at::Tensor> scale1;   // int64: the bits of a float32 for each column; one of E * N, or E of N
  std::vector<at::Tensor> scale2;   // as scale1, of K columns
  at::Tensor probs;                 // [M, top_k] float32

  using Fields = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor,
                            std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor>;
};

struct Outputs {
  at::Tensor out;                // as x
  at::Tensor expert_token_nums;  // int32, E elements: the rows that arrived, those past max_output_size too

  using Fields = std::tuple<at::Tensor, at::Tensor>;
};

struct Fused : Inputs, Outputs {
  std::string name;
  OptionalTensor mask;  // [M] bool
  std::string group;
  int64_t max_output_size;
  float swiglu_limit;
  int64_t world_size;
  int64_t rank;

  bool is_int8() const { return weight1[0].scalar_type() == at::kChar; }
  bool is_stacked() const { return weight1.size() == 1; }
  int64_t experts_per_rank() const { return is_stacked() ? weight1[0].size(0) : static_cast<int64_t>(weight1.size()); }
  int64_t num_experts() const { return experts_per_rank() * world_size; }
  int64_t tokens() const { return x.size(0); }
  int64_t width() const { return x.size(1); }
  int64_t columns() const { return weight1[0].size(-1); }
  int64_t top_k() const { return expert_idx.size(1); }
};

at::Tensor of_expert(const Fused& op, const std::vector<at::Tensor>& list, int64_t expert) {
  return op.is_stacked() ? list[0][expert] : list[expert];
}

// The float32 scales of an expert's columns.
at::Tensor scales_of_expert(const Fused& op, const std::vector<at::Tensor>& list, int64_t expert, int64_t columns) {
  const at::Tensor bits =
      op.is_stacked() ? list[0].flatten().narrow(0, expert * columns, columns) : list[expert].flatten();
  return bits.to(at::kInt).contiguous().view(at::kFloat);  // the low half of each number
}

void check_weights(const Fused& op) {
  const int64_t experts = op.experts_per_rank();
  const auto check_list = [&](const std::vector<at::Tensor>& list, const char* name, int64_t rows, int64_t columns) {
    require(list.size() == op.weight1.size(), name, " has ", list.size(), " tensors and weight1 has ",
            op.weight1.size());
    for (const at::Tensor& weight : list) {
      require_dtype(weight, name, {op.is_int8() ? at::kChar : op.x.scalar_type()});
      if (op.is_stacked())
        require_shape(weight, name, {experts, rows, columns});
      else
        require_shape(weight, name, {rows, columns});
    }
  };
  require(op.columns() % 2 == 0, "weight1 has ", op.columns(), " columns; it has as many for gate as for up");
  check_list(op.weight1, "weight1", op.width(), op.columns());
  check_list(op.weight2, "weight2", op.columns() / 2, op.width());
  if (!op.is_int8()) return;
  const auto check_scales = [&](const std::vector<at::Tensor>& list, const char* name, int64_t columns) {
    require(list.size() == op.weight1.size(), name, " has ", list.size(), " tensors and weight1 has ",
            op.weight1.size());
    for (const at::Tensor& scale : list) {
      require_dtype(scale, name, {at::kLong});
      require(scale.numel() == columns * (op.is_stacked() ? experts : 1), name, " has ", scale.numel(),
              " elements for ", columns, " columns");
    }
  };
  check_scales(op.scale1, "scale1", op.columns());
  check_scales(op.scale2, "scale2", op.width());
}

// The MB of the group's window. The rows sent lie in its first third, and the rows that come back behind that. The
// tiling of int8 checks another formula, which is taken too. The tiling of 16-bit weights checks nothing: rows would
// overlap.
int64_t window_mb(const Fused& op) {
  const auto mb = [](int64_t bytes) { return (bytes + kMb - 1) / kMb; };
  const int64_t pairs = op.tokens() * op.top_k();
  const int64_t sent = pairs * (op.is_int8() ? op.width() + kScaleBytes : 2 * op.width());
  const int64_t returned = pairs * 2 * op.width();
  const int64_t layout = std::max(mb(3 * sent), mb((returned + (kGapMb + kTailMb) * kMb) * 3 / 2));
  return op.is_int8() ? std::max(layout, mb(3 * pairs * op.width() + 10 * kMb)) : layout;
}

void check_limits(const Fused& op, const Communicator& group) {
  if (limits_are_off()) return;
  const char* way_out = "; VLLM_NPU_EMULATOR_LIMITS=none lets the emulator take it";
  require(op.world_size <= kMaxRanks, "the group has ", op.world_size, " ranks; the kernel takes at most ", kMaxRanks,
          way_out);
  require(op.width() % kWidthMultiple == 0, "K=", op.width(), " is no multiple of ", kWidthMultiple,
          ", the bytes of a block that the kernel copies", way_out);
  const int64_t bytes = op.columns() * (op.is_int8() ? kInt8BytesOfColumn : kSixteenBitBytesOfColumn);
  require(bytes <= kUnifiedBuffer, "N=", op.columns(), " needs ", bytes, " bytes in a vector core, which has ",
          kUnifiedBuffer, way_out);
  require(!op.is_int8() || op.columns() <= op.width(), "N=", op.columns(), " is more than K=", op.width(),
          ", and the kernel for int8 writes rows of N in the distance K, so they would overlap", way_out);
  require(op.experts_per_rank() != (op.is_int8() ? 1 : 2), "a rank has ", op.experts_per_rank(),
          " experts: the kernel then computes no activation, because its first part of experts is empty", way_out);
  const int64_t needed = window_mb(op);
  require(needed <= group.buffer_mb(), "HCCL_BUFFSIZE of the group ", op.group, " is ", group.buffer_mb(), " MB, and ",
          op.tokens(), " tokens need ", needed, "; set HCCL_BUFFSIZE=", needed, way_out);
}

void check(const Fused& op) {
  const Family family = current_soc().family;
  require(family == Family::kA3 || (family == Family::kA2 && op.is_int8()), current_soc().name, " has no ", op.name);
  require_dimensions(op.x, "x", 2);
  require_dtype(op.x, "x", {at::kHalf, at::kBFloat16});
  require_dimensions(op.expert_idx, "expert_idx", 2);
  require_dtype(op.expert_idx, "expert_idx", {at::kInt});
  require(op.expert_idx.size(0) == op.tokens(), "expert_idx has ", op.expert_idx.size(0), " rows and x has ",
          op.tokens());
  require_dtype(op.probs, "probs", {at::kFloat});
  require_shape(op.probs, "probs", op.expert_idx.sizes());
  require(op.tokens() > 0, "x has no row; no source says what the kernel does then");
  require(op.max_output_size > 0, "max_output_size=", op.max_output_size, " is not positive");
  if (op.mask) {
    require_dtype(*op.mask, "x_active_mask", {at::kBool});
    require_shape(*op.mask, "x_active_mask", {op.tokens()});
  }
  check_weights(op);
  require_dtype(op.out, "out", {op.x.scalar_type()});
  require_shape(op.out, "out", op.x.sizes());
  require_dtype(op.expert_token_nums, "expert_token_nums", {at::kInt});
  require(op.expert_token_nums.numel() == op.experts_per_rank() && op.expert_token_nums.is_contiguous(),
          "expert_token_nums has ", op.expert_token_nums.numel(), " elements for ", op.experts_per_rank(), " experts");
}

std::vector<Message> outgoing(const Fused& op) {
  // The kernel writes into its input too.
  if (op.mask) op.expert_idx.masked_fill_(op.mask->logical_not().unsqueeze(-1), op.num_experts());
  const at::Tensor ids = op.expert_idx.to(at::kLong).flatten();
  const int64_t most = op.num_experts() - (op.is_int8() ? 0 : 1);  // for int8, num_experts marks a pair that is not sent
  const at::Tensor bad = (ids < 0).logical_or(ids > most);
  if (bad.any().item<bool>()) {
    refuse(Code::kUnusable, "expert_idx has the id ", ids.masked_select(bad)[0].item<int64_t>(),
           "; ids must be in 0..", most);
  }
  Quantized rows{op.x, at::zeros({op.tokens()}, at::kFloat)};
  if (op.is_int8()) rows = quantize_by_quotient(op.x.to(at::kFloat));
  return messages_to_experts(ids, rows, op.top_k(), op.experts_per_rank(), op.world_size);
}

// One expert on its rows, [n, K] of x's dtype. The products are rounded to that dtype.
at::Tensor sixteen_bit_expert(const Fused& op, const at::Tensor& rows, int64_t expert) {
  const auto product = [&](const at::Tensor& left, const at::Tensor& weight) {
    return at::matmul(left.to(at::kFloat), weight.to(at::kFloat)).to(op.x.scalar_type());
  };
  const at::Tensor first = product(rows, of_expert(op, op.weight1, expert)).to(at::kFloat);
  return product(swiglu_of(first).to(op.x.scalar_type()), of_expert(op, op.weight2, expert));
}

// As sixteen_bit_expert. The products are scaled for each column and rounded to float16, and only then scaled for each
// row.
at::Tensor int8_expert(const Fused& op, const at::Tensor& rows, const at::Tensor& row_scales, int64_t expert) {
  const auto product = [&](const at::Tensor& left, const at::Tensor& weight, const at::Tensor& scales) {
    return (at::matmul(left.to(at::kInt), weight.to(at::kInt)).to(at::kFloat) * scales).to(at::kHalf).to(at::kFloat);
  };
  at::Tensor first =
      product(rows, of_expert(op, op.weight1, expert), scales_of_expert(op, op.scale1, expert, op.columns()));
  first = first * row_scales.unsqueeze(-1);
  if (op.swiglu_limit > 0) {
    first = first.clamp_max(op.swiglu_limit);
    first.narrow(-1, op.columns() / 2, op.columns() / 2).clamp_min_(-op.swiglu_limit);  // gate has no lower limit
  }
  const at::Tensor inner = swiglu_of(first);
  const at::Tensor largest = inner.abs().amax(-1, /*keepdim=*/true);
  // The kernel would compute 0 * inf for a row of zeros.
  const at::Tensor factor = at::where(largest > 0, at::full_like(largest, 127.0F) / largest, 0.0F);
  const at::Tensor values = (inner * factor).round().to(at::kChar);
  const at::Tensor second =
      product(values, of_expert(op, op.weight2, expert), scales_of_expert(op, op.scale2, expert, op.width()));
  return (second * (largest / 127.0F)).to(op.x.scalar_type());
}

// The experts' rows for each rank: its pairs, and their rows. Rows are ordered by expert, then source rank, then pair.
// Those past max_output_size are neither computed nor sent back.
std::vector<Message> compute(const Fused& op, const std::vector<Message>& received) {
  const at::Tensor slots = joined(received, kSlot);
  const at::Tensor order = at::argsort(slots, /*stable=*/true, 0, /*descending=*/false);
  const at::Tensor counts = at::bincount(slots, {}, op.experts_per_rank());
  op.expert_token_nums.view({-1}).copy_(counts);
  const at::Tensor kept = order.narrow(0, 0, std::min(order.size(0), op.max_output_size));
  const at::Tensor rows = joined(received, kValues).index_select(0, kept);
  const at::Tensor scales = joined(received, kScales).index_select(0, kept);
  at::Tensor results = at::empty({kept.size(0), op.width()}, op.x.scalar_type());
  int64_t start = 0;
  for (int64_t expert = 0; expert < op.experts_per_rank(); ++expert) {
    const int64_t size = std::min(counts[expert].item<int64_t>(), kept.size(0) - start);
    if (size == 0) continue;
    const at::Tensor own = rows.narrow(0, start, size);
    results.narrow(0, start, size)
        .copy_(op.is_int8() ? int8_expert(op, own, scales.narrow(0, start, size), expert)
                            : sixteen_bit_expert(op, own, expert));
    start += size;
  }
  std::vector<at::Tensor> ranks;
  for (int64_t source = 0; source < op.world_size; ++source) {
    ranks.push_back(at::full({received[source][kSlot].size(0)}, source, at::kLong));
  }
  const at::Tensor sources = at::cat(ranks).index_select(0, kept);
  const at::Tensor pairs = joined(received, kPair).index_select(0, kept);
  std::vector<Message> messages;
  for (int64_t receiver = 0; receiver < op.world_size; ++receiver) {
    const at::Tensor index = (sources == receiver).nonzero().squeeze(-1);
    messages.push_back({pairs.index_select(0, index), results.index_select(0, index)});
  }
  return messages;
}

// Adds up the rows of each token in float32. A row that did not come back is what the window held before: undefined.
void unpermute(const Fused& op, const std::vector<Message>& returned) {
  at::Tensor rows = at::empty({op.tokens() * op.top_k(), op.width()}, op.x.scalar_type());
  fill_undefined(rows);
  for (const Message& message : returned) rows.index_copy_(0, message[0], message[1]);
  rows = rows.view({op.tokens(), op.top_k(), op.width()});
  at::Tensor total = at::zeros({op.tokens(), op.width()}, at::kFloat);
  for (int64_t k = 0; k < op.top_k(); ++k) {
    total += rows.select(1, k).to(at::kFloat) * op.probs.select(1, k).unsqueeze(-1);
  }
  op.out.copy_(total);
}

Plan plan(Fused op) {
  const std::shared_ptr<Communicator> group = find_communicator_by_name(op.group);
  require(group != nullptr, "group ", op.group,
          " names no HCCL communicator of this process; take the name from ProcessGroupHCCL.get_hccl_comm_name()");
  require(!op.weight1.empty(), "weight1 has no tensor");
  op.world_size = group->size();
  op.rank = group->rank();
  check(op);
  check_limits(op, *group);
  const std::string agreed = c10::str("K=", op.width(), " N=", op.columns(), " experts=", op.num_experts(),
                                      " top_k=", op.top_k(), " dtype=", op.x.scalar_type());
  return [op, agreed] {
    const ExchangeCall send{op.group, op.world_size, op.rank, op.name + " dispatch", agreed};
    const std::vector<Message> received = exchange(send, [&] { return outgoing(op); });
    const ExchangeCall back{op.group, op.world_size, op.rank, op.name + " combine", agreed};
    unpermute(op, exchange(back, [&] { return compute(op, received); }));
  };
}

Plan int8_weights(Inputs inputs, OptionalTensor mask, std::string group, int64_t max_output_size, double swiglu_limit,
                  Outputs outputs) {
  require(!inputs.weight1.empty() && inputs.weight1[0].scalar_type() == at::kChar, "weight1 is not int8");
  const auto limit = static_cast<float>(swiglu_limit);
  return plan({inputs, outputs, "DispatchFFNCombine", mask, group, max_output_size, limit, 0, 0});
}

Plan sixteen_bit_weights(Inputs inputs, std::string group, int64_t max_output_size, Outputs outputs) {
  return plan({inputs, outputs, "DispatchFFNCombineBF16", std::nullopt, group, max_output_size, 0, 0, 0});
}

}  // namespace

ACLNN_OP(aclnnDispatchFFNCombine, int8_weights);
ACLNN_OP(aclnnDispatchFFNCombineBF16, sixteen_bit_weights);

}  // namespace vllm_npu::emulator::aclnn
