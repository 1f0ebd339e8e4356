// Random numbers of the emulated device: drawn by PyTorch's CPU generator, in the order of the npu generator.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

#include <optional>
#include <tuple>

namespace vllm_npu::emulator {

// A CPU generator for one op. Its seed follows from the seed and the offset of `generator` (the device's default one
// if nothing is given), and the offset moves on: so manual_seed, get_rng_state and set_rng_state repeat the numbers.
// The numbers are neither those of an NPU nor those of the CPU with the same seed.
at::Generator next_cpu_generator(const std::optional<at::Generator>& generator, c10::Device device);

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p, std::optional<bool> train);

}  // namespace vllm_npu::emulator
