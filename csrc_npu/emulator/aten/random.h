// Random numbers of the emulated device. PyTorch's CPU generator draws them, from seeds of the npu generator.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

#include <functional>
#include <optional>
#include <tuple>

namespace vllm_npu::emulator {

// Returns a CPU generator for one op. Its seed is computed from the seed and the offset of `generator`, or of the
// device's default generator. Each call increases the offset, so manual_seed, get_rng_state and set_rng_state repeat
// the numbers. An NPU, or the CPU with the same seed, draws other numbers.
at::Generator next_cpu_generator(const std::optional<at::Generator>& generator, c10::Device device);

// The same for an op that a graph records: returns a function that makes the generator of one replay. torch_npu writes
// the seed and the offset of a replay to device memory before it.
std::function<at::Generator()> captured_cpu_generator(const std::optional<at::Generator>& generator,
                                                      c10::Device device);

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p, std::optional<bool> train);

}  // namespace vllm_npu::emulator
