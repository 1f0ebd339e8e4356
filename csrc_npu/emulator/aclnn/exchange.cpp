#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "hccl/communicator.h"
#include "refusal.h"

namespace vllm_npu::emulator::aclnn {
namespace {

using Bytes = std::string;

void put_bytes(Bytes& out, const void* from, size_t size) { out.append(static_cast<const char*>(from), size); }

void put(Bytes& out, int64_t number) { put_bytes(out, &number, sizeof number); }

void put(Bytes& out, const std::string& text) {
  put(out, static_cast<int64_t>(text.size()));
  put_bytes(out, text.data(), text.size());
}

void put(Bytes& out, const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  put(out, static_cast<int64_t>(dense.scalar_type()));
  put(out, dense.dim());
  for (const int64_t size : dense.sizes()) put(out, size);
  put_bytes(out, dense.const_data_ptr(), dense.nbytes());
}

// Reads the values that put() wrote, in the same order.
class Reader {
 public:
  explicit Reader(const Bytes& bytes) : next_(bytes.data()) {}

  int64_t number() {
    int64_t value;
    take(&value, sizeof value);
    return value;
  }

  std::string text() {
    std::string value(static_cast<size_t>(number()), '\0');
    take(value.data(), value.size());
    return value;
  }

  at::Tensor tensor() {
    const auto type = static_cast<at::ScalarType>(number());
    std::vector<int64_t> sizes(static_cast<size_t>(number()));
    for (int64_t& size : sizes) size = number();
    at::Tensor value = at::empty(sizes, type);
    take(value.mutable_data_ptr(), value.nbytes());
    return value;
  }

 private:
  void take(void* to, size_t size) {
    if (size == 0) return;
    std::memcpy(to, next_, size);
    next_ += size;
  }

  const char* next_;
};

Bytes as_bytes(const std::string& refusal, const Message& message) {
  Bytes out;
  put(out, refusal);
  put(out, static_cast<int64_t>(message.size()));
  for (const at::Tensor& tensor : message) put(out, tensor);
  return out;
}

Message as_message(const Bytes& bytes, int64_t sender) {
  Reader reader(bytes);
  const std::string refusal = reader.text();
  if (!refusal.empty()) refuse(Code::kUnusable, "rank ", sender, " refused: ", refusal);
  Message message(static_cast<size_t>(reader.number()));
  for (at::Tensor& tensor : message) tensor = reader.tensor();
  return message;
}

// Collects the messages to one rank. Communicator::exchange shows all bytes to every rank. Each rank publishes a table
// with the start of each of its messages, and then the messages.
class Mailbox {
 public:
  Mailbox(int size, int rank) : rank_(rank), size_(size), received_(size) {}

  void read(const Chunk& chunk) {
    for (int sender = 0; sender < size_; ++sender) {
      const Part& part = chunk.parts[sender];
      if (part.size == 0) continue;
      if (chunk.offset == 0) read_table(sender, part.data);
      const Range& wanted = wanted_[sender];
      const uint64_t from = std::max(wanted.begin, chunk.offset);
      const uint64_t to = std::min(wanted.end, chunk.offset + part.size);
      if (from < to) received_[sender].append(part.data + (from - chunk.offset), to - from);
    }
  }

  const std::vector<Bytes>& received() const { return received_; }

  // Returns the messages behind their table. The table has the start of each message and the end of the last one.
  static Bytes with_table(const std::vector<Bytes>& messages) {
    Bytes table;
    uint64_t begin = (messages.size() + 1) * sizeof begin;
    put(table, static_cast<int64_t>(begin));
    for (const Bytes& message : messages) put(table, static_cast<int64_t>(begin += message.size()));
    for (const Bytes& message : messages) table += message;
    return table;
  }

 private:
  struct Range {
    uint64_t begin;
    uint64_t end;
  };

  // The whole table lies in the first piece, because pieces are much longer than tables.
  void read_table(int sender, const char* table) {
    wanted_.resize(size_);
    std::memcpy(&wanted_[sender], table + rank_ * sizeof(uint64_t), sizeof(Range));
  }

  const int rank_;
  const int size_;
  std::vector<Range> wanted_;
  std::vector<Bytes> received_;
};

std::shared_ptr<Communicator> find_group(const ExchangeCall& call) {
  const std::shared_ptr<Communicator> group = find_communicator_by_name(call.group);
  require(group != nullptr, "group_ep ", call.group,
          " names no HCCL communicator of this process; take the name from "
          "ProcessGroupHCCL.get_hccl_comm_name()");
  require(group->size() == call.world_size && group->rank() == call.rank, "ep_rank_id=", call.rank,
          " of ep_world_size=", call.world_size, " is not this process's place in group_ep ", call.group, ", which is ",
          group->rank(), " of ", group->size());
  return group;
}

}  // namespace

std::vector<Message> exchange(const ExchangeCall& call, const std::function<std::vector<Message>()>& make_messages) {
  const std::shared_ptr<Communicator> group = find_group(call);
  std::vector<Bytes> outgoing;
  std::optional<Refusal> refusal;
  try {
    for (const Message& message : make_messages()) outgoing.push_back(as_bytes("", message));
  } catch (const Refusal& mine) {
    refusal.emplace(mine);
  } catch (const c10::Error& error) {
    refusal.emplace(Code::kUnusable, error.what_without_backtrace());
  }
  if (refusal) outgoing.assign(group->size(), as_bytes(refusal->what(), {}));  // the other ranks wait for it
  const Bytes published = Mailbox::with_table(outgoing);
  Mailbox mailbox(group->size(), group->rank());
  const int code = group->exchange({call.operation, call.agreed, {}, {}}, published.data(), published.size(),
                                   [&](const Chunk& chunk) { mailbox.read(chunk); });
  if (refusal) throw *refusal;
  if (code != HCCL_SUCCESS) refuse(code == HCCL_E_PARA ? Code::kUnusable : Code::kRuntime, last_error_text());
  std::vector<Message> received;
  for (int sender = 0; sender < group->size(); ++sender) {
    received.push_back(as_message(mailbox.received()[sender], sender));
  }
  return received;
}

}  // namespace vllm_npu::emulator::aclnn
