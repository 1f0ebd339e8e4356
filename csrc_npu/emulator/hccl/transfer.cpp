// Messages between two ranks. A header and then the data go through the ring buffer of the pair and direction.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "communicator.h"
#include "segment.h"
#include "waiting.h"

namespace vllm_npu::emulator {
namespace {

using Clock = std::chrono::steady_clock;

struct Header {
  char facts[64];
};

// The progress of one transfer.
struct Progress {
  const Transfer* transfer;
  Channel* channel;
  Header header{};
  std::uint64_t done = 0;  // bytes of the header and of the data that have moved
  bool header_was_checked = false;

  std::uint64_t total() const { return sizeof(Header) + transfer->bytes; }
  bool is_done() const { return done == total(); }

  // The address of the next byte to read or write. `contiguous` receives the number of bytes that lie side by side from
  // it.
  char* position(std::uint64_t& contiguous) {
    if (done < sizeof(Header)) {
      contiguous = sizeof(Header) - done;
      return reinterpret_cast<char*>(&header) + done;
    }
    contiguous = total() - done;
    return transfer->data + (done - sizeof(Header));
  }

  // Writes as many bytes as the ring has room for, or reads all that it holds. Returns whether any byte moved.
  bool advance() {
    bool moved = false;
    while (!is_done()) {
      std::uint64_t bytes = 0;
      char* mine = position(bytes);
      const std::uint64_t written = channel->written;
      const std::uint64_t read = channel->read;
      const std::uint64_t at = transfer->sends ? written : read;
      const std::uint64_t ready = transfer->sends ? kChannelBytes - (written - read) : written - read;
      bytes = std::min({bytes, ready, kChannelBytes - at % kChannelBytes});
      if (bytes == 0) break;
      char* ring = channel->bytes + at % kChannelBytes;
      if (transfer->sends) {
        std::memcpy(ring, mine, bytes);
        channel->written = written + bytes;
      } else {
        std::memcpy(mine, ring, bytes);
        channel->read = read + bytes;
      }
      done += bytes;
      moved = true;
      if (done == sizeof(Header)) break;  // the receiver checks it before it takes data
    }
    return moved;
  }
};

}  // namespace

int Communicator::wait_for_channels(const char* operation, std::uint32_t seen, Clock::time_point deadline,
                                    const std::vector<int>& waited_for) {
  if (failure() != HCCL_SUCCESS) return report_failed_before(operation);
  sleep_while_equal(segment_->channel_changes, seen, kLongestSleep);
  if (segment_->channel_changes != seen) return HCCL_SUCCESS;
  const std::string ended = ended_processes(waited_for);
  if (segment_->channel_changes != seen) return HCCL_SUCCESS;  // the peer sent or received before it ended
  const std::string who = list_ranks(waited_for);
  if (!ended.empty()) return declare_failed(HCCL_E_INTERNAL, operation, who + " did not take part" + ended);
  if (Clock::now() < deadline) return HCCL_SUCCESS;
  return declare_failed(HCCL_E_TIMEOUT, operation,
                        kLateCall + who + " did not take part within " + std::to_string(timeout_.count()) +
                            " s; look for what they do instead, or raise HCCL_EXEC_TIMEOUT");
}

int Communicator::transfer(const char* operation, const std::vector<Transfer>& transfers) {
  std::set<std::size_t> mutexes;  // a set, so that they are always locked in the same order
  for (const Transfer& each : transfers) mutexes.insert(each.peer + (each.sends ? 0 : size_));
  std::vector<std::unique_lock<std::mutex>> locks;
  for (const std::size_t mutex : mutexes) locks.emplace_back(channel_mutexes_[mutex]);

  std::vector<Progress> all;
  for (const Transfer& each : transfers) {
    Progress progress{
        &each, each.sends ? &segment_->channel(size_, rank_, each.peer) : &segment_->channel(size_, each.peer, rank_)};
    if (each.sends) std::snprintf(progress.header.facts, sizeof progress.header.facts, "%s", each.facts.c_str());
    all.push_back(progress);
  }

  auto deadline = Clock::now() + timeout_;
  while (true) {
    const std::uint32_t seen = segment_->channel_changes;
    bool moved = false;
    std::set<const Channel*> busy;  // a message starts when the one before it in its channel is done
    std::vector<int> waited_for;
    for (Progress& each : all) {
      if (each.is_done() || busy.count(each.channel) != 0) continue;
      moved |= each.advance();
      if (!each.transfer->sends && !each.header_was_checked && each.done >= sizeof(Header)) {
        each.header_was_checked = true;
        if (each.transfer->facts != each.header.facts) {
          return declare_failed(HCCL_E_PARA, operation,
                                std::string(kDifferentCalls) + "rank " + std::to_string(each.transfer->peer) +
                                    " sends " + each.header.facts + " to rank " + std::to_string(rank_) +
                                    ", which expects " + each.transfer->facts);
        }
      }
      if (each.is_done()) continue;
      busy.insert(each.channel);
      waited_for.push_back(each.transfer->peer);
    }
    if (moved) {
      change_and_wake(segment_->channel_changes);
      deadline = Clock::now() + timeout_;
      continue;
    }
    if (waited_for.empty()) return HCCL_SUCCESS;
    std::sort(waited_for.begin(), waited_for.end());
    waited_for.erase(std::unique(waited_for.begin(), waited_for.end()), waited_for.end());
    if (const int code = wait_for_channels(operation, seen, deadline, waited_for)) return code;
  }
}

}  // namespace vllm_npu::emulator
