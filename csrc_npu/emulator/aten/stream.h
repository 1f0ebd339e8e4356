// The order of the device's work, as ops that compute on the host have to keep it.
//
// An op computes on the calling thread. It first waits until its stream has done all earlier work, so it reads what
// a device would read at this point of the stream. With asynchronous streams its results reach device memory later,
// as work of the stream: a reader on another stream, or on the host, that doesn't wait sees the old values. That is
// how a device behaves whose queue holds one op.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include "runtime/runtime.h"

namespace vllm_npu::emulator {

// The current stream of `device`. torch_npu's own launch queue has been emptied into it.
aclrtStream current_stream(c10::Device device);

// Waits for the current stream of `device`; raises the error of earlier work, if any.
void wait_for_current_stream(c10::Device device);

// Raises an error that names `what` if `code` isn't ACL_SUCCESS.
void check(int code, const char* what);

// Copies tensors on CPU memory as work of the current stream of `device`. A tensor on device memory is an alias and
// owns nothing, as on a device; the other is kept until the copy is done.
// The first keeps to the elements of `target`, the second takes all bytes that `source` spans.
void enqueue_element_copy(c10::Device device, const char* name, at::Tensor target, at::Tensor source);
void enqueue_span_copy(c10::Device device, const char* name, at::Tensor target, at::Tensor source);

}  // namespace vllm_npu::emulator
