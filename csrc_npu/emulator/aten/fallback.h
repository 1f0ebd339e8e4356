// Boxed kernels: each can run any op.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace vllm_npu::emulator {

// Runs the op's CPU kernel on CPU aliases of its npu arguments.
void run_on_cpu_aliases(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// Runs the kernel that PyTorch itself has registered for the key, on the npu tensors.
template <c10::DispatchKey key>
void run_pytorch_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.callBoxedForDispatchKey(key, *stack);
}

// Fails with the op's name.
void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// "aten::add.Tensor"
std::string full_name(const c10::OperatorName& name);

}  // namespace vllm_npu::emulator
