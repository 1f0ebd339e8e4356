// CPU generators that are seeded by a seed and an offset of the npu generator.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include <cstdint>

namespace vllm_npu::emulator {

// splitmix64, so that neighbouring seeds and offsets give unrelated seeds.
inline std::uint64_t mixed(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

// The same seed and offset give the same numbers. An NPU draws others.
inline at::Generator cpu_generator(std::uint64_t seed, std::uint64_t offset) {
  return at::detail::createCPUGenerator(mixed(mixed(seed) + offset));
}

}  // namespace vllm_npu::emulator
