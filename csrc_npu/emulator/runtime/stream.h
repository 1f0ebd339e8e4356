// Streams: work in order, on the caller's thread or, where it must not wait, on a thread of the stream's own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <vector>

#include "runtime.h"

namespace vllm_npu::emulator {

// When the work of an asynchronous stream may start, at the earliest.
enum class Pace {
  kRandom,  // sometimes a little late, by the stream's seeded generator
  kLate,    // always late enough that a host which does not wait sees the state before
  kAtOnce,
};

enum class Place { kCaller, kStreamThread };

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(int device, int id);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int device() const { return device_; }
  int id() const { return id_; }

  // See enqueue() in runtime.h.
  int enqueue(const char* name, Work work, Pace pace = Pace::kRandom, Place place = Place::kCaller);

  // Waits for the work enqueued so far, and takes the device's kept error. Gives up after `timeout`.
  int synchronize(std::optional<std::chrono::milliseconds> timeout = std::nullopt);

  bool is_idle();

  // Forgets work that has not started, then ends the stream's thread once the current piece is done.
  void drop_pending_work();

  // Ends the stream's thread once all work is done.
  void close();

 private:
  struct Task {
    const char* name;
    Work work;
    Pace pace;
  };

  int run_now(const Work& work);
  void run_tasks();
  void run_and_keep_error(const Task& task);
  void pause_before(const Task& task);

  const int device_;
  const int id_;
  std::recursive_mutex running_;  // held while work runs, on whichever thread

  std::mutex mutex_;  // guards all below, which work on the stream's thread alone uses
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::uint64_t enqueued_ = 0;
  std::uint64_t finished_ = 0;
  bool closing_ = false;
  bool has_thread_ = false;
  std::mt19937_64 random_;
};

// The live stream behind a handle; null selects the current device's default stream. On an unknown handle, or where
// no device is set, returns null and records the error: `code` receives what the caller should return.
std::shared_ptr<Stream> find_stream(aclrtStream handle, int& code);

aclrtStream add_stream(int device);
std::shared_ptr<Stream> remove_stream(aclrtStream handle);
std::vector<std::shared_ptr<Stream>> streams_of_device(int device);

// Waits for all streams of the device, and takes its kept error.
int synchronize_device(int device, std::optional<std::chrono::milliseconds> timeout = std::nullopt);

// The first error that work on streams' threads has left on the device since the last call, recorded for the calling
// thread; or ACL_SUCCESS.
int take_kept_error(int device);

// Waits for all streams of all devices.
void synchronize_everything();

}  // namespace vllm_npu::emulator
