#include "stream.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/copy.h>

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>

#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace vllm_npu::emulator {
namespace {

int copy_elements(const char* name, const at::Tensor& target, const at::Tensor& source) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  try {
    target.copy_(source);
    return ACL_SUCCESS;
  } catch (const c10::Error& error) {
    return fail(ACL_ERROR_INTERNAL_ERROR, "%s: %s", name, error.what_without_backtrace());
  }
}

int copy_span(const at::Tensor& target, const at::Tensor& source) {
  if (source.numel() == 0) return ACL_SUCCESS;
  const size_t bytes = at::detail::computeStorageNbytes(source.sizes(), source.strides(), source.element_size());
  std::memcpy(target.mutable_data_ptr(), source.const_data_ptr(), bytes);
  return ACL_SUCCESS;
}

}  // namespace

const char* lasting(const char* name) {
  static auto* mutex = new std::mutex;
  static auto* names = new std::unordered_set<std::string>;
  const std::lock_guard<std::mutex> lock(*mutex);
  return names->emplace(name).first->c_str();
}

void copy_result(const at::Tensor& target, const at::Tensor& result) {
  if (target.dtype() == result.dtype() && target.sizes() == result.sizes() && target.strides() == result.strides()) {
    copy_span(target, result);
  } else {
    target.copy_(result);
  }
}

aclrtStream current_stream(c10::Device device) { return c10_npu::getCurrentNPUStream(device.index()).stream(); }

void check(int code, const char* what) {
  TORCH_CHECK(code == ACL_SUCCESS, what, ": error ", code, " of the emulated device: ", last_error_text());
}

void wait_for_current_stream(c10::Device device) {
  check(synchronize(current_stream(device)), "earlier work on the current stream");
}

void enqueue_element_copy(c10::Device device, const char* name, at::Tensor target, at::Tensor source) {
  name = lasting(name);
  Addresses memory;
  for (const auto& tensor : {target, source}) {
    if (tensor.numel() > 0) memory.push_back(tensor.const_data_ptr());
  }
  auto work = [name, target = std::move(target), source = std::move(source)] {
    return copy_elements(name, target, source);
  };
  check(enqueue(current_stream(device), name, std::move(work), std::move(memory)), name);
}

void enqueue_span_copy(c10::Device device, const char* name, at::Tensor target, at::Tensor source) {
  auto work = [target = std::move(target), source = std::move(source)] { return copy_span(target, source); };
  check(enqueue(current_stream(device), lasting(name), std::move(work)), name);
}

}  // namespace vllm_npu::emulator
