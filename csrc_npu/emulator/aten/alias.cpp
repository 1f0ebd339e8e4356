#include "alias.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>

#include "stream.h"

namespace vllm_npu::emulator {
namespace {

// A CPU storage on the memory of `storage`. It can be resized, because CPU kernels resize out= tensors. Resizing moves
// it to memory of the CPU's allocator.
c10::Storage alias_storage(const c10::Storage& storage) {
  auto* impl = storage.unsafeGetStorageImpl();
  return {c10::Storage::use_byte_size_t(), impl->nbytes(), c10::DataPtr(impl->mutable_data(), c10::Device(c10::kCPU)),
          c10::GetCPUAllocator(), /*resizable=*/true};
}

// A CPU storage of zeros with the size of `storage`. The operating system provides its pages when they are touched.
c10::Storage zeros_like_storage(const c10::Storage& storage) {
  const size_t bytes = storage.nbytes();
  void* zeros = std::calloc(std::max<size_t>(bytes, 1), 1);
  TORCH_CHECK(zeros != nullptr, "the host has no ", bytes, " bytes for the capture of a graph");
  return {c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(zeros, zeros, std::free, c10::Device(c10::kCPU)),
          c10::GetCPUAllocator(), /*resizable=*/true};
}

// Bytes of the storage from its start to the tensor's last element.
size_t spanned_bytes(const at::Tensor& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                          tensor.storage_offset());
}

// Whether the tensor's elements are in memory that may be read. A storage can be made smaller than its tensors. The
// device knows allocations, not storages, and torch_npu's allocator rounds sizes up.
bool is_in_memory(const at::Tensor& tensor, const c10::Storage& storage) {
  if (tensor.numel() == 0 || spanned_bytes(tensor) <= storage.nbytes()) return true;
  const auto block = find_device_memory(storage.data());
  const auto start = reinterpret_cast<std::uintptr_t>(storage.data());
  return block && start + spanned_bytes(tensor) <= block->start + block->size;
}

at::Tensor alias_on(const at::Tensor& tensor, c10::Storage storage) {
  TORCH_CHECK(is_in_memory(tensor, storage), "an npu tensor with sizes ", tensor.sizes(), " and strides ",
              tensor.strides(), " at offset ", tensor.storage_offset(), " does not fit into its storage of ",
              storage.nbytes(), " bytes, or into the device's allocation");
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                        tensor.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  alias._set_conj(tensor.is_conj());
  alias._set_neg(tensor.is_neg());
  return alias;
}

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}

}  // namespace

at::Tensor cpu_alias(const at::Tensor& tensor) { return alias_on(tensor, alias_storage(tensor.storage())); }

at::Tensor OpAliases::to_cpu(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
  const auto known = alias_of_.find(tensor.unsafeGetTensorImpl());
  if (known != alias_of_.end()) return known->second;

  const auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto found = storage_alias_of_.find(storage);
  if (found == storage_alias_of_.end()) {
    const auto alias = memory_ == Memory::kZeros ? zeros_like_storage(tensor.storage()) : alias_storage(tensor.storage());
    found = storage_alias_of_.emplace(storage, alias).first;
    argument_on_.emplace(found->second.unsafeGetStorageImpl(), tensor);
  }
  auto alias = alias_on(tensor, found->second);
  alias_of_.emplace(tensor.unsafeGetTensorImpl(), alias);
  argument_of_.emplace(alias.unsafeGetTensorImpl(), tensor);
  return alias;
}

void OpAliases::will_write(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return;
  auto alias = to_cpu(tensor);
  const bool late = streams_are_asynchronous() && memory_ == Memory::kDevice;
  written_.push_back({tensor, alias, alias.storage().data(), late ? alias.clone() : at::Tensor()});
}

void OpAliases::write_back() {
  for (const auto& written : written_) {
    const bool moved = written.alias.storage().data() != written.memory_before;
    if (moved || !same_layout(written.alias, written.tensor)) {
      write_back_resized(written);
    } else if (written.values_before.defined()) {
      write_back_late(written);
    }
  }
}

void OpAliases::write_back_resized(const Written& written) const {
  const auto& alias = written.alias;
  const bool moved = alias.storage().data() != written.memory_before;
  // Resize to all bytes that the strides span. A resize_() to the sizes alone would leave out gaps between elements.
  if (moved) written.tensor.resize_({static_cast<int64_t>(spanned_bytes(alias) / alias.element_size())});
  written.tensor.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  if (moved && memory_ == Memory::kDevice) {
    enqueue_span_copy(device_, op_name_.c_str(), cpu_alias(written.tensor), alias);
  } else if (written.values_before.defined()) {
    write_back_late(written);
  }
}

// The op has already written its values to device memory. Save the values, restore the memory, and let the stream write
// the values later.
void OpAliases::write_back_late(const Written& written) const {
  auto values = written.alias.clone();
  written.alias.copy_(written.values_before);
  enqueue_element_copy(device_, op_name_.c_str(), cpu_alias(written.tensor), std::move(values));
}

bool OpAliases::is_new(const at::Tensor& result) const {
  return result.defined() && result.is_cpu() && argument_of_.count(result.unsafeGetTensorImpl()) == 0 &&
         argument_on_.count(result.storage().unsafeGetStorageImpl()) == 0;
}

at::Tensor OpAliases::to_npu(const at::Tensor& result) {
  if (!result.defined() || !result.is_cpu()) return result;
  TORCH_CHECK_NOT_IMPLEMENTED(result.layout() == at::kStrided && !result.is_quantized() && !result._is_zerotensor(),
                              op_name_,
                              " is not emulated for this result: the emulated npu has dense tensors only (got ",
                              result.toString(), "); do this on the CPU");
  const auto argument = argument_of_.find(result.unsafeGetTensorImpl());
  if (argument != argument_of_.end()) return argument->second;
  const auto base = argument_on_.find(result.storage().unsafeGetStorageImpl());
  return base != argument_on_.end() ? view_of(base->second, result) : copy_of(result);
}

at::Tensor OpAliases::view_of(const at::Tensor& argument, const at::Tensor& result) const {
  at::Tensor view;
  if (argument.dtype() == result.dtype()) {
    view = at::as_strided(argument, result.sizes(), result.strides(), result.storage_offset());
  } else {
    view = at::empty({0}, argument.options().dtype(result.dtype()));
    view.set_(argument.storage(), result.storage_offset(), result.sizes(), result.strides());
  }
  view._set_conj(result.is_conj());
  view._set_neg(result.is_neg());
  return view;
}

at::Tensor OpAliases::copy_of(const at::Tensor& result) const {
  auto copy = at::empty_strided(result.sizes(), result.strides(), result.options().device(device_));
  if (memory_ == Memory::kDevice) enqueue_span_copy(device_, op_name_.c_str(), cpu_alias(copy), result);
  copy._set_conj(result.is_conj());
  copy._set_neg(result.is_neg());
  return copy;
}

}  // namespace vllm_npu::emulator
