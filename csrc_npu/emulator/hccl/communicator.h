// Communicators: the processes of one group, and the one exchange that all collectives are made of.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// hccl.h declares nothing visible; its functions are what this library is for.
#pragma GCC visibility push(default)
#include "hccl/hccl.h"
#pragma GCC visibility pop
#include "runtime/runtime.h"

namespace vllm_npu::emulator {

constexpr int kMaxRanks = 64;

struct Segment;  // the shared memory; segment.h

// What a rank says about its call. The ranks compare before any data is used; where they differ, the call fails on
// every rank, with a text that names the ranks and what each of them said.
struct Call {
  std::string operation;  // such as "HcclAllReduce"
  std::string agreed;     // must be equal on all ranks, such as "count=5 dtype=fp32 op=sum"; at most 200 bytes

  // For calls with counts of their own for each peer, else empty: bytes to and from each rank. What rank i sends to
  // rank j must be what rank j expects from rank i.
  std::vector<std::uint64_t> send_bytes;
  std::vector<std::uint64_t> receive_bytes;
};

struct Part {
  const char* data;
  std::uint64_t size;
};

// A piece of what all ranks publish: parts[i] are rank i's bytes from `offset` on (none once rank i has no more).
struct Chunk {
  std::uint64_t offset;
  std::vector<Part> parts;
  std::vector<const std::uint64_t*> send_bytes;  // each rank's Call::send_bytes, where the call has them
};

// A message to one rank, or the receipt of one.
struct Transfer {
  bool sends;
  char* data;
  std::uint64_t bytes;
  int peer;
  std::string facts;  // such as "count=5 dtype=fp32": what the sender says must be what the receiver expects
};

using ChunkReader = std::function<void(const Chunk&)>;

class EMULATOR_API Communicator {
 public:
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // COLLECTIVE: attaches to the segment of that name and waits for all ranks, at most `connect_timeout`. `timeout` is
  // that of all later calls.
  static int open(const std::string& segment_name, int rank, int size, const std::string& name,
                  std::chrono::seconds connect_timeout, std::chrono::seconds timeout,
                  std::shared_ptr<Communicator>& communicator);

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }
  const std::string& segment_name() const { return segment_name_; }

  // MB of the buffer that a device sets aside for the group. Nothing here needs it; MC2's ops check that it suffices.
  std::uint32_t buffer_mb() const { return buffer_mb_; }
  void set_buffer_mb(std::uint32_t buffer_mb) { buffer_mb_ = buffer_mb; }

  // COLLECTIVE, waits for all ranks: publishes the parts of `data`, side by side (each rank as many bytes as it likes),
  // and shows `reader` what all ranks published, piece by piece. Returns an HcclResult; the text is in
  // aclGetRecentErrMsg. `reader` may overwrite `data` up to the end of the piece that it is shown.
  int exchange(const Call& call, const std::vector<Part>& data, const ChunkReader& reader);
  int exchange(const Call& call, const void* data, std::uint64_t bytes, const ChunkReader& reader) {
    return exchange(call, {{static_cast<const char*>(data), bytes}}, reader);
  }

  // Messages to and from single ranks, all at the same time; those with the same peer and direction in their order.
  // Waits for the peers.
  int transfer(const char* operation, const std::vector<Transfer>& transfers);

  // HCCL_SUCCESS until the group has failed; then no call on it succeeds any more.
  int failure() const;

  // Records why the group has failed, for a call that can therefore not be made. Returns failure().
  int report_failed_before(const char* operation);

 private:
  Communicator(std::string name, std::string segment_name, int rank, int size, std::chrono::seconds timeout);

  int wait_for_all(const char* operation, std::chrono::seconds timeout);
  int wait_for_channels(const char* operation, std::uint32_t seen, std::chrono::steady_clock::time_point deadline,
                        const std::vector<int>& waited_for);
  int check_agreement(const Call& call, unsigned record_side);
  int report(int code, const char* operation, const std::string& what);
  int declare_failed(int code, const char* operation, const std::string& what);
  std::string ended_processes(const std::vector<int>& ranks) const;
  static std::string list_ranks(const std::vector<int>& ranks);

  const std::string name_;
  const std::string segment_name_;
  const int rank_;
  const int size_;
  const std::chrono::seconds timeout_;
  std::uint32_t buffer_mb_ = HCCL_COMM_DEFAULT_BUFFSIZE;
  Segment* segment_ = nullptr;
  std::size_t segment_bytes_ = 0;
  std::mutex exchange_mutex_;
  std::vector<std::mutex> channel_mutexes_;  // to each rank, then from each rank
  std::uint64_t barriers_ = 0;               // that this rank has entered
  std::uint64_t exchanges_ = 0;              // that this rank has started
  std::uint64_t published_ = 0;              // pieces of this rank's data
};

// The communicator behind a handle, or null with the error recorded.
EMULATOR_API std::shared_ptr<Communicator> find_communicator(HcclComm handle);

// This process's communicator of that name (as HcclGetCommName says it), or null.
EMULATOR_API std::shared_ptr<Communicator> find_communicator_by_name(const std::string& name);

}  // namespace vllm_npu::emulator
