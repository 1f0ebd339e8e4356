#include "stream.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <unordered_map>

#include "device.h"
#include "graph.h"
#include "settings.h"

namespace vllm_npu::emulator {
namespace {

using std::chrono::microseconds;

constexpr int kDelayOneIn = 4;  // on average, one in four pieces of work is delayed
constexpr microseconds kLongestDelay{3000};
constexpr microseconds kLateCopyDelay{20000};
constexpr std::uint64_t kSeedStep = 0x9E3779B97F4A7C15u;  // makes the streams' seeds differ

thread_local const Stream* stream_in_progress = nullptr;

// While an object of this class lives, the thread runs work of `stream`.
class InProgress {
 public:
  explicit InProgress(const Stream* stream) : before_(stream_in_progress), device_before_(current_device()) {
    stream_in_progress = stream;
    set_current_device(stream->device());
  }
  ~InProgress() {
    stream_in_progress = before_;
    set_current_device(device_before_);
  }
  InProgress(const InProgress&) = delete;
  InProgress& operator=(const InProgress&) = delete;

 private:
  const Stream* before_;
  int device_before_;
};

// The first error of work on streams' threads, for each device. Never destroyed, like the table of streams.
class KeptErrors {
 public:
  static KeptErrors& instance() {
    static auto* errors = new KeptErrors;
    return *errors;
  }

  void keep(int device, int code, const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    first_of_device_.emplace(device, Error{code, text});
  }

  int take(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = first_of_device_.find(device);
    if (found == first_of_device_.end()) return ACL_SUCCESS;
    const Error error = found->second;
    first_of_device_.erase(found);
    return fail(error.code, "%s", error.text.c_str());
  }

 private:
  struct Error {
    int code;
    std::string text;
  };

  std::mutex mutex_;
  std::unordered_map<int, Error> first_of_device_;
};

}  // namespace

// All live streams. Never destroyed, because streams' threads may outlive main().
class StreamTable {
 public:
  static StreamTable& instance() {
    static auto* table = new StreamTable;
    return *table;
  }

  std::shared_ptr<Stream> add(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto stream = std::make_shared<Stream>(device, next_id_++);
    streams_[stream.get()] = stream;
    return stream;
  }

  std::shared_ptr<Stream> find(aclrtStream handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = streams_.find(handle);
    return found == streams_.end() ? nullptr : found->second;
  }

  std::shared_ptr<Stream> default_of(int device) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = defaults_.find(device);
      if (found != defaults_.end()) return found->second;
    }
    auto stream = add(device);
    const std::lock_guard<std::mutex> lock(mutex_);
    return defaults_.emplace(device, stream).first->second;
  }

  std::shared_ptr<Stream> remove(aclrtStream handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = streams_.find(handle);
    if (found == streams_.end()) return nullptr;
    auto stream = found->second;
    streams_.erase(found);
    return stream;
  }

  std::vector<std::shared_ptr<Stream>> all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<Stream>> streams;
    for (const auto& entry : streams_) streams.push_back(entry.second);
    return streams;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<aclrtStream, std::shared_ptr<Stream>> streams_;
  std::unordered_map<int, std::shared_ptr<Stream>> defaults_;
  int next_id_ = 0;
};

Stream::Stream(int device, int id)
    : device_(device),
      id_(id),
      random_(asynchronous_seed().value_or(0) + kSeedStep * (static_cast<std::uint64_t>(id) + 1)) {}

Stream::~Stream() = default;

int Stream::run_now(const Work& work) {
  const std::lock_guard<std::recursive_mutex> lock(running_);
  const InProgress mark(this);
  return work();
}

int Stream::run_in_graph(const Work& work) {
  const InProgress mark(this);
  return work();
}

int Stream::enqueue(const char* name, Work work, Pace pace, Place place, Addresses memory) {
  if (stream_in_progress == this) return work();
  std::unique_lock<std::mutex> lock(mutex_);
  if (capture_ != nullptr) {
    const auto graph = capture_;
    lock.unlock();
    return graph->add(shared_from_this(), {name, std::move(work), std::move(memory)}, place);
  }
  if (update_ != nullptr) {
    update_->tasks.push_back({name, std::move(work), std::move(memory)});
    return ACL_SUCCESS;
  }
  if (closing_) return fail(ACL_ERROR_RT_STREAM_CONTEXT, "%s: stream %d has been destroyed", name, id_);
  if (place == Place::kCaller && !streams_are_asynchronous() && finished_ == enqueued_) {
    lock.unlock();
    return run_now(work);
  }
  tasks_.push_back({name, std::move(work), pace});
  ++enqueued_;
  if (!has_thread_) {
    has_thread_ = true;
    std::thread([self = shared_from_this()] { self->run_tasks(); }).detach();
  }
  changed_.notify_all();
  return ACL_SUCCESS;
}

void Stream::run_tasks() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return !tasks_.empty() || closing_; });
    if (tasks_.empty()) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    if (streams_are_asynchronous()) pause_before(task);
    run_and_keep_error(task);
    task.work = nullptr;  // destroys what the work owns before waiting threads go on
    lock.lock();
    ++finished_;
    changed_.notify_all();
  }
}

void Stream::run_and_keep_error(const Task& task) {
  int code = ACL_SUCCESS;
  try {
    code = run_now(task.work);
  } catch (const std::exception& error) {
    code = fail(ACL_ERROR_INTERNAL_ERROR, "%s failed: %s", task.name, error.what());
  }
  if (code != ACL_SUCCESS) KeptErrors::instance().keep(device_, code, last_error_text());
}

void Stream::pause_before(const Task& task) {
  if (task.pace == Pace::kAtOnce) return;
  std::this_thread::sleep_for(task.pace == Pace::kLate ? kLateCopyDelay : random_delay());
}

microseconds Stream::random_delay() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (random_() % kDelayOneIn != 0) return microseconds(0);
  return microseconds(random_() % kLongestDelay.count());
}

void Stream::pause() { std::this_thread::sleep_for(random_delay()); }

int Stream::synchronize(std::optional<std::chrono::milliseconds> timeout) {
  if (stream_in_progress == this) return ACL_SUCCESS;  // earlier work is already done
  // While a group of tasks is updated, a wait is legal: with ASCEND_LAUNCH_BLOCKING=1, torch_npu waits after each op.
  if (capture() != nullptr) return refuse_while_captured("a wait for the stream");
  std::unique_lock<std::mutex> lock(mutex_);
  const std::uint64_t awaited = enqueued_;
  const auto done = [&] { return finished_ >= awaited; };
  if (!timeout) {
    changed_.wait(lock, done);
  } else if (!changed_.wait_for(lock, *timeout, done)) {
    return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "stream %d did not finish within %lld ms", id_,
                static_cast<long long>(timeout->count()));
  }
  lock.unlock();
  const std::lock_guard<std::recursive_mutex> wait_for_other_callers(running_);
  return take_kept_error(device_);
}

bool Stream::is_idle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return finished_ == enqueued_;
}

void Stream::drop_pending_work() {
  const std::lock_guard<std::mutex> lock(mutex_);
  finished_ += tasks_.size();
  tasks_.clear();
  closing_ = true;
  changed_.notify_all();
}

void Stream::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closing_ = true;
  changed_.notify_all();
}

std::shared_ptr<Graph> Stream::capture() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return capture_;
}

void Stream::set_capture(std::shared_ptr<Graph> graph) {
  const std::lock_guard<std::mutex> lock(mutex_);
  capture_ = std::move(graph);
}

bool Stream::records_work() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stream_in_progress != this && (capture_ != nullptr || update_ != nullptr);
}

int Stream::refuse_while_captured(const char* what, int code) {
  if (!records_work()) return ACL_SUCCESS;
  if (capture() != nullptr) {
    return fail(code, "%s: stream %d is being captured into a graph; do this before or after the capture", what, id_);
  }
  return fail(ACL_ERROR_STREAM_TASK_GROUP_INTR, "%s: stream %d updates a group of tasks; do this before or after", what,
              id_);
}

int Stream::begin_update(const TaskGroup& group) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (update_ != nullptr) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "stream %d updates a group of tasks already", id_);
  }
  update_ = std::make_unique<TaskUpdate>(TaskUpdate{group, {}});
  return ACL_SUCCESS;
}

std::unique_ptr<TaskUpdate> Stream::end_update() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::move(update_);
}

std::shared_ptr<Stream> find_stream(aclrtStream handle, int& code) {
  code = ACL_SUCCESS;
  if (handle == nullptr) {
    code = require_device("the default stream");
    return code == ACL_SUCCESS ? StreamTable::instance().default_of(current_device()) : nullptr;
  }
  auto stream = StreamTable::instance().find(handle);
  if (stream == nullptr) {
    code = fail(ACL_ERROR_RT_STREAM_CONTEXT, "%p is no stream, or one that has been destroyed", handle);
  }
  return stream;
}

aclrtStream add_stream(int device) { return StreamTable::instance().add(device).get(); }

std::shared_ptr<Stream> remove_stream(aclrtStream handle) { return StreamTable::instance().remove(handle); }

std::vector<std::shared_ptr<Stream>> streams_of_device(int device) {
  auto streams = StreamTable::instance().all();
  const auto elsewhere = [device](const auto& stream) { return stream->device() != device; };
  streams.erase(std::remove_if(streams.begin(), streams.end(), elsewhere), streams.end());
  return streams;
}

int synchronize_device(int device, std::optional<std::chrono::milliseconds> timeout) {
  for (const auto& stream : streams_of_device(device)) {
    if (stream->records_work()) continue;
    if (const int code = stream->synchronize(timeout)) return code;
  }
  return take_kept_error(device);
}

int take_kept_error(int device) { return KeptErrors::instance().take(device); }

void synchronize_everything() {
  for (const auto& stream : StreamTable::instance().all()) {
    if (!stream->records_work()) stream->synchronize();
  }
}

// --- runtime.h ---

bool streams_are_asynchronous() {
  static const bool asynchronous = asynchronous_seed().has_value();
  return asynchronous;
}

int enqueue(aclrtStream handle, const char* name, Work work, Addresses memory) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  return stream->enqueue(name, std::move(work), Pace::kRandom, Place::kCaller, std::move(memory));
}

int enqueue_in_background(aclrtStream handle, const char* name, Work work) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  return stream == nullptr ? code : stream->enqueue(name, std::move(work), Pace::kRandom, Place::kStreamThread);
}

int synchronize(aclrtStream handle) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  return stream == nullptr ? code : stream->synchronize();
}

int synchronize_current_device() {
  const int code = require_device("synchronize");
  return code == ACL_SUCCESS ? synchronize_device(current_device()) : code;
}

}  // namespace vllm_npu::emulator
