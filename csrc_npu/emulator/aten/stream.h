// How ops that compute on the host keep the order of the device's work.
//
// An op computes on the calling thread. It first waits until its stream has done all earlier work. So it reads the
// values that a device would read at this point of the stream. With asynchronous streams, the stream writes the results
// to device memory later. A reader on the host or on another stream must wait, or it reads the old values. A device
// whose queue holds one op behaves in the same way.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include "runtime/runtime.h"

namespace vllm_npu::emulator {

// Returns the current stream of `device`, after torch_npu's launch queue has put all its ops on it.
aclrtStream current_stream(c10::Device device);

// Waits for the current stream of `device`. Raises the error of earlier work, if there is one.
void wait_for_current_stream(c10::Device device);

// Raises an error that names `what` if `code` isn't ACL_SUCCESS.
void check(int code, const char* what);

// Copy CPU tensors as work of the current stream of `device`. A tensor on device memory is an alias that owns nothing.
// A tensor on host memory is kept alive until the copy is done. enqueue_element_copy writes only the elements of
// `target`. enqueue_span_copy copies all bytes that `source` spans.
void enqueue_element_copy(c10::Device device, const char* name, at::Tensor target, at::Tensor source);
void enqueue_span_copy(c10::Device device, const char* name, at::Tensor target, at::Tensor source);

// Copies a CPU kernel's result to the CPU alias of a result on the device. Equal strides are copied as bytes, because
// elements may share memory.
void copy_result(const at::Tensor& target, const at::Tensor& result);

// Returns a copy of the text that is never freed. Pending work keeps the pointer to its name.
const char* lasting(const char* name);

}  // namespace vllm_npu::emulator
