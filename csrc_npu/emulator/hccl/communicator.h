// Communicators. A communicator connects the processes of one group. All collectives use its exchange().
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// hccl.h does not declare its functions visible, and this library must export them.
#pragma GCC visibility push(default)
#include "hccl/hccl.h"
#pragma GCC visibility pop
#include "runtime/runtime.h"

namespace vllm_npu::emulator {

constexpr int kMaxRanks = 64;

// HCCL's codes in error texts, which programs look for. Source: CANN's list of errors (error_code.json).
inline constexpr char kLateCall[] = "EI0002: ";
inline constexpr char kDifferentCalls[] = "EI0005: ";
inline constexpr char kLateConnection[] = "EI0006: ";

struct Segment;  // the shared memory; segment.h

// What a rank publishes about its call. The ranks compare these before they use any data. If they differ, the call
// fails on every rank, and the error text shows what each rank passed.
struct Call {
  std::string operation;  // such as "HcclAllReduce"
  std::string agreed;     // must be equal on all ranks, such as "count=5 dtype=fp32 op=sum"; at most 200 bytes

  // Bytes to and from each rank. Empty for calls without a count for each peer. The bytes that rank i sends to rank j
  // must be those that rank j expects from rank i.
  std::vector<std::uint64_t> send_bytes;
  std::vector<std::uint64_t> receive_bytes;
};

struct Part {
  const char* data;
  std::uint64_t size;
};

// A piece of the bytes that all ranks publish. parts[i] has rank i's bytes from `offset` on, and is empty if there are
// none.
struct Chunk {
  std::uint64_t offset;
  std::vector<Part> parts;
  std::vector<const std::uint64_t*> send_bytes;  // each rank's Call::send_bytes, if the call has them
};

// A message to one rank, or from one rank.
struct Transfer {
  bool sends;
  char* data;
  std::uint64_t bytes;
  int peer;
  std::string facts;  // such as "count=5 dtype=fp32"; sender and receiver must pass the same
};

using ChunkReader = std::function<void(const Chunk&)>;

class EMULATOR_API Communicator {
 public:
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // COLLECTIVE: attaches to the segment of that name and waits for all ranks, at most `connect_timeout`. All later
  // calls wait at most `timeout`.
  static int open(const std::string& segment_name, int rank, int size, const std::string& name,
                  std::chrono::seconds connect_timeout, std::chrono::seconds timeout,
                  std::shared_ptr<Communicator>& communicator);

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }
  const std::string& segment_name() const { return segment_name_; }

  // Size in MB of the buffer that a real device reserves for the group. The emulator does not use the buffer. MC2's ops
  // check that it is large enough.
  std::uint32_t buffer_mb() const { return buffer_mb_; }
  void set_buffer_mb(std::uint32_t buffer_mb) { buffer_mb_ = buffer_mb; }

  // COLLECTIVE, waits for all ranks. Publishes the concatenated parts of `data`, of any size on each rank. Calls
  // `reader` with the bytes of all ranks, one piece after the other. Returns an HcclResult, and aclGetRecentErrMsg has
  // the error text. `reader` may overwrite `data` up to the end of the current piece.
  int exchange(const Call& call, const std::vector<Part>& data, const ChunkReader& reader);
  int exchange(const Call& call, const void* data, std::uint64_t bytes, const ChunkReader& reader) {
    return exchange(call, {{static_cast<const char*>(data), bytes}}, reader);
  }

  // Sends and receives messages, all at the same time. Messages with the same peer and direction keep their order.
  // Waits for the peers.
  int transfer(const char* operation, const std::vector<Transfer>& transfers);

  // HCCL_SUCCESS until the group has failed. After that, every call on the group fails.
  int failure() const;

  // Records, for a new call, the reason why the group has failed. Returns failure().
  int report_failed_before(const char* operation);

 private:
  Communicator(std::string name, std::string segment_name, int rank, int size, std::chrono::seconds timeout);

  int wait_for_all(const char* operation, std::chrono::seconds timeout, const char* late = kLateCall);
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
  std::vector<std::mutex> channel_mutexes_;  // first those of messages to each rank, then those from each rank
  std::uint64_t barriers_ = 0;               // number of barriers that this rank has entered
  std::uint64_t exchanges_ = 0;              // number of exchanges that this rank has started
  std::uint64_t published_ = 0;              // number of pieces that this rank has published
};

// Returns the communicator of a handle. If there is none, records an error and returns null.
EMULATOR_API std::shared_ptr<Communicator> find_communicator(HcclComm handle);

// Returns this process's communicator of that name, as HcclGetCommName returns it, or null.
EMULATOR_API std::shared_ptr<Communicator> find_communicator_by_name(const std::string& name);

}  // namespace vllm_npu::emulator
