// Device memory (host memory with a capacity), page-locked host memory, copies, and virtual addresses.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "device.h"
#include "graph.h"
#include "runtime.h"
#include "stream.h"

namespace vllm_npu::emulator {
namespace {

constexpr std::size_t kPage = 4096;

std::size_t round_up_to_page(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

std::uintptr_t as_number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

struct PhysicalMemory {
  int descriptor;
  std::size_t size;
  int device;
};

// All memory that this process holds. Never destroyed, because streams' threads may outlive main().
struct Memory {
  std::mutex mutex;
  std::map<std::uintptr_t, MemoryBlock> device_blocks;
  std::map<std::uintptr_t, std::size_t> pinned_blocks;
  std::map<std::uintptr_t, std::size_t> reserved;
  std::unordered_map<int, std::size_t> used_of_device;
  std::unordered_set<PhysicalMemory*> physical;
};

Memory& memory() {
  static auto* held = new Memory;
  return *held;
}

std::size_t capacity() { return current_soc().memory_bytes; }

// Subtracts `bytes` from the device's free capacity, or records an error. The caller holds the mutex.
int take_capacity(const char* function, int device, std::size_t bytes) {
  std::size_t& used = memory().used_of_device[device];
  if (bytes > capacity() || used > capacity() - bytes) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "%s: out of memory on emulated device %d: asked for %zu bytes, %zu of %zu in use; "
                "VLLM_NPU_EMULATOR_MEMORY_GB sets the capacity",
                function, device, bytes, used, capacity());
  }
  used += bytes;
  return ACL_SUCCESS;
}

// Returns the block of `blocks` that contains the address, or end().
template <typename Blocks>
auto block_of(Blocks& blocks, std::uintptr_t address) {
  auto next = blocks.upper_bound(address);
  return next == blocks.begin() ? blocks.end() : std::prev(next);
}

// Returns the number of bytes of device memory from the address on, at most `wanted`. Physical memory that was mapped
// side by side counts as one block; two allocations are never side by side. The caller holds the mutex.
std::size_t device_bytes_from(std::uintptr_t address, std::size_t wanted) {
  std::size_t covered = 0;
  while (covered < wanted) {
    const auto block = block_of(memory().device_blocks, address + covered);
    if (block == memory().device_blocks.end()) break;
    const std::uintptr_t end = block->second.start + block->second.size;
    if (address + covered >= end) break;
    covered = end - address;
  }
  return covered;
}

// A page without access follows each allocation. The kernel often places two mappings side by side, and a kernel that
// leaves its allocation must not read or write the next one.
int allocate(const char* function, void** pointer, std::size_t bytes) {
  if (const int code = require_device(function)) return code;
  if (bytes == 0) return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: the size is 0", function);
  const int device = current_device();
  const std::size_t size = round_up_to_page(bytes);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  if (const int code = take_capacity(function, device, size)) return code;
  void* mapped =
      mmap(nullptr, size + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, /*offset=*/0);
  if (mapped == MAP_FAILED || mprotect(mapped, size, PROT_READ | PROT_WRITE) != 0) {
    memory().used_of_device[device] -= size;
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host has no %zu bytes for emulated device %d: %s", function,
                size, device, std::strerror(errno));
  }
  memory().device_blocks[as_number(mapped)] = {as_number(mapped), size, device, /*is_physical=*/false};
  *pointer = mapped;
  trace(function, "device=%d bytes=%zu -> %p", device, bytes, mapped);
  return ACL_SUCCESS;
}

// Records an error if a copy reads or writes outside of the device's memory.
int check_device_range(const char* function, const char* role, const void* pointer, std::size_t bytes,
                       bool must_be_device) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  const std::size_t covered = device_bytes_from(as_number(pointer), bytes);
  if (covered >= bytes || (covered == 0 && !must_be_device)) return ACL_SUCCESS;
  if (covered == 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: the %s %p is not device memory, as the copy's kind says", function,
                role, pointer);
  }
  return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: the %s %p has %zu bytes to the end of its allocation, the copy %zu",
              function, role, pointer, covered, bytes);
}

int check_copy(const char* function, const void* destination, std::size_t destination_bytes, const void* source,
               std::size_t bytes, aclrtMemcpyKind kind) {
  if (bytes > destination_bytes) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: copies %zu bytes to a destination of %zu", function, bytes,
                destination_bytes);
  }
  if (bytes != 0 && (destination == nullptr || source == nullptr)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: the %s is null", function,
                destination == nullptr ? "destination" : "source");
  }
  const bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  const bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  if (const int code = check_device_range(function, "source", source, bytes, from_device)) return code;
  return check_device_range(function, "destination", destination, bytes, to_device);
}

int check_fill(const char* function, const void* pointer, std::size_t capacity_bytes, std::size_t bytes) {
  if (bytes > capacity_bytes) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: fills %zu bytes of a buffer of %zu", function, bytes, capacity_bytes);
  }
  return check_device_range(function, "buffer", pointer, bytes, /*must_be_device=*/false);
}

void add_pinned(void* pointer, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().pinned_blocks[as_number(pointer)] = bytes;
}

// Fails where there is no host memory to register.
int require_bytes(const char* function, const void* pointer, uint64_t bytes) {
  if (pointer != nullptr && bytes > 0) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %llu bytes at %p", function, static_cast<unsigned long long>(bytes),
              pointer);
}

bool remove_pinned(const void* pointer) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().pinned_blocks.erase(as_number(pointer)) != 0;
}

int fill_memory(void* pointer, int value, std::size_t bytes) {
  if (value == 0) {
    zero_memory(pointer, bytes);
  } else {
    std::memset(pointer, value, bytes);
  }
  return ACL_SUCCESS;
}

// Sets whole pages of one kind of device memory to zero. mincore() names the pages that the host backs; these are written.
// The others may still be on the host's swap device, so they are given back.
void zero_pages(char* pages, std::size_t count, bool is_physical) {
  constexpr std::size_t kAtOnce = 4096;
  std::array<unsigned char, kAtOnce> state;
  const auto is_backed = [&](std::size_t page) { return (state[page] & 1) != 0; };
  for (std::size_t done = 0; done < count; done += kAtOnce) {
    char* const part = pages + done * kPage;
    const std::size_t in_part = std::min(kAtOnce, count - done);
    if (mincore(part, in_part * kPage, state.data()) != 0) state.fill(1);
    for (std::size_t first = 0, last = 0; first < in_part; first = last) {
      while (last < in_part && is_backed(last) == is_backed(first)) ++last;
      char* const run = part + first * kPage;
      const std::size_t bytes = (last - first) * kPage;
      const bool given_back =
          !is_backed(first) && madvise(run, bytes, is_physical ? MADV_REMOVE : MADV_DONTNEED) == 0;
      if (!given_back) std::memset(run, 0, bytes);
    }
  }
}

int allocate_pinned(const char* function, void** pointer, std::size_t bytes) {
  if (posix_memalign(pointer, kPage, round_up_to_page(bytes == 0 ? 1 : bytes)) != 0) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host has no %zu bytes", function, bytes);
  }
  add_pinned(*pointer, round_up_to_page(bytes == 0 ? 1 : bytes));
  trace(function, "bytes=%zu -> %p", bytes, *pointer);
  return ACL_SUCCESS;
}

}  // namespace

std::optional<MemoryBlock> find_device_memory(const void* pointer) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  const auto block = block_of(memory().device_blocks, as_number(pointer));
  if (block == memory().device_blocks.end()) return std::nullopt;
  if (as_number(pointer) >= block->second.start + block->second.size) return std::nullopt;
  return block->second;
}

void zero_memory(void* pointer, std::size_t bytes) {
  constexpr std::size_t kWorthACall = std::size_t{1} << 20;
  auto* next = static_cast<char*>(pointer);
  while (bytes >= kWorthACall) {
    const auto block = find_device_memory(next);
    if (!block) break;
    const std::size_t in_block = std::min(bytes, block->start + block->size - as_number(next));
    const std::size_t head = std::min(in_block, round_up_to_page(as_number(next)) - as_number(next));
    const std::size_t pages = (in_block - head) / kPage;
    std::memset(next, 0, head);
    zero_pages(next + head, pages, block->is_physical);
    std::memset(next + head + pages * kPage, 0, in_block - head - pages * kPage);
    next += in_block;
    bytes -= in_block;
  }
  std::memset(next, 0, bytes);
}

bool is_pinned_host_memory(const void* pointer) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  const auto block = block_of(memory().pinned_blocks, as_number(pointer));
  return block != memory().pinned_blocks.end() && as_number(pointer) < block->first + block->second;
}

int copy_on_stream(void* destination, const void* source, std::size_t bytes, aclrtStream handle, const char* name) {
  trace(name, "bytes=%zu %p -> %p", bytes, source, destination);
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  const bool to_host = !find_device_memory(destination);
  const bool from_host = !find_device_memory(source);
  const auto copy = [destination, source, bytes] {
    std::memmove(destination, source, bytes);
    return ACL_SUCCESS;
  };
  const bool host_waits =
      (to_host && !is_pinned_host_memory(destination)) || (from_host && !is_pinned_host_memory(source));
  if (host_waits) {
    if (const int refused = stream->refuse_while_captured("a copy with host memory that is not page-locked",
                                                          ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC)) {
      return refused;
    }
    code = stream->enqueue(name, copy, Pace::kRandom);
    return code == ACL_SUCCESS ? stream->synchronize() : code;
  }
  return stream->enqueue(name, copy, to_host ? Pace::kLate : Pace::kRandom);
}

}  // namespace vllm_npu::emulator

using namespace vllm_npu::emulator;

// --- Allocation ---

aclError aclrtMalloc(void** pointer, size_t bytes, aclrtMemMallocPolicy) { return allocate(__func__, pointer, bytes); }

aclError aclrtMallocAlign32(void** pointer, size_t bytes, aclrtMemMallocPolicy) {
  return allocate(__func__, pointer, bytes);
}

aclError aclrtFree(void* pointer) {
  const auto block = find_device_memory(pointer);
  if (!block || block->start != as_number(pointer)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p was not allocated, or has been freed", pointer);
  }
  const int code = synchronize_device(block->device);  // no stream may still use the memory
  trace(__func__, "%p", pointer);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  munmap(pointer, block->size + kPage);
  memory().used_of_device[block->device] -= block->size;
  memory().device_blocks.erase(block->start);
  return code;
}

aclError aclrtMallocHost(void** pointer, size_t bytes) { return allocate_pinned(__func__, pointer, bytes); }

aclError aclrtMallocHostWithCfg(void** pointer, uint64_t bytes, aclrtMallocConfig*) {
  return allocate_pinned(__func__, pointer, bytes);
}

aclError aclrtFreeHost(void* pointer) {
  if (!remove_pinned(pointer)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost: %p was not allocated, or has been freed", pointer);
  }
  synchronize_everything();
  std::free(pointer);
  return ACL_SUCCESS;
}

aclError aclrtHostRegister(void* pointer, uint64_t bytes, aclrtHostRegisterType, void** device_pointer) {
  if (const int code = require_bytes(__func__, pointer, bytes)) return code;
  add_pinned(pointer, bytes);
  if (device_pointer != nullptr) *device_pointer = pointer;
  return ACL_SUCCESS;
}

aclError aclrtHostRegisterV2(void* pointer, uint64_t bytes, uint32_t) {
  if (const int code = require_bytes(__func__, pointer, bytes)) return code;
  add_pinned(pointer, bytes);
  return ACL_SUCCESS;
}

aclError aclrtHostUnregister(void* pointer) {
  if (remove_pinned(pointer)) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtHostUnregister: %p is not registered", pointer);
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total_bytes) {
  if (const int code = require_device(__func__)) return code;
  const std::lock_guard<std::mutex> lock(memory().mutex);
  *total_bytes = capacity();
  *free_bytes = capacity() - memory().used_of_device[current_device()];
  return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  *attributes = {};
  attributes->pageSize = kPage;
  if (const auto block = find_device_memory(pointer)) {
    attributes->location = {static_cast<uint32_t>(block->device), ACL_MEM_LOCATION_TYPE_DEVICE};
  } else if (is_pinned_host_memory(pointer)) {
    attributes->location = {0, ACL_MEM_LOCATION_TYPE_HOST};
  } else {
    attributes->location = {0, ACL_MEM_LOCATION_TYPE_UNREGISTERED};
  }
  return ACL_SUCCESS;
}

// --- Copies ---

aclError aclrtMemcpy(void* destination, size_t destination_bytes, const void* source, size_t bytes,
                     aclrtMemcpyKind kind) {
  trace(__func__, "bytes=%zu kind=%d", bytes, kind);
  if (const int code = refuse_in_capture(__func__)) return code;
  if (const int code = check_copy(__func__, destination, destination_bytes, source, bytes, kind)) return code;
  std::memmove(destination, source, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* destination, size_t destination_bytes, const void* source, size_t bytes,
                          aclrtMemcpyKind kind, aclrtStream stream) {
  if (const int code = check_copy(__func__, destination, destination_bytes, source, bytes, kind)) return code;
  return copy_on_stream(destination, source, bytes, stream, __func__);
}

// With CANN, this function chooses between a synchronous and an asynchronous copy. copy_on_stream makes the same choice
// for every copy.
aclError aclrtMemcpyAsyncWithCondition(void* destination, size_t destination_bytes, const void* source, size_t bytes,
                                       aclrtMemcpyKind kind, aclrtStream stream) {
  if (const int code = check_copy(__func__, destination, destination_bytes, source, bytes, kind)) return code;
  return copy_on_stream(destination, source, bytes, stream, __func__);
}

aclError aclrtMemset(void* pointer, size_t capacity_bytes, int32_t value, size_t bytes) {
  trace(__func__, "bytes=%zu", bytes);
  if (const int code = refuse_in_capture(__func__)) return code;
  if (const int code = check_fill(__func__, pointer, capacity_bytes, bytes)) return code;
  return fill_memory(pointer, value, bytes);
}

aclError aclrtMemsetAsync(void* pointer, size_t capacity_bytes, int32_t value, size_t bytes, aclrtStream stream) {
  trace(__func__, "bytes=%zu", bytes);
  if (const int code = check_fill(__func__, pointer, capacity_bytes, bytes)) return code;
  return enqueue(stream, __func__, [pointer, value, bytes] { return fill_memory(pointer, value, bytes); });
}

// --- Virtual addresses, for expandable segments: reserve addresses, then map physical memory to them ---

aclError aclrtReserveMemAddress(void** address, size_t bytes, size_t, void* expected, uint64_t) {
  void* reserved = mmap(expected, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, /*offset=*/0);
  if (reserved == MAP_FAILED) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: no %zu bytes of addresses: %s", __func__, bytes,
                std::strerror(errno));
  }
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().reserved[as_number(reserved)] = bytes;
  *address = reserved;
  return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void* address) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  const auto found = memory().reserved.find(as_number(address));
  if (found == memory().reserved.end()) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: %p is not reserved", address);
  }
  munmap(address, found->second);
  memory().reserved.erase(found);
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp*, uint64_t) {
  if (const int code = require_device(__func__)) return code;
  const std::size_t size = round_up_to_page(bytes);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  if (const int code = take_capacity(__func__, current_device(), size)) return code;
  const int descriptor = memfd_create("vllm_npu_emulator", MFD_CLOEXEC);
  if (descriptor < 0 || ftruncate(descriptor, static_cast<off_t>(size)) != 0) {
    memory().used_of_device[current_device()] -= size;
    if (descriptor >= 0) close(descriptor);
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host has no %zu bytes: %s", __func__, size,
                std::strerror(errno));
  }
  auto* physical = new PhysicalMemory{descriptor, size, current_device()};
  memory().physical.insert(physical);
  *handle = reinterpret_cast<aclrtDrvMemHandle>(physical);
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto* physical = reinterpret_cast<PhysicalMemory*>(handle);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  if (memory().physical.erase(physical) == 0) {
    return fail(ACL_ERROR_RT_INVALID_HANDLE, "aclrtFreePhysical: the handle is unknown");
  }
  memory().used_of_device[physical->device] -= physical->size;
  close(physical->descriptor);
  delete physical;
  return ACL_SUCCESS;
}

aclError aclrtMapMem(void* address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  auto* physical = reinterpret_cast<PhysicalMemory*>(handle);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  if (memory().physical.count(physical) == 0 || offset + bytes > physical->size) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: the handle is unknown, or smaller than %zu bytes",
                offset + bytes);
  }
  const auto reserved = block_of(memory().reserved, as_number(address));
  if (reserved == memory().reserved.end() || as_number(address) + bytes > reserved->first + reserved->second) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: %p and the %zu bytes from it are not reserved", address,
                bytes);
  }
  if (mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->descriptor,
           static_cast<off_t>(offset)) == MAP_FAILED) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMapMem: %s", std::strerror(errno));
  }
  memory().device_blocks[as_number(address)] = {as_number(address), bytes, physical->device,
                                                /*is_physical=*/true};
  trace(__func__, "%p bytes=%zu", address, bytes);
  return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void* address) {
  const auto block = find_device_memory(address);
  if (!block || block->start != as_number(address)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: nothing is mapped to %p", address);
  }
  const int code = synchronize_device(block->device);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  mmap(address, block->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, /*offset=*/0);
  memory().device_blocks.erase(block->start);
  return code;
}
