// Sleeping on a word of shared memory until another process changes it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace vllm_npu::emulator {

constexpr std::chrono::milliseconds kLongestSleep{500};  // between two looks at whether the others are still alive

// Returns when the word is not `seen` any more, somebody woke its waiters, or the time is over; also for no reason.
void sleep_while_equal(std::atomic<std::uint32_t>& word, std::uint32_t seen, std::chrono::milliseconds longest);

void wake_all(std::atomic<std::uint32_t>& word);

// Adds 1 and wakes all that sleep on the word.
void change_and_wake(std::atomic<std::uint32_t>& word);

}  // namespace vllm_npu::emulator
