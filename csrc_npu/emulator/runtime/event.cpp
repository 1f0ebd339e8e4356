// ACL's events. An event marks a place in a stream and has a time. Other streams and the host can wait for it.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "device.h"
#include "graph.h"
#include "runtime.h"
#include "stream.h"

using namespace vllm_npu::emulator;

namespace {

// An event can be recorded several times. A wait waits for the last record before it, so records are counted.
class Event {
 public:
  std::uint64_t start_record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    captured_.reset();
    return ++records_;
  }

  // The event was last recorded into a graph. It marks a place of the graph, and nobody outside can wait for it.
  void set_captured(CapturedRecord record) {
    const std::lock_guard<std::mutex> lock(mutex_);
    captured_ = std::move(record);
  }

  std::optional<CapturedRecord> captured() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return captured_;
  }

  void finish_record(std::uint64_t record) {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_ = std::max(finished_, record);
    time_ = std::chrono::steady_clock::now();
    changed_.notify_all();
  }

  std::uint64_t last_record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return records_;
  }

  // An event that was never recorded is finished, as with CANN.
  bool is_finished() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return finished_ == records_;
  }

  void wait_for(std::uint64_t record) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return finished_ >= record; });
  }

  void start_wait() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++pending_waits_;
  }

  void finish_wait() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --pending_waits_;
  }

  bool has_pending_waits() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return pending_waits_ > 0;
  }

  // Empty if the event was not recorded, or not reached yet.
  std::optional<std::chrono::steady_clock::time_point> time() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (records_ == 0 || finished_ != records_) return std::nullopt;
    return time_;
  }

  void forget_records() {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_ = records_ = 0;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t records_ = 0;
  std::uint64_t finished_ = 0;
  int pending_waits_ = 0;
  std::optional<CapturedRecord> captured_;
  std::chrono::steady_clock::time_point time_;
};

std::mutex events_mutex;

std::unordered_map<aclrtEvent, std::shared_ptr<Event>>& events() {
  static auto* table = new std::unordered_map<aclrtEvent, std::shared_ptr<Event>>;  // outlives the streams' threads
  return *table;
}

std::shared_ptr<Event> find_event(const char* function, aclrtEvent handle, int& code) {
  const std::lock_guard<std::mutex> lock(events_mutex);
  const auto found = events().find(handle);
  if (found != events().end()) return found->second;
  code = fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no event, or one that has been destroyed", function, handle);
  return nullptr;
}

// Returns an error if the event was last recorded into a graph.
int refuse_captured(const char* function, const std::shared_ptr<Event>& event) {
  if (!event->captured()) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_EVENT_CAPTURED,
              "%s: the event was last recorded in a capture, so only streams of this capture can wait for it; record "
              "another event outside",
              function);
}

// A stream waits for an event that was recorded into a graph. If the stream is not captured, it joins the capture.
int wait_in_capture(const char* function, const std::shared_ptr<Stream>& stream, const std::shared_ptr<Event>& event) {
  const CapturedRecord record = *event->captured();
  const auto graph = record.graph.lock();
  const auto capture = stream->capture();
  if (graph == nullptr || !graph->is_capturing()) return refuse_captured(function, event);
  if (capture != nullptr && capture != graph) {
    capture->invalidate("a stream waited for an event of another capture");
    return fail(ACL_ERROR_STREAM_CAPTURE_CONFLICT, "%s: stream %d and the event belong to different captures", function,
                stream->id());
  }
  graph->add_wait(stream, record.node);
  return ACL_SUCCESS;
}

int create_event(const char* function, aclrtEvent* handle) {
  if (const int code = require_device(function)) return code;
  auto event = std::make_shared<Event>();
  const std::lock_guard<std::mutex> lock(events_mutex);
  *handle = event.get();
  events()[*handle] = event;
  return ACL_SUCCESS;
}

}  // namespace

aclError aclrtCreateEvent(aclrtEvent* event) { return create_event(__func__, event); }
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return create_event(__func__, event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { return create_event(__func__, event); }

aclError aclrtDestroyEvent(aclrtEvent handle) {
  const std::lock_guard<std::mutex> lock(events_mutex);
  if (events().erase(handle) != 0) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_INVALID_HANDLE, "aclrtDestroyEvent: %p is no event, or one that has been destroyed", handle);
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  const auto stream = event == nullptr ? nullptr : find_stream(stream_handle, code);
  if (stream == nullptr) return code;
  trace(__func__, "event=%p stream=%d", handle, stream->id());
  if (const auto graph = stream->capture()) {
    event->set_captured({graph, graph->add_record(stream)});
    return ACL_SUCCESS;
  }
  const std::uint64_t record = event->start_record();
  const auto finish = [event, record] {
    event->finish_record(record);
    return ACL_SUCCESS;
  };
  return stream->enqueue(__func__, finish, Pace::kAtOnce);
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream_handle) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  const auto stream = event == nullptr ? nullptr : find_stream(stream_handle, code);
  if (stream == nullptr) return code;
  const auto forget = [event] {
    event->forget_records();
    return ACL_SUCCESS;
  };
  return stream->enqueue(__func__, forget, Pace::kAtOnce);
}

aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  const auto stream = event == nullptr ? nullptr : find_stream(stream_handle, code);
  if (stream == nullptr) return code;
  trace(__func__, "event=%p stream=%d", handle, stream->id());
  if (event->captured()) return wait_in_capture(__func__, stream, event);
  const std::uint64_t record = event->last_record();
  if (record == 0) return ACL_SUCCESS;  // as with CANN, an event that was never recorded is finished
  if (const auto graph = stream->capture()) {
    graph->invalidate("a captured stream waited for an event that was recorded outside of the capture");
    return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                "%s: stream %d is being captured and the event was recorded outside of the capture; wait for it before "
                "the capture begins",
                __func__, stream->id());
  }
  event->start_wait();
  const auto wait = [event, record] {
    event->wait_for(record);
    event->finish_wait();
    // With synchronous streams, the caller gets the error of the work before an event that is finished.
    return streams_are_asynchronous() ? ACL_SUCCESS : take_kept_error(current_device());
  };
  // The caller never waits: what the event waits for may be enqueued by its next call.
  return stream->enqueue(__func__, wait, Pace::kAtOnce, event->is_finished() ? Place::kCaller : Place::kStreamThread);
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  if (event == nullptr) return code;
  if (const int captured = refuse_captured(__func__, event)) return captured;
  event->wait_for(event->last_record());
  return current_device() == kNoDevice ? ACL_SUCCESS : take_kept_error(current_device());
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  if (event == nullptr) return code;
  if (const int captured = refuse_captured(__func__, event)) return captured;
  *status = event->is_finished() ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  if (event == nullptr) return code;
  *status = event->has_pending_waits() ? ACL_EVENT_WAIT_STATUS_NOT_READY : ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start_handle, aclrtEvent end_handle) {
  int code = ACL_SUCCESS;
  const auto start = find_event(__func__, start_handle, code);
  const auto end = start == nullptr ? nullptr : find_event(__func__, end_handle, code);
  if (end == nullptr) return code;
  const auto from = start->time();
  const auto to = end->time();
  if (!from || !to) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
                "aclrtEventElapsedTime: the %s event is not recorded or not reached; synchronize it first",
                from ? "end" : "start");
  }
  *milliseconds = std::chrono::duration<float, std::milli>(*to - *from).count();
  return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t* timestamp) {
  int code = ACL_SUCCESS;
  const auto event = find_event(__func__, handle, code);
  if (event == nullptr) return code;
  const auto time = event->time();
  if (!time) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "%s: the event is not recorded or not reached", __func__);
  }
  *timestamp = std::chrono::duration_cast<std::chrono::microseconds>(time->time_since_epoch()).count();
  return ACL_SUCCESS;
}
