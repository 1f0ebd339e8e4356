#include "random.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <torch_npu/csrc/aten/NPUGeneratorImpl.h>

#include <mutex>

#include "cpu_generator.h"

namespace vllm_npu::emulator {
namespace {

// torch_npu accepts only multiples of four.
constexpr uint64_t kOffsetPerOp = 4;

at::Generator npu_generator(const std::optional<at::Generator>& generator, c10::Device device) {
  // Use torch_npu's own function, because torch_npu 2.10 does not support the one of at::globalContext().
  at::Generator source =
      generator && generator->defined() ? *generator : at_npu::detail::getDefaultNPUGenerator(device.index());
  TORCH_CHECK(source.device().type() == device.type(), "Expected a '", device.type(), "' generator, but found a '",
              source.device().type(), "' one: create it with torch.Generator('npu')");
  return source;
}

// Takes the seed and the offset of one op. In a capture, takes where they will be in device memory.
at_npu::PhiloxNpuState take_state(at::Generator source) {
  const std::lock_guard<std::mutex> lock(source.mutex());
  return at::check_generator<at_npu::NPUGeneratorImpl>(source)->philox_npu_state(kOffsetPerOp);
}

}  // namespace

at::Generator next_cpu_generator(const std::optional<at::Generator>& generator, c10::Device device) {
  const auto state = take_state(npu_generator(generator, device));
  return cpu_generator(state.seed_.val, state.offset_.val);
}

std::function<at::Generator()> captured_cpu_generator(const std::optional<at::Generator>& generator,
                                                      c10::Device device) {
  const auto state = take_state(npu_generator(generator, device));
  const auto* seed = static_cast<const int64_t*>(state.seed_.ptr->const_data_ptr());
  const auto* offset = static_cast<const int64_t*>(state.offset_.ptr->const_data_ptr());
  return [seed, offset, inside = state.offset_intragraph_] {
    return cpu_generator(static_cast<uint64_t>(*seed), static_cast<uint64_t>(*offset) + inside);
  };
}

// PyTorch's CPU kernel takes no generator. This function computes the same from the device's generator.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p, std::optional<bool> train) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto mask_options = input.options().dtype(at::kBool);
  if (!train.value_or(true)) return {input.clone(), at::ones_like(input, mask_options)};
  const double keep = 1.0 - p;
  const double scale = keep == 0.0 ? 0.0 : 1.0 / keep;
  auto mask = at::empty_like(input, mask_options).bernoulli_(keep);
  return {input.mul(mask).mul_(scale), mask};
}

}  // namespace vllm_npu::emulator
