// The part of the emulated device's runtime that the other folders use. Link against libascendcl.so.
//
// Device memory is host memory. Any thread of the process can read and write through a device pointer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "acl/acl.h"

#define EMULATOR_API __attribute__((visibility("default")))

namespace vllm_npu::emulator {

// --- Work on streams ---

// One piece of work of a stream. Returns ACL_SUCCESS, or an error code from fail().
using Work = std::function<int()>;

// Runs `work` on `stream` (null: the current device's default stream), after all earlier work of the stream.
//
// With synchronous streams, the default, `work` runs at once on the calling thread. The function returns what `work`
// returns, and an exception of `work` reaches the caller.
//
// With asynchronous streams, the function returns ACL_SUCCESS at once, and `work` runs later on the stream's thread. An
// error, or the text of an exception, is kept. The next call that waits for a stream or an event of the device returns
// it. So `work` must own all that it uses: capture by value, and keep tensors alive in the closure.
//
// While `work` runs, the current device is the stream's. If `work` enqueues more work on its own stream, that work runs
// at once, as a part of `work`. `name` is the name of the work in traces and error texts, such as "aclnnAdd".
//
// `memory` are addresses of device memory that the work uses. A graph checks before each replay that the memory has not
// been freed.
using Addresses = std::vector<const void*>;
EMULATOR_API int enqueue(aclrtStream stream, const char* name, Work work, Addresses memory = {});

// Enqueues work that waits for another process, such as a receive, without blocking the caller. The work always runs on
// the stream's thread. Until it is done, all other work of the stream runs there too.
EMULATOR_API int enqueue_in_background(aclrtStream stream, const char* name, Work work);

// Waits until all work that was enqueued so far is done. Returns the first error of work on streams' threads of the
// device since the last wait, and clears it.
EMULATOR_API int synchronize(aclrtStream stream);
EMULATOR_API int synchronize_current_device();

// Whether streams run on threads of their own (VLLM_NPU_EMULATOR_ASYNC is set).
EMULATOR_API bool streams_are_asynchronous();

// Whether work of the stream is recorded into a graph and does not run now (graph.h). Work that is recorded must own
// all that it uses, or use device memory by its address, because it runs at each replay.
EMULATOR_API bool records_work(aclrtStream stream);

// Returns an error if the stream records work and `what` can't be recorded.
EMULATOR_API int refuse_to_record(aclrtStream stream, const char* what);

// --- Memory ---

struct MemoryBlock {
  std::uintptr_t start;
  std::size_t size;
  int device;
  bool is_physical;  // aclrtMapMem mapped it; else aclrtMalloc allocated it
};

// Returns the device allocation that contains `pointer`. Empty for host memory.
EMULATOR_API std::optional<MemoryBlock> find_device_memory(const void* pointer);

// Whether `pointer` lies in page-locked host memory (aclrtMallocHost, aclrtHostRegister). As with CANN, only copies
// from and to page-locked memory are asynchronous. With other host memory the calling thread waits for the copy.
EMULATOR_API bool is_pinned_host_memory(const void* pointer);

// Sets memory to zero. Pages of the device's memory that the host has not backed so far stay so: they read as zeros. So a
// cache of some GiB costs neither time nor memory of the host before it is used.
EMULATOR_API void zero_memory(void* pointer, std::size_t bytes);

// Copies on `stream` as aclrtMemcpyAsync does, with `name` in the trace. In asynchronous mode a copy to the host is
// always late.
EMULATOR_API int copy_on_stream(void* destination, const void* source, std::size_t bytes, aclrtStream stream,
                                const char* name);

// --- The chip ---

enum class Family { kA2, kA3, k310P, kA5 };  // Ascend910B, Ascend910_93, Ascend310P, Ascend950

struct Soc {
  std::string name;  // as aclrtGetSocName returns it
  Family family;
  int cube_cores;
  int vector_cores;
  std::size_t memory_bytes;
  std::size_t l2_bytes;
};

// The emulated chip, which VLLM_NPU_EMULATOR_SOC names. aclInit has already refused an unknown name.
EMULATOR_API const Soc& current_soc();

// --- Traces and errors ---

// With VLLM_NPU_EMULATOR_TRACE=1, each call of trace() writes one line to standard error: "npu[RANK] NAME DETAILS".
EMULATOR_API bool tracing();
EMULATOR_API void trace(const char* name);
EMULATOR_API void trace(const char* name, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Records an error text and returns `code`. torch_npu reads the text by aclGetRecentErrMsg and adds it to its
// exceptions. The text says what is wrong, where, and what to do.
EMULATOR_API int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Returns the text that the calling thread recorded last, and keeps it. "" if there is none.
EMULATOR_API const char* last_error_text();

}  // namespace vllm_npu::emulator
