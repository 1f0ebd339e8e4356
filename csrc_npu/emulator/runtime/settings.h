// The emulator's settings, from environment variables. Each is read once, at its first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "runtime.h"

namespace vllm_npu::emulator {

// Returns the variable's text, or `fallback` if it is unset or empty.
EMULATOR_API std::string environment(const char* name, const char* fallback);

// VLLM_NPU_EMULATOR_DEVICES: the number of devices. ASCEND_RT_VISIBLE_DEVICES hides some of them, as with CANN.
int visible_device_count();

// The same number, as the variables have it now. visible_device_count() reads them once.
int count_devices_now();

// VLLM_NPU_EMULATOR_MEMORY_GB: the capacity of one device for one process. 0 is the capacity of the real chip.
std::size_t configured_memory_bytes();

// VLLM_NPU_EMULATOR_ASYNC: the seed of the asynchronous streams' delays. Empty for synchronous streams.
std::optional<std::uint64_t> asynchronous_seed();

// VLLM_NPU_EMULATOR_CANN: the version that every CANN package reports.
const std::string& cann_version();

// VLLM_NPU_EMULATOR_LOG: the lowest level of the ACL log that is shown. Empty shows no log.
std::optional<std::uint64_t> least_log_level();

// VLLM_NPU_EMULATOR_LIMITS=none: ops accept sizes and types that the real chip's ops refuse.
EMULATOR_API bool limits_are_off();

// VLLM_NPU_EMULATOR_UNDEFINED=zero: memory that an op leaves unwritten holds zeros (aclnn/undefined.h).
EMULATOR_API bool undefined_is_zero();

// An error text if an environment variable has a wrong value, else "".
const std::string& settings_fault();

}  // namespace vllm_npu::emulator
