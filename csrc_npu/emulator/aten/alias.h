// CPU tensors on the memory of npu tensors. Device memory is host memory, so nothing is copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace vllm_npu::emulator {

// A CPU tensor on the memory of `tensor`. It does not own the memory: use it only while `tensor` lives.
at::Tensor cpu_alias(const at::Tensor& tensor);

// The CPU aliases of one op's arguments, and the conversion of its results to npu tensors.
class OpAliases {
 public:
  // On what the aliases lie. kZeros is fresh memory of zeros: an op that runs on it finds the sizes of its results, and
  // neither reads nor writes a value of the device. Graph capture needs this.
  enum class Memory { kDevice, kZeros };

  OpAliases(std::string op_name, c10::Device device, Memory memory = Memory::kDevice)
      : op_name_(std::move(op_name)), device_(device), memory_(memory) {}

  // Returns the alias of a device tensor. Returns any other tensor, and an undefined one, unchanged. Two tensors with
  // one storage get aliases with one storage, and one tensor always gets the same alias.
  at::Tensor to_cpu(const at::Tensor& tensor);

  // Registers that the op writes to `tensor`, for write_back(). Call it before the op runs.
  void will_write(const at::Tensor& tensor);

  // Call it after the op. Gives each written tensor the sizes that the CPU kernel gave to its alias. In asynchronous
  // mode, the stream writes the values later. With kZeros, no values are written.
  void write_back();

  // Returns the npu tensor for a result. For the alias of an argument this is the argument, for a view of an alias a
  // view of the argument, and otherwise a new tensor.
  at::Tensor to_npu(const at::Tensor& result);

  // Whether to_npu makes a new tensor for the result.
  bool is_new(const at::Tensor& result) const;

  bool writes() const { return !written_.empty(); }

 private:
  struct Written {
    at::Tensor tensor;
    at::Tensor alias;
    const void* memory_before;
    at::Tensor values_before;  // asynchronous mode only
  };

  at::Tensor view_of(const at::Tensor& argument, const at::Tensor& result) const;
  at::Tensor copy_of(const at::Tensor& result) const;
  void write_back_resized(const Written& written) const;
  void write_back_late(const Written& written) const;

  std::string op_name_;
  c10::Device device_;
  Memory memory_;
  std::unordered_map<const c10::TensorImpl*, at::Tensor> alias_of_;             // npu tensor -> alias
  std::unordered_map<const c10::TensorImpl*, at::Tensor> argument_of_;          // alias -> npu tensor
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storage_alias_of_;  // npu storage -> alias storage
  std::unordered_map<const c10::StorageImpl*, at::Tensor> argument_on_;         // alias storage -> an npu tensor on it
  std::vector<Written> written_;
};

}  // namespace vllm_npu::emulator
