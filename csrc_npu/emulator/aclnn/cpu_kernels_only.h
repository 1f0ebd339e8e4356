// Makes calls of torch go directly to the CPU kernels, without autograd, autocast or Python modes of the calling
// thread.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace vllm_npu::emulator::aclnn {

class CpuKernelsOnly {
 private:
  c10::InferenceMode ordinary_tensors_{false};
  c10::impl::ExcludeDispatchKeyGuard excluded_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                               c10::autocast_dispatch_keyset | c10::python_ks};
};

}  // namespace vllm_npu::emulator::aclnn
