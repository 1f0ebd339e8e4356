// Matrix products of tensor parallelism with the collective before or after them.
//
// Contracts: op-plugin's documents of npu_mm_all_reduce_base, npu_all_gather_base_mm and npu_mm_reduce_scatter_base. They
// do not say in which type the ranks' products are added up. Here it is float32 in the order of the ranks, rounded once.
// That bias and x3 are added on every rank is the documents' formula.
#include "exchange.h"
#include "hccl/communicator.h"
#include "int4.h"
#include "op.h"
#include "runtime/settings.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kLeastInner = 256, kMostInner = 65535;  // exclusive; of the ops that gather or scatter

struct Collective {
  std::string group;
  std::string reduce_op;
  int64_t comm_turn;
  int64_t stream_mode;  // what to do after an error: the emulator's streams go on

  using Fields = std::tuple<std::string, std::string, int64_t, int64_t>;
};

ExchangeCall make_call(const Collective& collective, const char* operation, const at::Tensor& x1, const at::Tensor& x2) {
  const std::shared_ptr<Communicator> group = find_communicator_by_name(collective.group);
  require(group != nullptr, "hcom ", collective.group, " names no HCCL communicator of this process; take the name from "
          "ProcessGroupHCCL.get_hccl_comm_name()");
  require(collective.reduce_op == "sum", "reduce_op=", collective.reduce_op, " is not emulated; chips take sum only");
  require_one_of(collective.comm_turn, "comm_turn", {0});
  return {collective.group, group->size(), group->rank(), operation,
          c10::str("x1=", x1.sizes(), " x2=", x2.sizes(), " dtype=", x1.scalar_type())};
}

void require_ranks(const ExchangeCall& call, std::initializer_list<int64_t> chip_takes) {
  if (limits_are_off()) return;
  for (const int64_t size : chip_takes) {
    if (call.world_size == size) return;
  }
  refuse(Code::kUnusable, "the group has ", call.world_size, " ranks; ", current_soc().name, " takes ",
         at::IntArrayRef(chip_takes));
}

void check_product(const at::Tensor& x1, const at::Tensor& x2, const OptionalTensor& bias,
                   std::initializer_list<at::ScalarType> types, at::ScalarType bias_type) {
  require_dtype(x1, "x1", types);
  require_dtype(x2, "x2", {x1.scalar_type()});
  require(x1.dim() >= 2 && x2.dim() == 2 && x1.size(-1) == x2.size(0), "x1 has the shape ", x1.sizes(), " and x2 ",
          x2.sizes(), "; [..., K] times [K, N] is emulated");
  if (bias) {
    require_dtype(*bias, "bias", {bias_type});
    require_shape(*bias, "bias", {x2.size(1)});
  }
}

at::Tensor product(const at::Tensor& x1, const at::Tensor& x2, const OptionalTensor& bias) {
  const at::Tensor result = at::matmul(x1.to(at::kFloat), x2.to(at::kFloat));
  return bias ? result + bias->to(at::kFloat) : result;
}

// Sends part i of `values` to rank i, and adds up what arrives.
at::Tensor sum_of_parts(const ExchangeCall& call, const std::function<std::vector<at::Tensor>()>& make_parts) {
  const std::vector<Message> received = exchange(call, [&] {
    std::vector<Message> messages;
    for (const at::Tensor& part : make_parts()) messages.push_back({part});
    return messages;
  });
  at::Tensor sum = received[0][0];
  for (size_t rank = 1; rank < received.size(); ++rank) sum = sum + received[rank][0];
  return sum;
}

void all_reduce_into(const at::Tensor& out, const ExchangeCall& call, const std::function<at::Tensor()>& make) {
  out.copy_(sum_of_parts(call, [&] { return std::vector<at::Tensor>(call.world_size, make()); }));
}

void refuse_outside_of_a2() {
  require(current_soc().family == Family::kA2, current_soc().name, " has no npu_mm_all_reduce_base; Ascend910B has it");
}

Plan matmul_all_reduce_v2(at::Tensor x1, at::Tensor x2, OptionalTensor bias, OptionalTensor x3, Collective collective,
                          at::Tensor out) {
  refuse_outside_of_a2();
  check_product(x1, x2, bias, {at::kHalf, at::kBFloat16}, x1.scalar_type());
  if (x3) {
    require_dtype(*x3, "x3", {out.scalar_type()});
    require_shape(*x3, "x3", out.sizes());
  }
  const ExchangeCall call = make_call(collective, "MatmulAllReduce", x1, x2);
  require_ranks(call, {1, 2, 4, 8});
  return [=] {
    all_reduce_into(out, call, [&] {
      const at::Tensor mine = product(x1, x2, bias);
      return x3 ? mine + x3->to(at::kFloat) : mine;
    });
  };
}

Plan matmul_all_reduce(at::Tensor x1, at::Tensor x2, OptionalTensor bias, Collective collective, at::Tensor out) {
  return matmul_all_reduce_v2(x1, x2, bias, std::nullopt, collective, out);
}

// int8 rows and weights: (x1 @ x2 + bias) * scale * row_scale + x3.
Plan quant_matmul_all_reduce_v2(at::Tensor x1, at::Tensor x2, OptionalTensor bias, OptionalTensor x3, at::Tensor scale,
                                OptionalTensor row_scale, Collective collective, at::Tensor out) {
  refuse_outside_of_a2();
  check_product(x1, x2, bias, {at::kChar}, at::kInt);
  require_dtype(scale, "dequant_scale", {at::kLong, at::kUInt64, at::kBFloat16, at::kFloat});
  require(scale.numel() == 1 || scale.numel() == x2.size(1), "dequant_scale has the shape ", scale.sizes(), " and x2 ",
          x2.sizes());
  if (row_scale) {
    require_dtype(*row_scale, "pertoken_scale", {at::kFloat});
    require_shape(*row_scale, "pertoken_scale", {x1.numel() / x1.size(-1)});
  }
  if (x3) {
    require_dtype(*x3, "x3", {out.scalar_type()});
    require_shape(*x3, "x3", out.sizes());
  }
  require_dtype(out, "output", {at::kHalf, at::kBFloat16});
  const ExchangeCall call = make_call(collective, "QuantMatmulAllReduce", x1, x2);
  require_ranks(call, {1, 2, 4, 8});
  return [=] {
    all_reduce_into(out, call, [&] {
      at::Tensor sums = at::matmul(x1.reshape({-1, x1.size(-1)}).to(at::kInt), x2.to(at::kInt));
      if (bias) sums = sums + *bias;
      at::Tensor mine =
          sums.to(at::kFloat) * (is_packed_scale(scale) ? unpack_scale(scale) : scale.to(at::kFloat)).flatten();
      if (row_scale) mine = mine * row_scale->unsqueeze(-1);
      mine = mine.view(out.sizes());
      return x3 ? mine + x3->to(at::kFloat) : mine;
    });
  };
}

Plan quant_matmul_all_reduce(at::Tensor x1, at::Tensor x2, OptionalTensor bias, OptionalTensor x3, at::Tensor scale,
                             Collective collective, at::Tensor out) {
  return quant_matmul_all_reduce_v2(x1, x2, bias, x3, scale, std::nullopt, collective, out);
}

void check_split_product(const at::Tensor& x1, const at::Tensor& x2, const OptionalTensor& bias,
                         const ExchangeCall& call) {
  require_dimensions(x1, "x1", 2);
  check_product(x1, x2, bias, {at::kHalf, at::kBFloat16}, x1.scalar_type());
  require(limits_are_off() || (x1.size(1) >= kLeastInner && x1.size(1) < kMostInner), "x1 has rows of ", x1.size(1),
          "; they must have ", kLeastInner, " to ", kMostInner - 1, " values");
  switch (current_soc().family) {
    case Family::kA2:
      return require_ranks(call, {2, 4, 8});
    case Family::kA3:
      return require_ranks(call, {2, 4, 8, 16, 32});
    default:
      refuse(Code::kUnusable, current_soc().name, " does not have ", call.operation, " of this form");
  }
}

struct GatherOptions {
  std::string group;
  int64_t gather_index;
  int64_t comm_turn;
  int64_t stream_mode;

  using Fields = std::tuple<std::string, int64_t, int64_t, int64_t>;
};

Plan all_gather_matmul(at::Tensor x1, at::Tensor x2, OptionalTensor bias, GatherOptions options, at::Tensor out,
                       at::Tensor gathered) {
  require_one_of(options.gather_index, "gather_index", {0});
  const ExchangeCall call =
      make_call({options.group, "sum", options.comm_turn, options.stream_mode}, "AllGatherMatmul", x1, x2);
  check_split_product(x1, x2, bias, call);
  return [=] {
    const std::vector<Message> received =
        exchange(call, [&] { return std::vector<Message>(call.world_size, Message{x1}); });
    std::vector<at::Tensor> rows;
    for (const Message& message : received) rows.push_back(message[0]);
    const at::Tensor all = at::cat(rows);
    out.copy_(product(all, x2, bias));
    if (gathered.numel() > 0) gathered.copy_(all);  // without elements: not wanted
  };
}

Plan matmul_reduce_scatter(at::Tensor x1, at::Tensor x2, OptionalTensor bias, Collective collective, at::Tensor out) {
  const ExchangeCall call = make_call(collective, "MatmulReduceScatter", x1, x2);
  check_split_product(x1, x2, bias, call);
  require(x1.size(0) % call.world_size == 0, "x1 has ", x1.size(0), " rows for ", call.world_size, " ranks");
  return [=] { out.copy_(sum_of_parts(call, [&] { return product(x1, x2, bias).chunk(call.world_size); })); };
}

}  // namespace

ACLNN_OP(aclnnMatmulAllReduce, matmul_all_reduce);
ACLNN_OP(aclnnMatmulAllReduceV2, matmul_all_reduce_v2);
ACLNN_OP(aclnnQuantMatmulAllReduce, quant_matmul_all_reduce);
ACLNN_OP(aclnnQuantMatmulAllReduceV2, quant_matmul_all_reduce_v2);
ACLNN_OP(aclnnAllGatherMatmul, all_gather_matmul);
ACLNN_OP(aclnnMatmulReduceScatter, matmul_reduce_scatter);

}  // namespace vllm_npu::emulator::aclnn
