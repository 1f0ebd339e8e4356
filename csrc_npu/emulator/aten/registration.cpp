// Replaces torch_npu's kernels by PyTorch's own, for every aten op. The first condition that an op meets decides:
//
//   condition                           kernel of the op
//   its name is in kTorchNpuOps         torch_npu's, which makes npu tensors and views of them
//   this folder has a kernel            the kernel of this folder
//   PyTorch has a CPU kernel            the CPU kernel, on CPU aliases (fallback.h)
//   PyTorch has a composite kernel      the composite kernel, on the npu tensors; it calls other ops of this table
//   only torch_npu has a kernel         torch_npu's: op-plugin calls the emulated aclnn interface, or fails by name
//   there is no kernel                  a kernel that fails with the op's name
//
// torch_npu also replaces some autograd formulas by its own, which call ops that only an NPU has. PyTorch's formulas
// are registered again.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/binary_cross_entropy_with_logits_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/contiguous_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/histc.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "alias.h"
#include "copy.h"
#include "fallback.h"
#include "random.h"
#include "stream.h"

namespace vllm_npu::emulator {
namespace {

using c10::DispatchKey;
using c10::OperatorHandle;

const std::unordered_set<std::string> kTorchNpuOps = {
    "aten::_copy_from_and_resize",
    "aten::_lazy_clone",
    "aten::_pin_memory",
    "aten::_reshape_alias",
    "aten::_to_copy",
    "aten::as_strided",
    "aten::as_strided_",
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::is_set_to",
    "aten::new_empty_strided",
    "aten::record_stream",
    "aten::resize_",
    "aten::resize_as_",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
    "aten::set_.source_Tensor_storage_offset",
    "aten::unfold",
    "aten::view",
    "aten::view_as_complex",
    "aten::view_as_real",
};

// Composite ops that choose an implementation by the device type. On npu tensors they would choose torch_npu's, so they
// run as a whole on the CPU.
const std::unordered_set<std::string> kWholeOnCpu = {
    "aten::_convolution",
    "aten::convolution",
    "aten::convolution_backward",
};

// The npu's histc takes integer types, and the CPU's does not.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  trace("aten::histc");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  wait_for_current_stream(self.device());
  const auto values = cpu_alias(self);
  const bool integral = at::isIntegralType(self.scalar_type(), /*includeBool=*/false);
  const auto counts = at::histc(integral ? values.to(at::kDouble) : values, bins, low, high);
  return counts.to(self.scalar_type()).to(self.device());
}

// One kernel of the npu computes the whole loss in float32. PyTorch composes it of ops, each of which would round.
at::Tensor binary_cross_entropy_with_logits(const at::Tensor& self, const at::Tensor& target,
                                            const std::optional<at::Tensor>& weight,
                                            const std::optional<at::Tensor>& pos_weight, int64_t reduction) {
  const auto widened = [](const at::Tensor& tensor) {
    return at::isReducedFloatingType(tensor.scalar_type()) ? tensor.to(at::kFloat) : tensor;
  };
  const auto optional = [&](const std::optional<at::Tensor>& tensor) {
    return tensor && tensor->defined() ? std::optional<at::Tensor>(widened(*tensor)) : std::nullopt;
  };
  return at::compositeexplicitautograd::binary_cross_entropy_with_logits(widened(self), widened(target),
                                                                         optional(weight), optional(pos_weight),
                                                                         reduction)
      .to(self.scalar_type());
}

// As the npu's, which divides integers in place: in float32, truncated. PyTorch refuses it. ProcessGroupHCCL averages
// integers so on A2 and A3.
void divide_in_place(const OperatorHandle& op, torch::jit::Stack* stack) {
  const at::Tensor self = torch::jit::peek(*stack, 0, 2).toTensor();
  const at::Tensor other = torch::jit::peek(*stack, 1, 2).toTensor();
  if (!at::isIntegralType(self.scalar_type(), /*includeBool=*/false)) return run_on_cpu_aliases(op, stack);
  torch::jit::drop(*stack, 2);
  torch::jit::push(*stack, at::Tensor(self).copy_(at::div(self, other)));
}

// Whole tensors are the runtime's work, which does not touch memory that was never written.
void zero_in_place(const OperatorHandle& op, torch::jit::Stack* stack) {
  constexpr auto* kName = "aten::zero_";
  const at::Tensor self = torch::jit::peek(*stack, 0, 1).toTensor();
  if (self.numel() == 0 || !self.is_contiguous()) return run_on_cpu_aliases(op, stack);
  trace(kName);
  const auto work = [alias = cpu_alias(self)] {
    zero_memory(alias.data_ptr(), alias.nbytes());
    return ACL_SUCCESS;
  };
  check(enqueue(current_stream(self.device()), kName, work, {self.const_data_ptr()}), kName);
}

// As torch_npu's, which has no other memory format.
at::Tensor contiguous(const at::Tensor& self, at::MemoryFormat format) {
  TORCH_CHECK(format == at::MemoryFormat::Contiguous || self.is_contiguous(format),
              "NPU contiguous operator only supported contiguous memory format.\nERR01007 OPS feature not supported");
  return at::compositeimplicitautograd::contiguous(self, format);
}

// As torch_npu's, which ignore pin_memory on a device. PyTorch's composite kernels pass it to empty, which refuses it.
// Source: op-plugin, ZerosKernelNpuOpApi.cpp and OnesKernelNpuOpApi.cpp.
at::Tensor empty_on_device(c10::SymIntArrayRef size, std::optional<at::ScalarType> type,
                           std::optional<at::Layout> layout, std::optional<at::Device> device) {
  return at::empty_symint(size, type, layout, device, /*pin_memory=*/std::nullopt, /*memory_format=*/std::nullopt);
}

at::Tensor zeros(c10::SymIntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool>) {
  return empty_on_device(size, type, layout, device).zero_();
}

at::Tensor ones(c10::SymIntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout> layout,
                std::optional<at::Device> device, std::optional<bool>) {
  return empty_on_device(size, type, layout, device).fill_(1);
}

// Returns 0, which selects attention by its mathematical definition. Its ops have CPU kernels.
int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return 0;
}

const std::unordered_map<std::string, torch::CppFunction (*)()> kOwnOps = {
    {"aten::_fused_sdp_choice", [] { return torch::CppFunction(TORCH_FN(fused_sdp_choice)); }},
    {"aten::_local_scalar_dense", [] { return torch::CppFunction(TORCH_FN(local_scalar_dense)); }},
    {"aten::binary_cross_entropy_with_logits",
     [] { return torch::CppFunction(TORCH_FN(binary_cross_entropy_with_logits)); }},
    {"aten::contiguous", [] { return torch::CppFunction(TORCH_FN(contiguous)); }},
    {"aten::div_.Tensor", [] { return torch::CppFunction::makeFromBoxedFunction<divide_in_place>(); }},
    {"aten::copy_", [] { return torch::CppFunction(TORCH_FN(copy_)); }},
    {"aten::histc", [] { return torch::CppFunction(TORCH_FN(histc)); }},
    {"aten::native_dropout", [] { return torch::CppFunction(TORCH_FN(native_dropout)); }},
    {"aten::ones", [] { return torch::CppFunction(TORCH_FN(ones)); }},
    {"aten::zero_", [] { return torch::CppFunction::makeFromBoxedFunction<zero_in_place>(); }},
    {"aten::zeros", [] { return torch::CppFunction(TORCH_FN(zeros)); }},
};

bool takes_tensors_or_device(const OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  return std::any_of(arguments.begin(), arguments.end(), [](const c10::Argument& argument) {
    return argument.name() == "device" || argument.type()->str().find("Tensor") != std::string::npos;
  });
}

// Whether the op draws random numbers without a generator argument. Its CPU kernel would use the CPU's generator.
bool draws_without_generator(const OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  return op.hasTag(at::Tag::nondeterministic_seeded) &&
         std::none_of(arguments.begin(), arguments.end(),
                      [](const c10::Argument& argument) { return argument.name() == "generator"; });
}

// PyTorch's composite kernel for devices without one of their own.
std::optional<torch::CppFunction> composite_kernel(const OperatorHandle& op) {
  using torch::CppFunction;
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional)) {
    return CppFunction::makeFromBoxedFunction<
        run_pytorch_kernel<DispatchKey::CompositeExplicitAutogradNonFunctional>>();
  }
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd)) {
    return CppFunction::makeFromBoxedFunction<run_pytorch_kernel<DispatchKey::CompositeExplicitAutograd>>();
  }
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
    return CppFunction::makeFromBoxedFunction<run_pytorch_kernel<DispatchKey::CompositeImplicitAutograd>>();
  }
  return {};
}

// Whether PyTorch computes the op's gradient through the ops that it calls. A kernel for the device would lose the
// gradient.
bool is_differentiated_inside(const OperatorHandle& op) {
  return op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) &&
         !op.hasKernelForDispatchKey(DispatchKey::Autograd);
}

// The kernel to register for the device. Empty if the registered one stays.
std::optional<torch::CppFunction> device_kernel(const OperatorHandle& op) {
  using torch::CppFunction;
  const auto name = full_name(op.operator_name());
  if (kTorchNpuOps.count(name)) return {};
  if (const auto own = kOwnOps.find(name); own != kOwnOps.end()) return own->second();
  const bool of_torch_npu = op.hasKernelForDispatchKey(DispatchKey::PrivateUse1);
  if (kWholeOnCpu.count(name)) return CppFunction::makeFromBoxedFunction<run_on_cpu_aliases>();
  if (op.hasKernelForDispatchKey(DispatchKey::CPU) && !is_differentiated_inside(op)) {
    return draws_without_generator(op) ? CppFunction::makeFromBoxedFunction<refuse>()
                                       : CppFunction::makeFromBoxedFunction<run_on_cpu_aliases>();
  }
  auto composite = composite_kernel(op);
  if (composite) return of_torch_npu ? std::move(composite) : std::nullopt;
  if (of_torch_npu) return {};
  return CppFunction::makeFromBoxedFunction<refuse>();
}

// PyTorch's autograd kernel, which replaces torch_npu's. Empty if torch_npu has none.
std::optional<torch::CppFunction> autograd_kernel(const OperatorHandle& op) {
  using torch::CppFunction;
  if (full_name(op.operator_name()) == "aten::contiguous") return CppFunction(TORCH_FN(contiguous));  // it composes
  if (!op.hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1)) return {};
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
    return CppFunction::makeFromBoxedFunction<run_pytorch_kernel<DispatchKey::CompositeImplicitAutograd>>();
  }
  if (op.hasKernelForDispatchKey(DispatchKey::Autograd)) {
    return CppFunction::makeFromBoxedFunction<run_pytorch_kernel<DispatchKey::Autograd>>();
  }
  return {};
}

// Ignores PyTorch's warnings that one kernel replaces another, which is the purpose of this file.
class IgnoreWarnings : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void register_all() {
  IgnoreWarnings ignore_warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&ignore_warnings);
  // Never destroyed, because the dispatcher may be destroyed first at exit.
  auto* device = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto* autograd =
      new torch::Library(torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& operator_name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(operator_name);
    const auto name = full_name(operator_name);
    if (!op || operator_name.getNamespace() != "aten" || !takes_tensors_or_device(*op)) continue;
    if (auto kernel = autograd_kernel(*op)) autograd->impl(name.c_str(), std::move(*kernel));
    if (auto kernel = device_kernel(*op)) device->impl(name.c_str(), std::move(*kernel));
  }
}

const bool registered = [] {
  register_all();
  return true;
}();

}  // namespace
}  // namespace vllm_npu::emulator
