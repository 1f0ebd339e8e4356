// Sleep on a word of shared memory until another process changes it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace vllm_npu::emulator {

constexpr std::chrono::milliseconds kLongestSleep{500};  // between two checks that the other processes are alive

// Returns when the word is no longer `seen`, when its waiters are woken, or after `longest`. May also return earlier
// without a reason.
void sleep_while_equal(std::atomic<std::uint32_t>& word, std::uint32_t seen, std::chrono::milliseconds longest);

void wake_all(std::atomic<std::uint32_t>& word);

// Adds 1 to the word and wakes all threads that sleep on it.
void change_and_wake(std::atomic<std::uint32_t>& word);

}  // namespace vllm_npu::emulator
