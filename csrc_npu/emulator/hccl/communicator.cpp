#include "communicator.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>

#include "segment.h"
#include "waiting.h"

namespace vllm_npu::emulator {
namespace {

using Clock = std::chrono::steady_clock;

std::uint64_t process_namespace() {
  struct stat status{};
  return stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

// Whether the process has ended. A zombie has ended too.
bool has_ended(pid_t process) {
  if (kill(process, 0) != 0 && errno == ESRCH) return true;
  std::ifstream status("/proc/" + std::to_string(process) + "/stat");
  std::string text;
  std::getline(status, text);
  const std::size_t name_end = text.rfind(')');  // "PID (NAME) STATE ..."
  return name_end != std::string::npos && name_end + 2 < text.size() && text[name_end + 2] == 'Z';
}

template <std::size_t Bytes>
void copy_text(char (&destination)[Bytes], const std::string& text) {
  std::snprintf(destination, Bytes, "%s", text.c_str());
}

// Opens the segment, or creates it with `bytes`. The ranks attach in any order. An existing segment keeps its size,
// because other ranks have mapped it, and `bytes` receives this size.
Segment* map_segment(const std::string& name, std::size_t& bytes, std::string& fault) {
  const int descriptor = shm_open(name.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR);
  if (descriptor < 0) {
    fault = "cannot open the shared memory " + name + ": " + std::strerror(errno);
    return nullptr;
  }
  void* mapped = MAP_FAILED;
  struct stat status{};
  if (flock(descriptor, LOCK_EX) == 0 && fstat(descriptor, &status) == 0 && status.st_uid == geteuid()) {
    if (status.st_size != 0) bytes = static_cast<std::size_t>(status.st_size);
    if (status.st_size != 0 || ftruncate(descriptor, static_cast<off_t>(bytes)) == 0) {
      mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, /*offset=*/0);
    }
    flock(descriptor, LOCK_UN);  // closing alone would not unlock: the mapping keeps the lock
  }
  if (mapped == MAP_FAILED) {
    fault = "cannot use the shared memory " + name + ": " + std::strerror(errno);
  }
  close(descriptor);
  return mapped == MAP_FAILED ? nullptr : static_cast<Segment*>(mapped);
}

// Copies one piece of the concatenated parts.
void copy_piece(const std::vector<Part>& parts, std::uint64_t offset, char* piece) {
  std::uint64_t start = 0;
  for (const Part& part : parts) {
    const std::uint64_t from = std::max(offset, start);
    const std::uint64_t to = std::min<std::uint64_t>(offset + kPieceBytes, start + part.size);
    if (from < to) std::memcpy(piece + (from - offset), part.data + (from - start), to - from);
    start += part.size;
  }
}

}  // namespace

Communicator::Communicator(std::string name, std::string segment_name, int rank, int size, std::chrono::seconds timeout)
    : name_(std::move(name)),
      segment_name_(std::move(segment_name)),
      rank_(rank),
      size_(size),
      timeout_(timeout),
      channel_mutexes_(2 * static_cast<std::size_t>(std::clamp(size, 0, kMaxRanks))) {}

Communicator::~Communicator() {
  if (segment_ != nullptr) munmap(segment_, segment_bytes_);
}

int Communicator::open(const std::string& segment_name, int rank, int size, const std::string& name,
                       std::chrono::seconds connect_timeout, std::chrono::seconds timeout,
                       std::shared_ptr<Communicator>& communicator) {
  static const char* const kOperation = "HcclCommInit";
  communicator.reset(new Communicator(name, segment_name, rank, size, timeout));
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size) {
    return communicator->report(HCCL_E_PARA, kOperation,
                                "rank " + std::to_string(rank) + " of " + std::to_string(size) +
                                    " ranks: the emulator takes 1 to " + std::to_string(kMaxRanks) + " ranks");
  }
  std::string fault;
  communicator->segment_bytes_ = Segment::bytes_for(size);
  Segment* segment = map_segment(segment_name, communicator->segment_bytes_, fault);
  if (segment == nullptr) return communicator->report(HCCL_E_SYSCALL, kOperation, fault);
  communicator->segment_ = segment;

  const int size_of_others = Segment::size_for(communicator->segment_bytes_);
  if (size_of_others != size) {
    return communicator->declare_failed(HCCL_E_PARA, kOperation,
                                        "this rank says that the group has " + std::to_string(size) +
                                            " ranks, others say " + std::to_string(size_of_others));
  }
  RankArea& mine = segment->ranks[rank];
  mine.process_namespace = process_namespace();
  std::uint64_t process_before = 0;
  if (!mine.process.compare_exchange_strong(process_before, getpid())) {
    return communicator->declare_failed(
        HCCL_E_PARA, kOperation, "process " + std::to_string(process_before) + " has taken the same rank before");
  }
  const int code = communicator->wait_for_all(kOperation, connect_timeout, kLateConnection);
  // All ranks have mapped the memory. Remove its name, so that nothing is left when the processes end, or are killed.
  if (code != HCCL_SUCCESS || rank == 0) shm_unlink(segment_name.c_str());
  return code;
}

std::string Communicator::list_ranks(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  return text;
}

// Records the error with the operation, the group and the rank.
int Communicator::report(int code, const char* operation, const std::string& what) {
  return fail(code, "%s on group '%s' failed on rank %d: %s", operation, name_.c_str(), rank_, what.c_str());
}

// Records the error and marks the group as failed. All other calls on the group, waiting or later, fail too.
int Communicator::declare_failed(int code, const char* operation, const std::string& what) {
  report(code, operation, what);
  std::uint32_t expected = kSound;
  if (segment_->failure_state.compare_exchange_strong(expected, kFailing)) {
    segment_->failure_code = code;
    copy_text(segment_->failure_text, "rank " + std::to_string(rank_) + " in " + operation + ": " + what);
    segment_->failure_state = kFailed;
  }
  wake_all(segment_->barrier_generation);
  change_and_wake(segment_->channel_changes);
  return code;
}

int Communicator::report_failed_before(const char* operation) {
  return report(segment_->failure_code, operation, std::string("the group has failed: ") + segment_->failure_text);
}

int Communicator::failure() const {
  return segment_ != nullptr && segment_->failure_state == kFailed ? segment_->failure_code : HCCL_SUCCESS;
}

// Returns a text such as "; the process of rank 1 has ended" for those of `ranks` that have ended, or "".
std::string Communicator::ended_processes(const std::vector<int>& ranks) const {
  std::vector<int> ended;
  for (const int rank : ranks) {
    const RankArea& area = segment_->ranks[rank];
    const auto process = static_cast<pid_t>(area.process.load());
    if (process != 0 && area.process_namespace == process_namespace() && has_ended(process)) ended.push_back(rank);
  }
  return ended.empty() ? "" : "; the process of " + list_ranks(ended) + " has ended";
}

// A barrier. It sleeps, and checks from time to time whether the processes of the missing ranks are alive.
int Communicator::wait_for_all(const char* operation, std::chrono::seconds timeout, const char* late) {
  const auto deadline = Clock::now() + timeout;
  const std::uint32_t generation = segment_->barrier_generation;
  segment_->ranks[rank_].barriers = ++barriers_;
  if (segment_->arrived.fetch_add(1) + 1 == static_cast<std::uint32_t>(size_)) {
    segment_->arrived = 0;
    change_and_wake(segment_->barrier_generation);
    return HCCL_SUCCESS;
  }
  while (segment_->barrier_generation == generation) {
    if (failure() != HCCL_SUCCESS) return report_failed_before(operation);
    sleep_while_equal(segment_->barrier_generation, generation, kLongestSleep);
    if (segment_->barrier_generation != generation) break;

    std::vector<int> missing;
    for (int rank = 0; rank < size_; ++rank) {
      if (segment_->ranks[rank].barriers < barriers_) missing.push_back(rank);
    }
    const bool timed_out = Clock::now() >= deadline;
    const std::string ended = missing.empty() ? "" : ended_processes(missing);
    if (!timed_out && ended.empty()) continue;
    const std::string missed = list_ranks(missing) + " did not make the call";
    if (!ended.empty()) return declare_failed(HCCL_E_INTERNAL, operation, missed + ended);
    return declare_failed(HCCL_E_TIMEOUT, operation,
                          late + missed + " within " + std::to_string(timeout.count()) +
                              " s; look for what they do instead, or raise HCCL_EXEC_TIMEOUT (HCCL_CONNECT_TIMEOUT "
                              "while a group is made)");
  }
  return HCCL_SUCCESS;
}

// All ranks read the same records, so all come to the same result.
int Communicator::check_agreement(const Call& call, unsigned record_side) {
  std::map<std::string, std::vector<int>> ranks_by_words;
  for (int rank = 0; rank < size_; ++rank) {
    const Record& record = segment_->ranks[rank].records[record_side];
    ranks_by_words[std::string(record.operation) + " " + record.agreed].push_back(rank);
  }
  std::string disagreement;
  if (ranks_by_words.size() > 1) {
    for (const auto& [words, ranks] : ranks_by_words) {
      disagreement += (disagreement.empty() ? "" : "; ") + list_ranks(ranks) + ": " + words;
    }
    return report(HCCL_E_PARA, call.operation.c_str(),
                  std::string(kDifferentCalls) + "the ranks made different calls: " + disagreement);
  }
  for (int sender = 0; sender < size_; ++sender) {
    const Record& sent = segment_->ranks[sender].records[record_side];
    for (int receiver = 0; sent.has_counts != 0 && receiver < size_; ++receiver) {
      const Record& expected = segment_->ranks[receiver].records[record_side];
      if (sent.send_bytes[receiver] == expected.receive_bytes[sender]) continue;
      disagreement += (disagreement.empty() ? "" : "; ") + std::string("rank ") + std::to_string(sender) + " sends " +
                      std::to_string(sent.send_bytes[receiver]) + " bytes to rank " + std::to_string(receiver) +
                      ", which expects " + std::to_string(expected.receive_bytes[sender]);
    }
  }
  if (disagreement.empty()) return HCCL_SUCCESS;
  return report(HCCL_E_PARA, call.operation.c_str(),
                std::string(kDifferentCalls) + "the counts do not match: " + disagreement);
}

int Communicator::exchange(const Call& call, const std::vector<Part>& data, const ChunkReader& reader) {
  const std::lock_guard<std::mutex> lock(exchange_mutex_);
  const char* operation = call.operation.c_str();
  if (failure() != HCCL_SUCCESS) return report_failed_before(operation);

  std::uint64_t bytes = 0;
  for (const Part& part : data) bytes += part.size;
  const unsigned record_side = exchanges_++ % 2;
  RankArea& mine = segment_->ranks[rank_];
  Record& record = mine.records[record_side];
  copy_text(record.operation, call.operation);
  copy_text(record.agreed, call.agreed);
  record.total_bytes = bytes;
  record.has_counts = !call.send_bytes.empty();
  std::copy(call.send_bytes.begin(), call.send_bytes.end(), record.send_bytes);
  std::copy(call.receive_bytes.begin(), call.receive_bytes.end(), record.receive_bytes);

  std::uint64_t most_bytes = bytes;
  Chunk chunk{0, std::vector<Part>(size_), std::vector<const std::uint64_t*>(size_)};
  do {
    const unsigned side = published_++ % 2;
    copy_piece(data, chunk.offset, mine.pieces[side]);
    if (const int code = wait_for_all(operation, timeout_)) return code;
    if (chunk.offset == 0) {
      if (const int code = check_agreement(call, record_side)) return code;
    }
    for (int rank = 0; rank < size_; ++rank) {
      const std::uint64_t total = segment_->ranks[rank].records[record_side].total_bytes;
      most_bytes = std::max(most_bytes, total);
      const std::uint64_t left = total > chunk.offset ? total - chunk.offset : 0;
      chunk.send_bytes[rank] = segment_->ranks[rank].records[record_side].send_bytes;
      chunk.parts[rank] = {segment_->ranks[rank].pieces[side], std::min<std::uint64_t>(kPieceBytes, left)};
    }
    reader(chunk);
    chunk.offset += kPieceBytes;
  } while (chunk.offset < most_bytes);
  return HCCL_SUCCESS;
}

}  // namespace vllm_npu::emulator
