// Streams run their work in order, on the calling thread or on a thread of the stream.
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

class Graph;
struct TaskGroup;
struct TaskUpdate;

// The earliest time at which work of an asynchronous stream starts.
enum class Pace {
  kRandom,  // sometimes after a short delay, which the stream's seeded generator draws
  kLate,    // always so late that a host that does not wait sees the old values
  kAtOnce,
};

enum class Place { kCaller, kStreamThread };

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(int device, int id);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int device() const { return device_; }
  int id() const { return id_; }

  // See enqueue() in runtime.h. While the stream is captured, the work goes into the graph and does not run.
  int enqueue(const char* name, Work work, Pace pace = Pace::kRandom, Place place = Place::kCaller,
              Addresses memory = {});

  // Waits for the work that was enqueued so far, then returns and clears the device's kept error. Fails after
  // `timeout`.
  int synchronize(std::optional<std::chrono::milliseconds> timeout = std::nullopt);

  bool is_idle();

  // Drops work that has not started. Ends the stream's thread when the current piece of work is done.
  void drop_pending_work();

  // Ends the stream's thread when all work is done.
  void close();

  // --- Graphs (graph.h) ---

  // The graph that the stream is captured into, or null.
  std::shared_ptr<Graph> capture();
  void set_capture(std::shared_ptr<Graph> graph);

  // Whether work is recorded and not run: by a capture, or by an update of a group of tasks.
  bool records_work();

  // Returns ACL_SUCCESS, or an error if the stream records work. The capture goes on, as on an NPU (torch_npu's
  // test_aclgraph_rng_state.py).
  int refuse_while_captured(const char* what, int code = ACL_ERROR_RT_STREAM_CAPTURED);

  // Between these calls, work is recorded as the new tasks of the group. end_update returns null without a begin.
  int begin_update(const TaskGroup& group);
  std::unique_ptr<TaskUpdate> end_update();

  // Runs work of a graph that this stream recorded. As on an NPU, a replay occupies only the stream that it was given, and
  // this stream may do other work meanwhile. Asynchronous mode: pause() waits before it for a random time.
  int run_in_graph(const Work& work);
  void pause();

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
  std::chrono::microseconds random_delay();

  const int device_;
  const int id_;
  std::recursive_mutex running_;  // held while work runs, on any thread

  std::mutex mutex_;  // guards the members below
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::uint64_t enqueued_ = 0;
  std::uint64_t finished_ = 0;
  bool closing_ = false;
  bool has_thread_ = false;
  std::mt19937_64 random_;
  std::shared_ptr<Graph> capture_;
  std::unique_ptr<TaskUpdate> update_;
};

// Returns the live stream of a handle. A null handle selects the current device's default stream. If the handle is
// unknown or no device is set, returns null, records an error, and sets `code` to the code that the caller should
// return.
std::shared_ptr<Stream> find_stream(aclrtStream handle, int& code);

aclrtStream add_stream(int device);
std::shared_ptr<Stream> remove_stream(aclrtStream handle);
std::vector<std::shared_ptr<Stream>> streams_of_device(int device);

// Waits for all streams of the device that are not captured, then returns and clears its kept error.
int synchronize_device(int device, std::optional<std::chrono::milliseconds> timeout = std::nullopt);

// Returns the first error of work on streams' threads of the device since the last call, or ACL_SUCCESS. Records its
// text for the calling thread.
int take_kept_error(int device);

// Waits for all streams of all devices that are not captured.
void synchronize_everything();

}  // namespace vllm_npu::emulator
