#include "fallback.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch_npu/csrc/core/npu/NPURecovery.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "alias.h"
#include "random.h"
#include "stream.h"

namespace vllm_npu::emulator {
namespace {

using c10::IValue;
using torch::jit::Stack;

// Ops that take indices on the CPU, as on other devices.
constexpr std::array<std::string_view, 3> kOpsWithCpuIndices = {"aten::index", "aten::index_put",
                                                                "aten::_index_put_impl_"};

template <typename Visit>
void for_each_tensor(const IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorList()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) visit(tensor.value_or(at::Tensor()));
  }
}

// Returns the value with each tensor replaced by convert(tensor).
template <typename Convert>
IValue with_tensors(const IValue& value, const Convert& convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> converted;
    for (const at::Tensor& tensor : value.toTensorList()) converted.push_back(convert(tensor));
    return converted;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> converted;
    for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
      converted.push_back(tensor ? std::optional(convert(*tensor)) : std::nullopt);
    }
    return converted;
  }
  return value;
}

bool is_npu_device(const IValue& value) { return value.isDevice() && value.toDevice().is_privateuseone(); }

// Ops whose CPU kernels refuse zeros, also where only the sizes of the results are wanted. Those that divide refuse
// integers that are zero.
constexpr std::array<std::string_view, 9> kOpsOfPositiveNumbers = {
    "aten::multinomial",  "aten::div",  "aten::div_", "aten::floor_divide", "aten::floor_divide_", "aten::remainder",
    "aten::remainder_", "aten::fmod", "aten::fmod_"};

// One call of an op. Its arguments are the last values on the stack, and its results replace them.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), name_(full_name(op.operator_name())), stack_(*stack), device_(find_device()) {}

  void run() {
    trace(name_.c_str());
    const c10::DeviceGuard device_guard(device_);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    // The npu's autocast has already cast the arguments. The CPU's autocast must not cast them again.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    check_devices();
    refuse_unsafe_data();
    if (records_work(current_stream(device_))) return record();
    wait_for_current_stream(device_);

    OpAliases aliases(name_, device_);
    for (size_t i = 0; i < num_arguments(); ++i) argument(i) = cpu_argument(i, aliases);
    run_cpu_kernel();
    aliases.write_back();
    for (size_t i = 0; i < num_results(); ++i) {
      result(i) = with_tensors(result(i), [&](const at::Tensor& tensor) { return aliases.to_npu(tensor); });
    }
  }

 private:
  size_t num_arguments() const { return schema_.arguments().size(); }
  size_t num_results() const { return schema_.returns().size(); }
  IValue& argument(size_t index) { return torch::jit::peek(stack_, index, num_arguments()); }
  IValue& result(size_t index) { return torch::jit::peek(stack_, index, num_results()); }

  template <size_t count>
  bool is_in(const std::array<std::string_view, count>& names) const {
    return std::find(names.begin(), names.end(), op_.operator_name().name) != names.end();
  }

  bool writes_to(size_t index) const {
    const auto* alias_info = schema_.arguments()[index].alias_info();
    return alias_info != nullptr && alias_info->isWrite();
  }

  // Returns the device of the first npu tensor, else the argument `device`, else the current device.
  c10::Device find_device() {
    std::optional<c10::Device> of_tensor;
    std::optional<c10::Device> of_argument;
    for (size_t i = 0; i < num_arguments(); ++i) {
      if (is_npu_device(argument(i))) of_argument = argument(i).toDevice();
      for_each_tensor(argument(i), [&](const at::Tensor& tensor) {
        if (!of_tensor && tensor.defined() && tensor.is_privateuseone()) of_tensor = tensor.device();
      });
    }
    if (of_tensor) return *of_tensor;
    if (of_argument && of_argument->has_index()) return *of_argument;
    return c10::impl::VirtualGuardImpl(c10::DeviceType::PrivateUse1).getDevice();
  }

  void check_devices() {
    const bool cpu_indices = is_in(kOpsWithCpuIndices);
    for (size_t i = 0; i < num_arguments(); ++i) {
      const auto& argument_name = schema_.arguments()[i].name();
      const bool may_be_on_cpu = cpu_indices && argument_name == "indices";
      for_each_tensor(argument(i), [&](const at::Tensor& tensor) {
        if (!tensor.defined() || tensor.device() == device_) return;
        // a CPU tensor without dimensions counts as a number
        if (tensor.is_cpu() && (may_be_on_cpu || (tensor.dim() == 0 && !writes_to(i)))) return;
        TORCH_CHECK(false, name_, ": Expected all tensors to be on the same device, but '", argument_name, "' is on ",
                    tensor.device(), " and another one on ", device_, "; move it with .to('", device_, "')");
      });
    }
  }

  // As torch_npu's own operators do: after a fault of the device's memory, its contents must not be read.
  void refuse_unsafe_data() {
    if (!c10_npu::get_npu_data_unsafe_flag()) return;
    for (size_t i = 0; i < num_arguments(); ++i) {
      if (writes_to(i)) continue;
      for_each_tensor(argument(i), [](const at::Tensor& tensor) {
        if (tensor.defined()) c10_npu::check_npu_tensor_is_safe(tensor);
      });
    }
  }

  IValue cpu_argument(size_t index, OpAliases& aliases) {
    const auto& value = argument(index);
    if (is_npu_device(value)) return c10::Device(c10::kCPU);
    if (schema_.arguments()[index].name() == "generator") {
      return next_cpu_generator(value.toOptional<at::Generator>(), device_);
    }
    if (writes_to(index)) {
      for_each_tensor(value, [&](const at::Tensor& tensor) { aliases.will_write(tensor); });
    }
    return with_tensors(value, [&](const at::Tensor& tensor) { return aliases.to_cpu(tensor); });
  }

  // The op belongs to a graph. Runs the kernel on zeros, which gives the sizes of the results, and records work that
  // runs the kernel on the device's memory at each replay.
  void record() {
    refuse_what_needs_values();
    OpAliases zeros(name_, device_, OpAliases::Memory::kZeros);
    const Stack arguments = c10::Stack(stack_.end() - num_arguments(), stack_.end());
    std::function<at::Generator()> generator;
    const bool needs_positive = is_in(kOpsOfPositiveNumbers);
    for (size_t i = 0; i < num_arguments(); ++i) {
      if (schema_.arguments()[i].name() == "generator") {
        generator = captured_cpu_generator(argument(i).toOptional<at::Generator>(), device_);
        argument(i) = at::detail::createCPUGenerator();
      } else {
        argument(i) = cpu_argument(i, zeros);
        if (!needs_positive) continue;
        for_each_tensor(arguments[i], [&](const at::Tensor& tensor) {
          if (tensor.defined() && tensor.is_privateuseone()) zeros.to_cpu(tensor).fill_(1);
        });
      }
    }
    run_cpu_kernel();
    zeros.write_back();
    Recording recording{op_, arguments, generator, {}};
    for (size_t i = 0; i < num_results(); ++i) {
      result(i) = with_tensors(result(i), [&](const at::Tensor& tensor) {
        const bool is_new = zeros.is_new(tensor);
        auto made = zeros.to_npu(tensor);
        recording.targets.push_back(is_new ? cpu_alias(made) : at::Tensor());
        return made;
      });
    }
    const bool has_new = std::any_of(recording.targets.begin(), recording.targets.end(),
                                     [](const at::Tensor& target) { return target.defined(); });
    if (has_new || zeros.writes()) enqueue_recording(std::move(recording));
  }

  // Ops whose results have sizes that depend on values. On a device, they wait for the stream.
  void refuse_what_needs_values() {
    const bool selects = op_.operator_name().name == "aten::index";
    bool needs_values = !selects && (op_.hasTag(at::Tag::dynamic_output_shape) ||
                                     op_.hasTag(at::Tag::data_dependent_output));
    const bool is_indexed = is_in(kOpsWithCpuIndices);
    const bool fills = is_indexed && !selects && argument(2).toTensor().numel() == 1;  // as masked_fill
    if (is_indexed && !fills) {
      for_each_tensor(argument(1), [&](const at::Tensor& index) {
        if (!index.defined()) return;
        const bool is_mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
        needs_values = needs_values || is_mask || index.is_cpu();
      });
    }
    if (needs_values) check(refuse_to_record(current_stream(device_), name_.c_str()), name_.c_str());
  }

  // The op with aliases of device memory for its arguments, and with copies of its arguments on the host.
  struct Recording {
    const c10::OperatorHandle op;
    Stack arguments;
    std::function<at::Generator()> generator;
    std::vector<at::Tensor> targets;  // for each tensor of the results: where a new one lies; undefined for the others
  };

  void enqueue_recording(Recording recording) {
    OpAliases aliases(name_, device_);
    Addresses memory;
    const auto on_device = [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.is_cpu()) return frozen(tensor);
      if (tensor.defined() && tensor.numel() > 0) memory.push_back(tensor.const_data_ptr());
      return aliases.to_cpu(tensor);
    };
    for (size_t i = 0; i < recording.arguments.size(); ++i) {
      IValue& value = recording.arguments[i];
      value = is_npu_device(value) ? IValue(c10::Device(c10::kCPU)) : with_tensors(value, on_device);
    }
    const char* name = lasting(name_.c_str());
    const auto replay = [name, recording = std::move(recording)] { return run_recording(name, recording); };
    check(enqueue(current_stream(device_), name, replay, std::move(memory)), name);
  }

  static at::Tensor frozen(const at::Tensor& on_host) {
    auto copy = on_host.clone();
    copy.unsafeGetTensorImpl()->set_wrapped_number(on_host.unsafeGetTensorImpl()->is_wrapped_number());
    return copy;
  }

  static int run_recording(const char* name, const Recording& recording) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Stack stack = recording.arguments;
    const auto& arguments = recording.op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].name() == "generator") stack[i] = recording.generator();
    }
    try {
      recording.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
      size_t next = 0;
      for (const IValue& value : stack) {
        for_each_tensor(value, [&](const at::Tensor& tensor) {
          const at::Tensor& target = recording.targets[next++];
          if (target.defined()) copy_result(target, tensor);
        });
      }
      return ACL_SUCCESS;
    } catch (const c10::Error& error) {
      return fail(ACL_ERROR_INTERNAL_ERROR, "%s: %s", name, error.what_without_backtrace());
    }
  }

  void run_cpu_kernel() {
    try {
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    } catch (c10::NotImplementedError& error) {
      error.add_context(name_ + " on the emulated npu runs PyTorch's CPU kernel, which lacks this case");
      throw;
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string name_;
  Stack& stack_;
  const c10::Device device_;
};

}  // namespace

void run_on_cpu_aliases(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

void refuse(const c10::OperatorHandle& op, Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, full_name(op.operator_name()),
                              " is not emulated on the npu: PyTorch has no CPU kernel for it; do this on the CPU with "
                              "other ops, or on an NPU");
}

std::string full_name(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

}  // namespace vllm_npu::emulator
