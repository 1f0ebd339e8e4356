// ACL's stream calls, and host functions on streams.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "device.h"
#include "graph.h"
#include "runtime.h"
#include "stream.h"

using namespace vllm_npu::emulator;

namespace {

constexpr std::chrono::milliseconds kReportPoll{100};
constexpr std::chrono::microseconds kValuePoll{20};

std::atomic_ref<uint64_t> as_atomic(void* address) { return std::atomic_ref<uint64_t>(*static_cast<uint64_t*>(address)); }

bool is_met(uint64_t held, uint64_t value, uint32_t condition) {
  switch (condition) {
    case ACL_STREAM_WAIT_VALUE_GEQ:
      return static_cast<int64_t>(held - value) >= 0;
    case ACL_STREAM_WAIT_VALUE_EQ:
      return held == value;
    case ACL_STREAM_WAIT_VALUE_AND:
      return (held & value) != 0;
    default:
      return ~(held | value) != 0;
  }
}

std::optional<std::chrono::milliseconds> as_timeout(int32_t milliseconds) {
  if (milliseconds < 0) return std::nullopt;  // -1: no limit
  return std::chrono::milliseconds(milliseconds);
}

int create_stream(const char* function, aclrtStream* stream) {
  if (const int code = require_device(function)) return code;
  *stream = add_stream(current_device());
  trace(function, "device=%d stream=%p", current_device(), *stream);
  return ACL_SUCCESS;
}

// Switches that are stored and have no effect. The emulated chip does not detect overflows and never stops a stream.
std::mutex switches_mutex;
std::unordered_map<aclrtStream, uint32_t>& overflow_switches() {
  static auto* switches = new std::unordered_map<aclrtStream, uint32_t>;
  return *switches;
}

}  // namespace

aclError aclrtCreateStream(aclrtStream* stream) { return create_stream(__func__, stream); }

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  return create_stream(__func__, stream);
}

aclError aclrtDestroyStream(aclrtStream handle) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  code = stream->synchronize();
  stream->close();
  remove_stream(handle);
  return code;
}

aclError aclrtDestroyStreamForce(aclrtStream handle) {
  const auto stream = remove_stream(handle);
  if (stream == nullptr) return fail(ACL_ERROR_RT_STREAM_CONTEXT, "aclrtDestroyStreamForce: %p is no stream", handle);
  stream->drop_pending_work();
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  trace(__func__);
  return synchronize(stream);
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout) {
  trace(__func__);
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  return stream == nullptr ? code : stream->synchronize(as_timeout(timeout));
}

aclError aclrtSynchronizeDevice() {
  trace(__func__);
  if (const int code = refuse_in_capture(__func__)) return code;
  return synchronize_current_device();
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  trace(__func__);
  if (const int code = refuse_in_capture(__func__)) return code;
  const int code = require_device(__func__);
  return code == ACL_SUCCESS ? synchronize_device(current_device(), as_timeout(timeout)) : code;
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  if (const int captured = stream->refuse_while_captured(__func__)) return captured;
  *status = stream->is_idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  *id = stream->id();
  return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t) {
  int code = ACL_SUCCESS;
  find_stream(stream, code);
  return code;
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t on) {
  const std::lock_guard<std::mutex> lock(switches_mutex);
  overflow_switches()[stream] = on;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t* on) {
  const std::lock_guard<std::mutex> lock(switches_mutex);
  *on = overflow_switches()[stream];
  return ACL_SUCCESS;
}

// The attributes that torch_npu sets here (what a graph keeps for profilers) have no effect on results.
aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr, aclrtStreamAttrValue*) {
  int code = ACL_SUCCESS;
  find_stream(stream, code);
  return code;
}

// --- Values in device memory: torch.npu.ExternalEvent writes and awaits them, in graphs and outside ---

aclError aclrtValueWrite(void* address, uint64_t value, uint32_t, aclrtStream stream) {
  trace(__func__, "%p value=%llu", address, static_cast<unsigned long long>(value));
  return enqueue(stream, __func__, [address, value] {
    as_atomic(address) = value;
    return ACL_SUCCESS;
  });
}

aclError aclrtValueWait(void* address, uint64_t value, uint32_t condition, aclrtStream stream) {
  trace(__func__, "%p value=%llu", address, static_cast<unsigned long long>(value));
  if (condition > ACL_STREAM_WAIT_VALUE_NOR) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: there is no condition %u", __func__, condition);
  }
  return enqueue_in_background(stream, __func__, [address, value, condition] {
    while (!is_met(as_atomic(address), value, condition)) std::this_thread::sleep_for(kValuePoll);
    return ACL_SUCCESS;
  });
}

// --- Host functions: they run as work of the stream, so there are no reports for a thread that polls for them ---

aclError aclrtSubscribeReport(uint64_t, aclrtStream stream) {
  int code = ACL_SUCCESS;
  find_stream(stream, code);
  return code;
}

aclError aclrtUnSubscribeReport(uint64_t, aclrtStream stream) {
  int code = ACL_SUCCESS;
  find_stream(stream, code);
  return code;
}

aclError aclrtProcessReport(int32_t timeout) {
  std::this_thread::sleep_for(std::min(as_timeout(timeout).value_or(kReportPoll), kReportPoll));
  return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType, aclrtStream stream) {
  trace(__func__);
  return enqueue(stream, __func__, [function, argument] {
    function(argument);
    return ACL_SUCCESS;
  });
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  trace(__func__);
  return enqueue(stream, __func__, [function, argument] {
    function(argument);
    return ACL_SUCCESS;
  });
}
