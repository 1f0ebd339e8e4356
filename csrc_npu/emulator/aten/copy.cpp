#include "copy.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch_npu/csrc/core/npu/NPUCachingAllocator.h>
#include <torch_npu/csrc/core/npu/NPURecovery.h>

#include "alias.h"
#include "stream.h"

namespace vllm_npu::emulator {
namespace {

constexpr const char* kName = "aten::copy_";

at::Tensor on_cpu(const at::Tensor& tensor) { return tensor.is_privateuseone() ? cpu_alias(tensor) : tensor; }

bool is_plain_copy(const at::Tensor& to, const at::Tensor& from) {
  return to.dtype() == from.dtype() && to.sizes() == from.sizes() && to.is_contiguous() && from.is_contiguous() &&
         to.is_conj() == from.is_conj() && to.is_neg() == from.is_neg();
}

// Tells torch_npu's host allocator that the copy uses this page-locked memory, so that freed memory is reused only
// after it.
void keep_until_copied(const at::Tensor& host, c10::Device device) {
  const auto& data = host.storage().data_ptr();
  const auto stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  at::getHostAllocator(device.type())->record_event(host.mutable_data_ptr(), data.get_context(), stream);
}

void copy_in_background(const at::Tensor& to, const at::Tensor& from, const at::Tensor& host, c10::Device device) {
  if (is_plain_copy(to, from)) {
    check(copy_on_stream(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes(), current_stream(device), kName),
          kName);
  } else {
    // Both sides are aliases, because the stream's thread must not be the last owner of a tensor that Python knows.
    enqueue_element_copy(device, kName, cpu_alias(to), cpu_alias(from));
  }
  keep_until_copied(host, device);
}

void copy_with_host(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const auto& host = to.is_privateuseone() ? from : to;
  const auto device = to.is_privateuseone() ? to.device() : from.device();
  if (non_blocking && is_pinned_host_memory(host.const_data_ptr())) {
    copy_in_background(to, from, host, device);
  } else {
    wait_for_current_stream(device);
    on_cpu(to).copy_(on_cpu(from));
  }
}

void copy_on_device(const at::Tensor& to, const at::Tensor& from) {
  if (to.device() == from.device()) {
    enqueue_element_copy(to.device(), kName, cpu_alias(to), cpu_alias(from));
  } else {
    // torch_npu makes the stream of each device wait for that of the other. Here the host waits for both.
    wait_for_current_stream(from.device());
    wait_for_current_stream(to.device());
    cpu_alias(to).copy_(cpu_alias(from));
  }
}

// As torch_npu's own copy: unsafe data is not read, and what is written is safe again.
void refuse_unsafe_data(const at::Tensor& to, const at::Tensor& from) {
  if (!c10_npu::get_npu_data_unsafe_flag()) return;
  c10_npu::check_npu_tensor_is_safe(from);
  if (to.is_privateuseone()) c10_npu::NPUCachingAllocator::updateBlockToSafe(to.storage().data_ptr());
}

}  // namespace

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::DeviceGuard guard(self.is_privateuseone() ? self.device() : source.device());
  trace(kName);
  refuse_unsafe_data(self, source);
  const auto expanded = at::expand_inplace(self, source, kName);  // an error is raised here, not on the stream's thread
  if (self.is_privateuseone() && source.is_privateuseone()) {
    copy_on_device(self, *expanded);
  } else {
    copy_with_host(self, *expanded, non_blocking);
  }
  return self;
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  trace("aten::_local_scalar_dense");
  const c10::DeviceGuard guard(self.device());
  wait_for_current_stream(self.device());
  return at::_local_scalar_dense(cpu_alias(self));
}

}  // namespace vllm_npu::emulator
