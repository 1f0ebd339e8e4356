// The emulator's settings, from environment variables: each is read once, when first asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "runtime.h"

namespace vllm_npu::emulator {

// The variable's text, or `fallback` where it is unset or empty.
EMULATOR_API std::string environment(const char* name, const char* fallback);

// VLLM_NPU_EMULATOR_DEVICES: devices that exist; ASCEND_RT_VISIBLE_DEVICES hides some, as with CANN.
int visible_device_count();

// VLLM_NPU_EMULATOR_MEMORY_GB: capacity of one device, as seen by one process; 0 stands for the chip's own.
std::size_t configured_memory_bytes();

// VLLM_NPU_EMULATOR_ASYNC: the seed of the asynchronous streams' delays; nothing for synchronous streams.
std::optional<std::uint64_t> asynchronous_seed();

// VLLM_NPU_EMULATOR_CANN: the version that every CANN package reports.
const std::string& cann_version();

// VLLM_NPU_EMULATOR_LOG: the least level of the ACL log that is shown; nothing for none.
std::optional<std::uint64_t> least_log_level();

// VLLM_NPU_EMULATOR_LIMITS=none: ops take sizes and types that the chip's refuse.
EMULATOR_API bool limits_are_off();

// VLLM_NPU_EMULATOR_UNDEFINED=zero: what an op leaves unwritten is zeros, in place of values that show.
EMULATOR_API bool undefined_is_zero();

// What is wrong with the environment variables, or "".
const std::string& settings_fault();

}  // namespace vllm_npu::emulator
