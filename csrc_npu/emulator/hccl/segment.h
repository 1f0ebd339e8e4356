// The shared memory of one communicator. It starts as zeros.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "communicator.h"

namespace vllm_npu::emulator {

constexpr std::size_t kNameBytes = 64;
constexpr std::size_t kAgreedBytes = 256;
constexpr std::size_t kFailureBytes = 1024;
constexpr std::size_t kPieceBytes = 256 * 1024;
constexpr std::size_t kChannelBytes = 64 * 1024;

// The Call of one rank, in shared memory.
struct Record {
  char operation[kNameBytes];
  char agreed[kAgreedBytes];
  std::uint64_t total_bytes;
  std::uint32_t has_counts;
  std::uint64_t send_bytes[kMaxRanks];
  std::uint64_t receive_bytes[kMaxRanks];
};

// The area of one rank. Records and pieces alternate between two sides. A rank writes one side while others may still
// read the other. Two barriers lie between two uses of the same side.
struct RankArea {
  std::atomic<std::uint64_t> process;  // process id; 0 until the rank has attached
  std::atomic<std::uint64_t> process_namespace;
  std::atomic<std::uint64_t> barriers;  // number of barriers that the rank has entered
  Record records[2];
  char pieces[2][kPieceBytes];
};

// A ring buffer of bytes from one rank to another.
struct Channel {
  std::atomic<std::uint64_t> written;
  std::atomic<std::uint64_t> read;
  char bytes[kChannelBytes];
};

enum FailureState : std::uint32_t { kSound, kFailing, kFailed };

struct Segment {
  std::atomic<std::uint32_t> arrived;
  std::atomic<std::uint32_t> barrier_generation;  // ranks sleep on it
  std::atomic<std::uint32_t> channel_changes;     // ranks sleep on it
  std::atomic<std::uint32_t> failure_state;
  std::int32_t failure_code;
  char failure_text[kFailureBytes];
  RankArea ranks[];  // one for each rank; behind them, a channel for each pair and direction

  static std::size_t bytes_for(int size) {
    return sizeof(Segment) + size * sizeof(RankArea) + static_cast<std::size_t>(size) * size * sizeof(Channel);
  }

  // Returns the number of ranks of a segment of this size. 0 if no number of ranks has this size.
  static int size_for(std::size_t bytes) {
    int size = 1;
    while (size <= kMaxRanks && bytes_for(size) != bytes) ++size;
    return size <= kMaxRanks ? size : 0;
  }

  Channel& channel(int size, int from, int to) {
    auto* channels = reinterpret_cast<Channel*>(ranks + size);
    return channels[static_cast<std::size_t>(from) * size + to];
  }
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free,
              "the segment is shared between processes");

}  // namespace vllm_npu::emulator
