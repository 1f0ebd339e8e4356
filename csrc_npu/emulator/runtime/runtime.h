// What the other folders use of the emulated device's runtime. Link against libascendcl.so.
//
// Device memory is host memory: a device pointer can be read and written by any thread of the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "acl/acl.h"

#define EMULATOR_API __attribute__((visibility("default")))

namespace vllm_npu::emulator {

// --- Work on streams ---

// One piece of a stream's work. Returns ACL_SUCCESS, or an error code made with fail().
using Work = std::function<int()>;

// Runs `work` on `stream` (null: the current device's default stream), after all work that was enqueued there before.
//
// Synchronous streams, the default: runs at once, on the calling thread; returns what `work` returned. An exception
// that `work` throws reaches the caller.
// Asynchronous streams: returns ACL_SUCCESS at once and runs later on the stream's thread; an error, or the text of an
// exception, is kept and returned by the next call that waits for a stream or an event of the device. So `work` must
// own what it uses: capture by value, and keep tensors alive in the closure. Its current device is the stream's. Work
// may enqueue more work on its own stream: that part runs at once, as part of it. `name` is what traces and error texts
// call the work, such as "aclnnAdd".
EMULATOR_API int enqueue(aclrtStream stream, const char* name, Work work);

// The same for work that waits for another process and must not keep the caller from going on, such as a receive:
// always runs on the stream's thread. Until it is done, so does all other work of the stream.
EMULATOR_API int enqueue_in_background(aclrtStream stream, const char* name, Work work);

// Waits until all work enqueued so far is done. Returns the first error that work in the background has left on the
// device since the last wait, and forgets it.
EMULATOR_API int synchronize(aclrtStream stream);
EMULATOR_API int synchronize_current_device();

// Whether streams run on threads of their own (VLLM_NPU_EMULATOR_ASYNC is set).
EMULATOR_API bool streams_are_asynchronous();

// --- Memory ---

struct MemoryBlock {
  std::uintptr_t start;
  std::size_t size;
  int device;
};

// The device allocation that holds `pointer`, or nothing for host memory.
EMULATOR_API std::optional<MemoryBlock> find_device_memory(const void* pointer);

// Whether `pointer` lies in page-locked host memory (aclrtMallocHost, aclrtHostRegister). As with CANN, only copies
// from and to such memory are asynchronous; with other host memory the calling thread waits for the copy.
EMULATOR_API bool is_pinned_host_memory(const void* pointer);

// Copies on `stream` as aclrtMemcpyAsync does, and traces as `name`. In asynchronous mode a copy to the host always
// lands late.
EMULATOR_API int copy_on_stream(void* destination, const void* source, std::size_t bytes, aclrtStream stream,
                                const char* name);

// --- The chip ---

enum class Family { kA2, kA3, k310P, kA5 };  // Ascend910B, Ascend910_93, Ascend310P, Ascend950

struct Soc {
  std::string name;  // as aclrtGetSocName says it
  Family family;
  int cube_cores;
  int vector_cores;
  std::size_t memory_bytes;
  std::size_t l2_bytes;
};

// The emulated chip (VLLM_NPU_EMULATOR_SOC). An unknown name has been refused by aclInit before anybody can ask.
EMULATOR_API const Soc& current_soc();

// --- Traces and errors ---

// One line per call with VLLM_NPU_EMULATOR_TRACE=1: "npu[RANK] NAME DETAILS", on standard error.
EMULATOR_API bool tracing();
EMULATOR_API void trace(const char* name);
EMULATOR_API void trace(const char* name, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Records a text for aclGetRecentErrMsg, which torch_npu adds to its exceptions, and returns `code`.
// Say what is wrong, where, and what to do.
EMULATOR_API int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The text that the calling thread recorded last, without taking it; "" if none.
EMULATOR_API const char* last_error_text();

}  // namespace vllm_npu::emulator
