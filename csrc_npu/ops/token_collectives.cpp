// Collectives that move rows of tokens between the ranks of an HCCL group. One call packs, moves and unpacks the rows
// on the current stream, without padding.
//
// Rows travel as int8 bytes, which the collectives of every chip take. Rows to be added travel in their own type.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "hccl_library.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace vllm_npu {
namespace {

using Counts = std::vector<std::uint64_t>;

// --- Groups ---

struct Group {
  HcclComm communicator;
  std::int64_t rank;
  std::int64_t size;
  bool use_v;  // whether uneven rows use HcclAllGatherV and HcclReduceScatterV
};

std::mutex groups_mutex;

std::map<std::string, Group, std::less<>>& groups() {
  static auto* all = new std::map<std::string, Group, std::less<>>;
  return *all;
}

bool has_v_collectives() { return hccl().all_gather_v != nullptr && hccl().reduce_scatter_v != nullptr; }

// A group that is registered again replaces the earlier one. `use_v` must be equal on all ranks.
void register_group(std::string name, std::int64_t communicator, std::int64_t rank, std::int64_t size, bool use_v) {
  TORCH_CHECK_VALUE(!use_v || has_v_collectives(), "this version of HCCL lacks HcclAllGatherV or HcclReduceScatterV");
  const std::lock_guard<std::mutex> lock(groups_mutex);
  groups()[std::move(name)] = Group{reinterpret_cast<HcclComm>(communicator), rank, size, use_v};
}

Group find_group(c10::string_view name) {
  const std::lock_guard<std::mutex> lock(groups_mutex);
  const auto found = groups().find(std::string_view(name.data(), name.size()));
  TORCH_CHECK(found != groups().end(), "no HCCL group '", name, "' is registered in this process");
  return found->second;
}

// --- Calls of HCCL ---

// Runs `call` on the current stream, after the ops that torch_npu's task queue still holds.
template <typename Call>
void launch(const char* function, Call call) {
  const aclrtStream stream = c10_npu::getCurrentNPUStream().stream(false);
  at_npu::native::OpCommand::RunOpApiV2(function, [=]() -> int {
    check(call(stream), function);
    return 0;
  });
}

std::int64_t sum(at::IntArrayRef sizes) { return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0}); }

bool all_equal(at::IntArrayRef sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [&](std::int64_t each) { return each == sizes[0]; });
}

Counts scaled(at::IntArrayRef sizes, std::int64_t unit) {
  Counts counts;
  for (const std::int64_t size : sizes) counts.push_back(static_cast<std::uint64_t>(size * unit));
  return counts;
}

Counts starts_of(const Counts& counts) {
  Counts starts(counts.size(), 0);
  for (std::size_t i = 1; i < counts.size(); ++i) starts[i] = starts[i - 1] + counts[i - 1];
  return starts;
}

constexpr std::int64_t kMaxRows = 2147483647;  // routing ops number rows in int32; with it, no sum of sizes overflows

bool are_row_counts(at::IntArrayRef sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [](std::int64_t each) { return each >= 0 && each <= kMaxRows; });
}

void check_sizes(const char* what, at::IntArrayRef sizes, const Group& group) {
  TORCH_CHECK_VALUE(static_cast<std::int64_t>(sizes.size()) == group.size, what, ": ", sizes.size(),
                    " sizes for a group of ", group.size, " ranks");
  TORCH_CHECK_VALUE(are_row_counts(sizes), what, ": sizes ", sizes, " must lie in 0..", kMaxRows);
}

std::int64_t row_bytes_of(const at::Tensor& x) {
  return std::accumulate(x.sizes().begin() + 1, x.sizes().end(), x.element_size(), std::multiplies<>());
}

// New rows with the shape of x's rows, in memory for at least one row. address() needs that memory.
at::Tensor empty_rows(const at::Tensor& x, std::int64_t rows) {
  auto shape = x.sizes().vec();
  shape[0] = std::max<std::int64_t>(rows, 1);
  const at::Tensor made = at::empty(shape, x.options());
  return rows > 0 ? made : made.narrow(0, 0, 0);
}

// The address of rows from empty_rows(). data_ptr() is null for zero rows, and HCCL needs an address even then.
void* address(const at::Tensor& made) { return made.storage().mutable_data(); }

// The address of x. If x is empty, the address of `made`, from which HCCL then reads nothing.
void* address(const at::Tensor& x, const at::Tensor& made) { return x.numel() > 0 ? x.data_ptr() : address(made); }

void all_to_all_v(const Group& group, void* send, Counts send_counts, Counts send_starts, void* receive,
                  Counts receive_counts) {
  Counts receive_starts = starts_of(receive_counts);
  launch("HcclAlltoAllV", [=](aclrtStream stream) {
    return hccl().all_to_all_v(send, send_counts.data(), send_starts.data(), HCCL_DATA_TYPE_INT8, receive,
                               receive_counts.data(), receive_starts.data(), HCCL_DATA_TYPE_INT8, group.communicator,
                               stream);
  });
}

at::Tensor gather_rows(const at::Tensor& x, at::IntArrayRef sizes, const Group& group) {
  const std::int64_t row_bytes = row_bytes_of(x);
  const at::Tensor gathered = empty_rows(x, sum(sizes));
  if (gathered.numel() == 0) return gathered;  // all ranks return here
  void* send = address(x, gathered);
  void* receive = address(gathered);
  const Counts counts = scaled(sizes, row_bytes);
  const std::uint64_t own = counts[group.rank];
  const HcclComm communicator = group.communicator;
  if (all_equal(sizes)) {
    launch("HcclAllGather", [=](aclrtStream stream) {
      return hccl().all_gather(send, receive, own, HCCL_DATA_TYPE_INT8, communicator, stream);
    });
  } else if (group.use_v) {
    launch("HcclAllGatherV", [=, starts = starts_of(counts)](aclrtStream stream) {
      return hccl().all_gather_v(send, own, receive, counts.data(), starts.data(), HCCL_DATA_TYPE_INT8, communicator,
                                 stream);
    });
  } else {  // every chip can do this: each rank sends its rows to every rank
    all_to_all_v(group, send, Counts(counts.size(), own), Counts(counts.size(), 0), receive, counts);
  }
  return gathered;
}

at::Tensor exchange(const at::Tensor& x, at::IntArrayRef send_sizes, at::IntArrayRef receive_sizes,
                    const Group& group) {
  const std::int64_t row_bytes = row_bytes_of(x);
  const at::Tensor received = empty_rows(x, sum(receive_sizes));
  Counts send_counts = scaled(send_sizes, row_bytes);
  Counts send_starts = starts_of(send_counts);
  all_to_all_v(group, address(x, received), std::move(send_counts), std::move(send_starts), address(received),
               scaled(receive_sizes, row_bytes));
  return received;
}

// --- Several tensors in one message of bytes, in the layout of RowFormat in vllm_npu/core/token_layout.py ---

struct Field {
  std::int64_t start;
  std::int64_t bytes;
};

struct RowFormat {
  std::vector<Field> fields;
  std::int64_t row_bytes;

  explicit RowFormat(at::TensorList tensors) {
    const auto aligned = [](std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; };
    std::int64_t end = 0;
    std::int64_t widest = 1;
    for (const at::Tensor& tensor : tensors) {
      TORCH_CHECK_VALUE(tensor.dim() == 2, "rows that travel together must be 2-D, not ", tensor.dim(), "-D");
      const std::int64_t unit = tensor.element_size();
      fields.push_back({aligned(end, unit), tensor.size(1) * unit});
      end = fields.back().start + fields.back().bytes;
      widest = std::max(widest, unit);
    }
    row_bytes = aligned(end, widest);
  }

  bool has_no_gaps() const {
    const auto filled = [](std::int64_t total, const Field& field) { return total + field.bytes; };
    return std::accumulate(fields.begin(), fields.end(), std::int64_t{0}, filled) == row_bytes;
  }
};

// Returns views of the message's fields. A message of one tensor is the tensor itself.
std::vector<at::Tensor> unpack(const at::Tensor& message, at::TensorList like) {
  if (like.size() == 1) return {message};
  const RowFormat format(like);
  std::vector<at::Tensor> fields;
  for (std::size_t i = 0; i < like.size(); ++i) {
    fields.push_back(message.narrow(1, format.fields[i].start, format.fields[i].bytes).view(like[i].scalar_type()));
  }
  return fields;
}

// Returns the message of these tensors, by one kernel where its fields have no bytes between them. Such bytes are
// Returns the message of these tensors: one kernel where there are no bytes between its fields. Such bytes are undefined.
at::Tensor pack(at::TensorList tensors) {
  TORCH_CHECK_VALUE(!tensors.empty(), "there is no tensor to send");
  if (tensors.size() == 1) return tensors[0].contiguous();
  const std::int64_t rows = tensors[0].size(0);
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.size(0) == rows, "tensors of ", rows, " and ", tensor.size(0),
                      " rows cannot travel together");
  }
  const RowFormat format(tensors);
  if (rows > 0 && format.has_no_gaps()) {
    std::vector<at::Tensor> bytes;
    for (const at::Tensor& tensor : tensors) {
      // contiguous() leaves any stride of a column that is the only one, and view() takes 1 alone
      bytes.push_back(tensor.contiguous().as_strided(tensor.sizes(), {tensor.size(1), 1}).view(at::kByte));
    }
    return at::cat(bytes, 1);
  }
  const at::Tensor message = at::empty({rows, format.row_bytes}, tensors[0].options().dtype(at::kByte));
  const std::vector<at::Tensor> fields = unpack(message, tensors);
  for (std::size_t i = 0; i < tensors.size(); ++i) fields[i].copy_(tensors[i]);
  return message;
}

// --- Operators on NPU tensors ---

at::Tensor gather_message(at::TensorList tensors, at::IntArrayRef sizes, c10::string_view group_name) {
  const Group group = find_group(group_name);
  check_sizes("gather_tokens", sizes, group);
  const at::Tensor message = pack(tensors);
  TORCH_CHECK_VALUE(message.size(0) == sizes[group.rank], "gather_tokens: this rank has ", message.size(0),
                    " rows, but sizes ", sizes, " give it ", sizes[group.rank]);
  return gather_rows(message, sizes, group);
}

at::Tensor exchange_rows(const at::Tensor& x, at::IntArrayRef send_sizes, at::IntArrayRef receive_sizes,
                         c10::string_view group_name) {
  const Group group = find_group(group_name);
  check_sizes("exchange_rows (send)", send_sizes, group);
  check_sizes("exchange_rows (receive)", receive_sizes, group);
  TORCH_CHECK_VALUE(x.size(0) == sum(send_sizes), "exchange_rows: x has ", x.size(0), " rows, but send sizes ",
                    send_sizes, " add up to ", sum(send_sizes));
  return exchange(x.contiguous(), send_sizes, receive_sizes, group);
}

// Host sync: the counts are copied to the host, because HcclAlltoAllV takes its counts from there.
std::tuple<at::Tensor, at::Tensor> exchange_message(at::TensorList tensors, const at::Tensor& rows_per_rank,
                                                    c10::string_view group_name) {
  const Group group = find_group(group_name);
  TORCH_CHECK_VALUE(rows_per_rank.scalar_type() == at::kLong && rows_per_rank.numel() == group.size,
                    "exchange_tokens: rows_per_rank must be ", group.size, " int64 counts, one for each rank");
  const at::Tensor message = pack(tensors);
  const at::Tensor sizes = at::empty({2, group.size}, rows_per_rank.options());  // sent, received
  sizes[0].copy_(rows_per_rank.view({group.size}));
  auto* first = sizes.data_ptr<std::int64_t>();
  launch("HcclAlltoAll", [=, size = group.size, communicator = group.communicator](aclrtStream stream) {
    return hccl().all_to_all(first, 1, HCCL_DATA_TYPE_INT64, first + size, 1, HCCL_DATA_TYPE_INT64, communicator,
                             stream);
  });
  const at::Tensor on_host = sizes.to(at::kCPU);
  const auto* counts = on_host.const_data_ptr<std::int64_t>();
  const at::IntArrayRef sent(counts, group.size);
  const at::IntArrayRef received(counts + group.size, group.size);
  check_sizes("exchange_tokens (sent)", sent, group);
  TORCH_CHECK(are_row_counts(received), "exchange_tokens: the ranks announce ", received, " rows, which is impossible");
  TORCH_CHECK_VALUE(message.size(0) == sum(sent), "rows_per_rank ", sent, " add up to ", sum(sent),
                    ", but the tensors have ", message.size(0), " rows");
  return {exchange(message, sent, received, group), on_host};
}

// The sum of W parts with the same number of rows, in rank order and in float32 at least. It has the same bits in every
// run.
at::Tensor sum_in_rank_order(const at::Tensor& parts) {
  const auto type = parts.scalar_type();
  at::Tensor total =
      c10::isFloatingType(type) ? parts[0].to(at::promote_types(type, at::kFloat), false, true) : parts[0].clone();
  for (std::int64_t rank = 1; rank < parts.size(0); ++rank) total.add_(parts[rank]);
  return total.to(type);
}

// HCCL's type, for types that HCCL adds with equal and unequal sizes on every chip that has the type. Rows of other
// types are exchanged, and sum_in_rank_order adds them.
HcclDataType summed_type(c10::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return HCCL_DATA_TYPE_BFP16;
    case at::kHalf:
      return HCCL_DATA_TYPE_FP16;
    case at::kFloat:
      return HCCL_DATA_TYPE_FP32;
    case at::kShort:
      return HCCL_DATA_TYPE_INT16;
    default:
      return HCCL_DATA_TYPE_RESERVED;
  }
}

at::Tensor scatter_reduce_tokens(const at::Tensor& x, at::IntArrayRef sizes, std::int64_t rank,
                                 c10::string_view group_name) {
  const Group group = find_group(group_name);
  check_sizes("scatter_reduce_tokens", sizes, group);
  TORCH_CHECK_VALUE(rank == group.rank, "scatter_reduce_tokens: rank ", rank, " is not this rank, ", group.rank);
  TORCH_CHECK_VALUE(x.size(0) == sum(sizes), "scatter_reduce_tokens: x has ", x.size(0), " rows, but sizes ", sizes,
                    " add up to ", sum(sizes));
  const at::Tensor rows = x.contiguous();
  const std::int64_t own_rows = sizes[rank];
  const at::Tensor own = empty_rows(rows, own_rows);
  if (rows.numel() == 0) return own;  // all ranks return here
  const HcclDataType type = summed_type(x.scalar_type());
  const bool even = all_equal(sizes);
  if (type == HCCL_DATA_TYPE_RESERVED || !(even || group.use_v)) {
    const std::vector<std::int64_t> from_each(group.size, own_rows);
    auto shape = rows.sizes().vec();
    shape[0] = own_rows;
    shape.insert(shape.begin(), group.size);
    return sum_in_rank_order(exchange(rows, sizes, from_each, group).view(shape));
  }
  void* send = rows.data_ptr();
  void* receive = address(own);
  const Counts counts = scaled(sizes, rows.numel() / rows.size(0));
  const std::uint64_t own_count = counts[rank];
  const HcclComm communicator = group.communicator;
  if (even) {
    launch("HcclReduceScatter", [=](aclrtStream stream) {
      return hccl().reduce_scatter(send, receive, own_count, type, HCCL_REDUCE_SUM, communicator, stream);
    });
  } else {
    launch("HcclReduceScatterV", [=, starts = starts_of(counts)](aclrtStream stream) {
      return hccl().reduce_scatter_v(send, counts.data(), starts.data(), receive, own_count, type, HCCL_REDUCE_SUM,
                                     communicator, stream);
    });
  }
  return own;
}

// --- Operators that call the operators above: they are traced through, so the graph itself makes the views ---

template <typename Function>
auto& operator_named(const char* name) {
  static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
  return handle;
}

std::vector<at::Tensor> gather_tokens(at::TensorList tensors, c10::SymIntArrayRef sizes, c10::string_view group) {
  auto& message =
      operator_named<at::Tensor(at::TensorList, c10::SymIntArrayRef, c10::string_view)>("vllm_npu::gather_message");
  return unpack(message.call(tensors, sizes, group), tensors);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> exchange_tokens(at::TensorList tensors, const at::Tensor& rows_per_rank,
                                                                c10::string_view group) {
  auto& message =
      operator_named<std::tuple<at::Tensor, at::Tensor>(at::TensorList, const at::Tensor&, c10::string_view)>(
          "vllm_npu::exchange_message");
  auto [received, sizes] = message.call(tensors, rows_per_rank, group);
  return {unpack(received, tensors), sizes};
}

}  // namespace

TORCH_LIBRARY(vllm_npu, library) {
  library.def("set_remedies(int[] codes, str[] texts, str other) -> ()", set_remedies);
  library.def("has_v_collectives() -> bool", has_v_collectives);
  library.def("register_group(str name, int communicator, int rank, int size, bool use_v) -> ()", register_group);
  library.def("gather_message(Tensor[] tensors, SymInt[] sizes, str group) -> Tensor");
  library.def("exchange_message(Tensor[] tensors, Tensor rows_per_rank, str group) -> (Tensor, Tensor)");
  library.def("exchange_rows(Tensor x, SymInt[] send_sizes, SymInt[] receive_sizes, str group) -> Tensor");
  library.def("scatter_reduce_tokens(Tensor x, SymInt[] sizes, int rank, str group) -> Tensor");
  library.def("gather_tokens(Tensor[] tensors, SymInt[] sizes, str group) -> Tensor[]");
  library.def("exchange_tokens(Tensor[] tensors, Tensor rows_per_rank, str group) -> (Tensor[], Tensor)");
}

TORCH_LIBRARY_IMPL(vllm_npu, PrivateUse1, library) {
  library.impl("gather_message", gather_message);
  library.impl("exchange_message", exchange_message);
  library.impl("exchange_rows", exchange_rows);
  library.impl("scatter_reduce_tokens", scatter_reduce_tokens);
}

TORCH_LIBRARY_IMPL(vllm_npu, CompositeImplicitAutograd, library) {
  library.impl("gather_tokens", gather_tokens);
  library.impl("exchange_tokens", exchange_tokens);
}

// The operators have no derivative and are for inference only, like c10d's collectives.
TORCH_LIBRARY_IMPL(vllm_npu, Autograd, library) {
  for (const char* name : {"gather_message", "exchange_message", "exchange_rows", "scatter_reduce_tokens"}) {
    library.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace vllm_npu
