// Dispatch, both matrix products of the experts, the activation between them, and combine, for int8 weights and the few
// tokens of decode steps, in one operator of vllm-ascend 0.23.
//
// Source: the source distribution of vllm-ascend 0.23.0.post1, csrc/mc2/dispatch_gmm_combine_decode: the definition, the
// tiling and the kernel. The operator also takes 16-bit weights and ranks with shared experts. vllm-ascend passes
// neither, and they are not emulated. The limits are those of the tiling, and those that follow from the memory that the
// kernel addresses; the text of a refusal says which.
#include <algorithm>

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
constexpr int64_t kMaxTokens = 256;
constexpr int64_t kMaxTopK = 12;
constexpr int64_t kMaxExperts = 512;
constexpr int64_t kMaxExpertsPerRank = 24;  // half of the 48 vector cores of an A3: those that receive rows
constexpr int64_t kMinWidth = 512, kMaxWidth = 7168;
constexpr int64_t kMinColumns = 1024, kMaxColumns = 6144;
constexpr int64_t kWidthMultiple = 32;  // rows are copied in blocks of 32 bytes
constexpr int64_t kTile = 128;          // GMM1_L1N: a tile of the first product is gate or up, never both
constexpr int64_t kBlock = 8;           // float32 numbers of 32 bytes
constexpr int64_t kLastStep = 64;       // the columns from which one instruction takes the largest number
constexpr int64_t kRankOffset = 512;    // OPT_RANK_OFFSET: a rank's window begins so many bytes behind the last rank's

struct Inputs {
  at::Tensor x;                     // [M, K] float16 or bfloat16
  at::Tensor expert_ids;            // [M, top_k] int32; a negative id is no expert
  std::vector<at::Tensor> weight1;  // one [E, K, N], or E of [K, N], int8: gate, then up
  std::vector<at::Tensor> scale1;   // one [E, N], or E of [N], float32 or as x
  std::vector<at::Tensor> weight2;  // one [E, N / 2, K], or E of [N / 2, K], int8
  std::vector<at::Tensor> scale2;   // one [E, K], or E of [K], float32 or as x
  at::Tensor expert_scales;         // [M, top_k] float32
  OptionalTensor smooth_scales;     // the kernel does not read them
  OptionalTensor mask;              // [M] bool, whose number of ones counts: the first tokens take part

  using Fields =
      std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                 std::vector<at::Tensor>, at::Tensor, OptionalTensor, OptionalTensor>;
};

struct Outputs {
  at::Tensor out;                // as x
  at::Tensor expert_token_nums;  // int64, E elements: counts

  using Fields = std::tuple<at::Tensor, at::Tensor>;
};

struct Decode : Inputs, Outputs {
  std::string group;
  int64_t world_size;
  int64_t rank;
  int64_t num_experts;
  int64_t max_tokens;  // of any rank: global_bs / world_size

  bool is_stacked() const { return weight1.size() == 1 && weight1[0].dim() == 3; }
  int64_t experts_per_rank() const { return num_experts / world_size; }
  int64_t tokens() const { return x.size(0); }
  int64_t active_tokens() const { return mask ? mask->sum().item<int64_t>() : tokens(); }
  int64_t width() const { return x.size(1); }
  int64_t columns() const { return weight1[0].size(-1); }
  int64_t top_k() const { return expert_ids.size(1); }
};

at::Tensor of_expert(const std::vector<at::Tensor>& list, int64_t expert, int64_t dimensions) {
  return list[0].dim() > dimensions ? list[0][expert] : list[expert];
}

void check_weights(const Decode& op) {
  const int64_t experts = op.experts_per_rank(), inner = op.columns() / 2;
  require(op.columns() % 2 == 0, "gmm1_permuted_weight has ", op.columns(),
          " columns; it has as many for gate as for up");
  const auto check_list = [&](const std::vector<at::Tensor>& list, const char* name,
                              std::initializer_list<at::ScalarType> dtypes, std::vector<int64_t> shape) {
    require(list.size() == op.weight1.size(), name, " has ", list.size(), " tensors and gmm1_permuted_weight has ",
            op.weight1.size());
    require(op.is_stacked() || static_cast<int64_t>(list.size()) == experts, name, " has ", list.size(),
            " tensors for ", experts, " experts of a rank");
    if (op.is_stacked()) shape.insert(shape.begin(), experts);
    for (const at::Tensor& each : list) {
      require_dtype(each, name, dtypes);
      require_shape(each, name, shape);
    }
  };
  check_list(op.weight1, "gmm1_permuted_weight", {at::kChar}, {op.width(), op.columns()});
  check_list(op.scale1, "gmm1_permuted_weight_scale", {at::kFloat, op.x.scalar_type()}, {op.columns()});
  check_list(op.weight2, "gmm2_weight", {at::kChar}, {inner, op.width()});
  check_list(op.scale2, "gmm2_weight_scale", {at::kFloat, op.x.scalar_type()}, {op.width()});
}

// Whether the kernel finds the largest number of each row of the activation. It halves the row until kLastStep columns
// are left, and takes whole blocks each time, so that columns behind the last block would be left out.
bool finds_largest(int64_t inner) {
  int64_t width = inner / 2;
  while (width % kBlock == 0 && width > kLastStep) width /= 2;
  return width % kBlock == 0;
}

// Rows that travel in one half of the window, and rows that come back in the other. A place has room for the most rows
// of a rank for one expert, in x's dtype.
int64_t window_mb(const Decode& op) {
  const int64_t half = op.num_experts * op.max_tokens * op.width() * 2;
  return (2 * half + op.world_size * kRankOffset + kMb - 1) / kMb;
}

void check_limits(const Decode& op, const Communicator& group) {
  if (limits_are_off()) return;
  const char* way_out = "; VLLM_NPU_EMULATOR_LIMITS=none lets the emulator take it";
  const char* unchecked = ", which the operator does not check";
  const auto at_most = [&](const char* what, int64_t value, int64_t most) {
    require(value <= most, what, " is ", value, "; the tiling takes at most ", most, way_out);
  };
  const auto between = [&](const char* what, int64_t value, int64_t least, int64_t most) {
    require(value >= least && value <= most, what, "=", value, "; the tiling takes ", least, " to ", most, way_out);
  };
  at_most("the number of tokens", op.tokens(), kMaxTokens);
  at_most("top_k", op.top_k(), kMaxTopK);
  at_most("moe_expert_num", op.num_experts, kMaxExperts);
  at_most("the number of experts of a rank", op.experts_per_rank(), kMaxExpertsPerRank);
  between("K", op.width(), kMinWidth, kMaxWidth);
  between("N", op.columns(), kMinColumns, kMaxColumns);
  require(op.width() % kWidthMultiple == 0, "K=", op.width(), " is no multiple of ", kWidthMultiple,
          ", the bytes of a block that the kernel copies", unchecked, way_out);
  const int64_t inner = op.columns() / 2;
  require(inner % kTile == 0, "N / 2=", inner, " is no multiple of ", kTile,
          ", so a tile would hold gate and up, and the kernel takes it for gate alone", unchecked, way_out);
  require(finds_largest(inner), "N / 2=", inner,
          " does not halve into blocks of 8 columns, so the kernel would miss the largest number of a row", unchecked,
          way_out);
  require(op.tokens() <= op.max_tokens, "x has ", op.tokens(), " rows and global_bs has room for ", op.max_tokens,
          " of each rank, so rows would overlap", unchecked, way_out);
  const int64_t needed = window_mb(op);
  require(needed <= group.buffer_mb(), "HCCL_BUFFSIZE of the group ", op.group, " is ", group.buffer_mb(), " MB, and ",
          op.max_tokens, " tokens of a rank need ", needed, unchecked, "; set HCCL_BUFFSIZE=", needed, way_out);
}

void check(const Decode& op) {
  require(current_soc().family == Family::kA3, current_soc().name, " has no DispatchGmmCombineDecode");
  require_dimensions(op.x, "x", 2);
  require_dtype(op.x, "x", {at::kHalf, at::kBFloat16});
  require(op.tokens() > 0, "x has no row; the tiling takes at least 1");
  require_dimensions(op.expert_ids, "expert_ids", 2);
  require_dtype(op.expert_ids, "expert_ids", {at::kInt});
  require(op.expert_ids.size(0) == op.tokens(), "expert_ids has ", op.expert_ids.size(0), " rows and x has ",
          op.tokens());
  require_dtype(op.expert_scales, "expert_scales", {at::kFloat});
  require_shape(op.expert_scales, "expert_scales", op.expert_ids.sizes());
  if (op.mask) {
    require_dtype(*op.mask, "x_active_mask", {at::kBool});
    require_shape(*op.mask, "x_active_mask", {op.tokens()});
  }
  check_weights(op);
  require_dtype(op.out, "output", {op.x.scalar_type()});
  require_shape(op.out, "output", op.x.sizes());
  require_dtype(op.expert_token_nums, "expert_token_nums", {at::kLong});
  require_shape(op.expert_token_nums, "expert_token_nums", {op.experts_per_rank()});
}

std::vector<Message> outgoing(const Decode& op) {
  const at::Tensor ids = op.expert_ids.narrow(0, 0, op.active_tokens()).to(at::kLong).flatten();
  const at::Tensor bad = ids >= op.num_experts;
  if (bad.any().item<bool>()) {
    refuse(Code::kUnusable, "expert_ids has the id ", ids.masked_select(bad)[0].item<int64_t>(),
           "; ids must be below ", op.num_experts);
  }
  const Quantized rows = quantize_by_product(op.x.to(at::kFloat));
  return messages_to_experts(ids, rows, op.top_k(), op.experts_per_rank(), op.world_size);
}

// One expert on its rows. A product is scaled for each column, then for each row, in float32. The second one is rounded
// to x's dtype.
at::Tensor expert_output(const Decode& op, const at::Tensor& rows, const at::Tensor& row_scales, int64_t expert) {
  const auto product = [&](const at::Tensor& left, const std::vector<at::Tensor>& weights,
                           const std::vector<at::Tensor>& scales, const at::Tensor& of_rows) {
    const at::Tensor sums = at::matmul(left.to(at::kInt), of_expert(weights, expert, 2).to(at::kInt)).to(at::kFloat);
    return sums * of_expert(scales, expert, 1).to(at::kFloat) * of_rows.unsqueeze(-1);
  };
  const at::Tensor inner = swiglu_of(product(rows, op.weight1, op.scale1, row_scales));
  const at::Tensor largest = inner.abs().amax(-1);
  // The kernel would compute 0 * inf for a row of zeros.
  const at::Tensor factor = at::where(largest > 0, 1.0F / largest, 0.0F);
  const at::Tensor values = (inner * 127.0F * factor.unsqueeze(-1)).round().to(at::kChar);
  return product(values, op.weight2, op.scale2, largest * (1.0F / 127.0F)).to(op.x.scalar_type());
}

// The experts' rows for each rank: its pairs, and their rows.
std::vector<Message> compute(const Decode& op, const std::vector<Message>& received) {
  const at::Tensor slots = joined(received, kSlot);
  const at::Tensor rows = joined(received, kValues), scales = joined(received, kScales);
  op.expert_token_nums.copy_(at::bincount(slots, {}, op.experts_per_rank()));
  at::Tensor results = at::empty({slots.size(0), op.width()}, op.x.scalar_type());
  for (int64_t expert = 0; expert < op.experts_per_rank(); ++expert) {
    const at::Tensor own = (slots == expert).nonzero().squeeze(-1);
    if (own.size(0) == 0) continue;
    results.index_copy_(0, own, expert_output(op, rows.index_select(0, own), scales.index_select(0, own), expert));
  }
  std::vector<Message> messages;
  int64_t start = 0;
  for (const Message& message : received) {
    const int64_t size = message[kSlot].size(0);
    messages.push_back({message[kPair], results.narrow(0, start, size)});
    start += size;
  }
  return messages;
}

// Adds up the rows of each token in float32, in the order of its ids. Rows of tokens that took no part are not written.
void combine(const Decode& op, const std::vector<Message>& returned) {
  at::Tensor rows = at::zeros({op.tokens() * op.top_k(), op.width()}, op.x.scalar_type());
  for (const Message& message : returned) rows.index_copy_(0, message[0], message[1]);
  rows = rows.view({op.tokens(), op.top_k(), op.width()});
  at::Tensor total = at::zeros({op.tokens(), op.width()}, at::kFloat);
  for (int64_t k = 0; k < op.top_k(); ++k) {
    const at::Tensor added = rows.select(1, k).to(at::kFloat) * op.expert_scales.select(1, k).unsqueeze(-1);
    total += at::where((op.expert_ids.select(1, k) >= 0).unsqueeze(-1), added, 0.0F);
  }
  write_front(op.out, total.narrow(0, 0, op.active_tokens()));
}

Plan plan(Inputs inputs, std::string group_name, int64_t world_size, int64_t rank, int64_t num_experts,
          int64_t shared_experts, int64_t shared_ranks, int64_t quant_mode, int64_t global_bs, Outputs outputs) {
  const std::shared_ptr<Communicator> group = find_communicator_by_name(group_name);
  require(group != nullptr, "group_ep ", group_name,
          " names no HCCL communicator of this process; take the name from ProcessGroupHCCL.get_hccl_comm_name()");
  require(group->size() == world_size && group->rank() == rank, "ep_rank_size=", world_size, " and ep_rank_id=", rank,
          ", and this process is rank ", group->rank(), " of ", group->size(), " in the group ", group_name);
  require(!inputs.weight1.empty(), "gmm1_permuted_weight has no tensor");
  require(inputs.weight1[0].scalar_type() == at::kChar && shared_ranks == 0,
          "16-bit weights and ranks with shared experts are not emulated; vllm-ascend passes neither");
  require(shared_experts == 1, "shared_expert_num=", shared_experts, "; the tiling takes 1");
  require(num_experts > 0 && num_experts % world_size == 0, "moe_expert_num=", num_experts, " does not divide over ",
          world_size, " ranks");
  require(global_bs >= 0 && global_bs % world_size == 0, "global_bs=", global_bs, " does not divide over ", world_size,
          " ranks");
  require_dimensions(inputs.x, "x", 2);
  const int64_t max_tokens = global_bs == 0 ? inputs.x.size(0) : global_bs / world_size;
  const Decode op{inputs, outputs, group_name, world_size, rank, num_experts, max_tokens};
  check(op);
  check_limits(op, *group);
  const std::string agreed = c10::str("K=", op.width(), " N=", op.columns(), " experts=", num_experts, " top_k=",
                                      op.top_k(), " tokens of a rank=", max_tokens, " dtype=", op.x.scalar_type());
  return [op, agreed] {
    const ExchangeCall send{op.group, op.world_size, op.rank, "DispatchGmmCombineDecode dispatch", agreed};
    const std::vector<Message> received = exchange(send, [&] { return outgoing(op); });
    const ExchangeCall back{op.group, op.world_size, op.rank, "DispatchGmmCombineDecode combine", agreed};
    combine(op, exchange(back, [&] { return compute(op, received); }));
  };
}

}  // namespace

ACLNN_OP(aclnnDispatchGmmCombineDecode, plan);

}  // namespace vllm_npu::emulator::aclnn
