// The shared memory of one communicator. All of it starts as zeros.
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

// A rank's side of a call; see Call.
struct Record {
  char operation[kNameBytes];
  char agreed[kAgreedBytes];
  std::uint64_t total_bytes;
  std::uint32_t has_counts;
  std::uint64_t send_bytes[kMaxRanks];
  std::uint64_t receive_bytes[kMaxRanks];
};

// One rank's part. Records and pieces alternate between two sides: a rank writes the one while others may still read
// the other, and two barriers lie between two uses of the same.
struct RankArea {
  std::atomic<std::uint64_t> process;  // its id; 0 until the rank has attached
  std::atomic<std::uint64_t> process_namespace;
  std::atomic<std::uint64_t> barriers;  // that the rank has entered
  Record records[2];
  char pieces[2][kPieceBytes];
};

// Bytes on their way from one rank to another: a ring.
struct Channel {
  std::atomic<std::uint64_t> written;
  std::atomic<std::uint64_t> read;
  char bytes[kChannelBytes];
};

enum FailureState : std::uint32_t { kSound, kFailing, kFailed };

struct Segment {
  std::atomic<std::uint32_t> arrived;
  std::atomic<std::uint32_t> barrier_generation;  // waited on
  std::atomic<std::uint32_t> channel_changes;     // waited on
  std::atomic<std::uint32_t> failure_state;
  std::int32_t failure_code;
  char failure_text[kFailureBytes];
  RankArea ranks[];  // one for each rank, then a channel from each rank to each

  static std::size_t bytes_for(int size) {
    return sizeof(Segment) + size * sizeof(RankArea) + static_cast<std::size_t>(size) * size * sizeof(Channel);
  }

  // The number of ranks that a segment of so many bytes is for; 0 if for none.
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
