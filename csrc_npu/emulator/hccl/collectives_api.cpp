// HCCL's collectives. Each makes one call of Communicator::exchange.
#include <algorithm>
#include <cstring>
#include <string>

#include "communicator.h"
#include "data_types.h"
#include "group.h"

using namespace vllm_npu::emulator;

namespace {

using Counts = std::vector<std::uint64_t>;

// One call of a collective. It first checks what it can without the other ranks, then runs on the stream.
class Collective {
 public:
  Collective(const char* function, HcclComm handle, aclrtStream stream)
      : function_(function), stream_(stream), communicator_(find_communicator(handle)) {
    call_.operation = function;
    if (communicator_ == nullptr) code_ = HCCL_E_PARA;
  }

  int rank() const { return communicator_ == nullptr ? 0 : communicator_->rank(); }
  int size() const { return communicator_ == nullptr ? 0 : communicator_->size(); }
  std::size_t element_bytes() const { return element_bytes_; }

  Collective& with_type(HcclDataType type) {
    element_bytes_ = size_of(type);
    if (element_bytes_ == 0) refuse("data type " + std::to_string(type) + " does not exist");
    return agree("dtype", name_of(type));
  }

  Collective& with_count(std::uint64_t count) { return agree("count", std::to_string(count)); }

  Collective& with_reduction(HcclDataType type, HcclReduceOp reduction) {
    if (!can_reduce(type, reduction)) {
      refuse(std::string("there is no reduction ") + name_of(reduction) + " of " + name_of(type));
    }
    return agree("op", name_of(reduction));
  }

  Collective& with_root(std::uint32_t root) {
    if (communicator_ != nullptr && root >= static_cast<std::uint32_t>(size())) {
      refuse("root " + std::to_string(root) + " of " + std::to_string(size()) + " ranks");
    }
    return agree("root", std::to_string(root));
  }

  // The numbers of elements to and from each rank. The ranks compare them.
  Collective& with_counts(const Counts& send, const Counts& receive) {
    for (const std::uint64_t count : send) call_.send_bytes.push_back(count * element_bytes_);
    for (const std::uint64_t count : receive) call_.receive_bytes.push_back(count * element_bytes_);
    return *this;
  }

  HcclResult run(std::vector<Part> data, ChunkReader reader) {
    if (code_ != HCCL_SUCCESS) return HcclResult(code_);
    trace(function_, "group=%s %s", communicator_->name().c_str(), call_.agreed.c_str());
    Addresses memory;
    for (const Part& part : data) memory.push_back(part.data);
    const auto exchange = [communicator = communicator_, call = call_, data = std::move(data),
                           reader = std::move(reader)] { return communicator->exchange(call, data, reader); };
    if (group_is_open()) return HcclResult(enqueue_collective_of_group(function_, stream_, exchange));
    return HcclResult(enqueue(stream_, function_, exchange, std::move(memory)));
  }

  HcclResult run(const void* data, std::uint64_t bytes, ChunkReader reader) {
    return run({{static_cast<const char*>(data), bytes}}, std::move(reader));
  }

 private:
  void refuse(const std::string& what) {
    if (code_ == HCCL_SUCCESS) code_ = fail(HCCL_E_PARA, "%s: %s", function_, what.c_str());
  }

  Collective& agree(const char* name, const std::string& value) {
    if (!call_.agreed.empty()) call_.agreed += ' ';
    call_.agreed.append(name).append("=").append(value);
    return *this;
  }

  const char* function_;
  aclrtStream stream_;
  std::shared_ptr<Communicator> communicator_;
  Call call_;
  std::size_t element_bytes_ = 0;
  int code_ = HCCL_SUCCESS;
};

// A range of the bytes that one rank publishes, and the address to which it is copied.
struct Stretch {
  std::uint64_t first;
  std::uint64_t bytes;
  char* destination;
};

// Copies the part of one rank's stretch that is in the chunk.
void copy_stretch(const Chunk& chunk, std::size_t rank, const Stretch& stretch) {
  const std::uint64_t from = std::max(chunk.offset, stretch.first);
  const std::uint64_t to = std::min(chunk.offset + chunk.parts[rank].size, stretch.first + stretch.bytes);
  if (from >= to) return;
  std::memcpy(stretch.destination + (from - stretch.first), chunk.parts[rank].data + (from - chunk.offset), to - from);
}

ChunkReader copy_stretches(std::vector<Stretch> by_rank) {
  return [by_rank = std::move(by_rank)](const Chunk& chunk) {
    for (std::size_t rank = 0; rank < by_rank.size(); ++rank) copy_stretch(chunk, rank, by_rank[rank]);
  };
}

// Reduces the bytes `first` to `first + bytes` of all ranks.
ChunkReader reduce_stretch(Stretch stretch, HcclDataType type, HcclReduceOp reduction) {
  return [=](const Chunk& chunk) {
    const std::uint64_t element = size_of(type);
    const std::uint64_t from = std::max(chunk.offset, stretch.first);
    const std::uint64_t to = std::min(chunk.offset + chunk.parts[0].size, stretch.first + stretch.bytes);
    if (from >= to) return;
    reduce(stretch.destination + (from - stretch.first), chunk, (from - chunk.offset) / element, (to - from) / element,
           type, reduction);
  };
}

void read_nothing(const Chunk&) {}

Counts read_counts(const void* counts, int size) {
  const auto* first = static_cast<const std::uint64_t*>(counts);
  return Counts(first, first + size);
}

// The start of each rank's share. The shares lie side by side in the bytes that a rank publishes.
std::vector<std::uint64_t> starts_of(const std::uint64_t* shares, std::size_t count) {
  std::vector<std::uint64_t> starts(count, 0);
  for (std::size_t i = 1; i < count; ++i) starts[i] = starts[i - 1] + shares[i - 1];
  return starts;
}

char* bytes_of(const void* pointer) { return static_cast<char*>(const_cast<void*>(pointer)); }

std::vector<Part> parts_of(const void* buffer, const Counts& counts, const Counts& displacements,
                           std::uint64_t element_bytes) {
  std::vector<Part> parts;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    parts.push_back({bytes_of(buffer) + displacements[i] * element_bytes, counts[i] * element_bytes});
  }
  return parts;
}

}  // namespace

HcclResult HcclAllReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                         HcclComm communicator, aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  collective.with_count(count).with_type(type).with_reduction(type, reduction);
  const std::uint64_t bytes = count * collective.element_bytes();
  return collective.run(send, bytes, reduce_stretch({0, bytes, bytes_of(receive)}, type, reduction));
}

HcclResult HcclReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                      uint32_t root, HcclComm communicator, aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  collective.with_count(count).with_type(type).with_reduction(type, reduction).with_root(root);
  const std::uint64_t bytes = count * collective.element_bytes();
  const bool is_root = static_cast<std::uint32_t>(collective.rank()) == root;
  return collective.run(send, bytes,
                        is_root ? reduce_stretch({0, bytes, bytes_of(receive)}, type, reduction) : read_nothing);
}

HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm communicator,
                         aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  collective.with_count(count).with_type(type).with_root(root);
  const std::uint64_t bytes = count * collective.element_bytes();
  const bool is_root = static_cast<std::uint32_t>(collective.rank()) == root;
  std::vector<Stretch> stretches(collective.size(), Stretch{0, 0, nullptr});
  if (!is_root && root < stretches.size()) stretches[root] = {0, bytes, bytes_of(buffer)};
  return collective.run(buffer, is_root ? bytes : 0, copy_stretches(std::move(stretches)));
}

HcclResult HcclScatter(void* send, void* receive, uint64_t receive_count, HcclDataType type, uint32_t root,
                       HcclComm communicator, aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  collective.with_count(receive_count).with_type(type).with_root(root);
  const std::uint64_t bytes = receive_count * collective.element_bytes();
  const bool is_root = static_cast<std::uint32_t>(collective.rank()) == root;
  std::vector<Stretch> stretches(collective.size(), Stretch{0, 0, nullptr});
  if (root < stretches.size()) stretches[root] = {bytes * collective.rank(), bytes, bytes_of(receive)};
  return collective.run(send, is_root ? bytes * collective.size() : 0, copy_stretches(std::move(stretches)));
}

HcclResult HcclReduceScatter(void* send, void* receive, uint64_t receive_count, HcclDataType type,
                             HcclReduceOp reduction, HcclComm communicator, aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  collective.with_count(receive_count).with_type(type).with_reduction(type, reduction);
  const std::uint64_t bytes = receive_count * collective.element_bytes();
  const Stretch mine{bytes * collective.rank(), bytes, bytes_of(receive)};
  return collective.run(send, bytes * collective.size(), reduce_stretch(mine, type, reduction));
}

HcclResult HcclReduceScatterV(void* send, const void* send_counts, const void* send_displacements, void* receive,
                              uint64_t receive_count, HcclDataType type, HcclReduceOp reduction, HcclComm communicator,
                              aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  const Counts counts = read_counts(send_counts, collective.size());
  const Counts displacements = read_counts(send_displacements, collective.size());
  collective.with_type(type).with_reduction(type, reduction);
  collective.with_counts(counts, Counts(counts.size(), receive_count));
  const std::uint64_t element = collective.element_bytes();
  // All ranks send the same number of elements to a rank, so its share starts at the same place in all buffers.
  std::uint64_t first = 0;
  for (int rank = 0; rank < collective.rank(); ++rank) first += counts[rank] * element;
  const Stretch mine{first, receive_count * element, bytes_of(receive)};
  return collective.run(parts_of(send, counts, displacements, element), reduce_stretch(mine, type, reduction));
}

HcclResult HcclAllGather(void* send, void* receive, uint64_t count, HcclDataType type, HcclComm communicator,
                         aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  collective.with_count(count).with_type(type);
  const std::uint64_t bytes = count * collective.element_bytes();
  std::vector<Stretch> stretches;
  for (int rank = 0; rank < collective.size(); ++rank)
    stretches.push_back({0, bytes, bytes_of(receive) + rank * bytes});
  return collective.run(send, bytes, copy_stretches(std::move(stretches)));
}

HcclResult HcclAllGatherV(void* send, uint64_t send_count, void* receive, const void* receive_counts,
                          const void* receive_displacements, HcclDataType type, HcclComm communicator,
                          aclrtStream stream) {
  Collective collective(__func__, communicator, stream);
  const Counts counts = read_counts(receive_counts, collective.size());
  const Counts displacements = read_counts(receive_displacements, collective.size());
  collective.with_type(type);
  collective.with_counts(Counts(counts.size(), send_count), counts);
  const std::uint64_t element = collective.element_bytes();
  std::vector<Stretch> stretches;
  for (std::size_t rank = 0; rank < counts.size(); ++rank) {
    stretches.push_back({0, counts[rank] * element, bytes_of(receive) + displacements[rank] * element});
  }
  return collective.run(send, send_count * element, copy_stretches(std::move(stretches)));
}

HcclResult HcclAlltoAll(const void* send, uint64_t send_count, HcclDataType send_type, const void* receive,
                        uint64_t receive_count, HcclDataType receive_type, HcclComm communicator, aclrtStream stream) {
  if (send_count * size_of(send_type) != receive_count * size_of(receive_type)) {
    return HcclResult(fail(HCCL_E_PARA, "HcclAlltoAll: sends %lu %s and receives %lu %s per rank",
                           static_cast<unsigned long>(send_count), name_of(send_type),
                           static_cast<unsigned long>(receive_count), name_of(receive_type)));
  }
  Collective collective(__func__, communicator, stream);
  collective.with_count(send_count).with_type(send_type);
  const std::uint64_t bytes = send_count * collective.element_bytes();
  std::vector<Stretch> stretches;
  for (int rank = 0; rank < collective.size(); ++rank) {
    stretches.push_back({bytes * collective.rank(), bytes, bytes_of(receive) + rank * bytes});
  }
  return collective.run(send, bytes * collective.size(), copy_stretches(std::move(stretches)));
}

namespace {

// What one rank sends or receives in an exchange with a count for each peer.
struct Shares {
  Counts counts;
  Counts displacements;
};

HcclResult exchange_shares(const char* function, const void* send, const Shares& sent, const void* receive,
                           const Shares& received, HcclDataType type, HcclComm handle, aclrtStream stream) {
  Collective collective(function, handle, stream);
  collective.with_type(type);
  collective.with_counts(sent.counts, received.counts);
  const std::uint64_t element = collective.element_bytes();
  const int me = collective.rank();
  const auto destinations = parts_of(receive, received.counts, received.displacements, element);
  const auto reader = [destinations, me](const Chunk& chunk) {
    for (std::size_t rank = 0; rank < destinations.size(); ++rank) {
      const std::uint64_t first = starts_of(chunk.send_bytes[rank], destinations.size())[me];
      copy_stretch(chunk, rank, {first, destinations[rank].size, bytes_of(destinations[rank].data)});
    }
  };
  return collective.run(parts_of(send, sent.counts, sent.displacements, element), reader);
}

}  // namespace

HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_displacements,
                         HcclDataType send_type, const void* receive, const void* receive_counts,
                         const void* receive_displacements, HcclDataType receive_type, HcclComm handle,
                         aclrtStream stream) {
  if (send_type != receive_type) {
    return HcclResult(fail(HCCL_E_PARA, "HcclAlltoAllV: sends %s and receives %s; the types must be the same",
                           name_of(send_type), name_of(receive_type)));
  }
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  const int size = communicator->size();
  return exchange_shares(__func__, send, {read_counts(send_counts, size), read_counts(send_displacements, size)},
                         receive, {read_counts(receive_counts, size), read_counts(receive_displacements, size)},
                         send_type, handle, stream);
}

// HcclAlltoAllV with one matrix of counts, which is equal on all ranks. Row i has the counts that rank i sends. The
// parts lie side by side in memory.
HcclResult HcclAlltoAllVC(const void* send, const void* send_count_matrix, HcclDataType send_type, const void* receive,
                          HcclDataType receive_type, HcclComm handle, aclrtStream stream) {
  if (send_type != receive_type) {
    return HcclResult(fail(HCCL_E_PARA, "HcclAlltoAllVC: sends %s and receives %s; the types must be the same",
                           name_of(send_type), name_of(receive_type)));
  }
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  const int size = communicator->size();
  const int me = communicator->rank();
  const Counts matrix = read_counts(send_count_matrix, size * size);
  Shares sent;
  Shares received;
  for (int rank = 0; rank < size; ++rank) {
    sent.counts.push_back(matrix[me * size + rank]);
    received.counts.push_back(matrix[rank * size + me]);
  }
  sent.displacements = starts_of(sent.counts.data(), size);
  received.displacements = starts_of(received.counts.data(), size);
  return exchange_shares(__func__, send, sent, receive, received, send_type, handle, stream);
}

HcclResult HcclBarrier(HcclComm communicator, aclrtStream stream) {
  return Collective(__func__, communicator, stream).run({}, read_nothing);
}
