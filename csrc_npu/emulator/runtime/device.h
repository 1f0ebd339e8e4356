// The calling thread's current device.
#pragma once

#include "runtime.h"

namespace vllm_npu::emulator {

constexpr int kNoDevice = -1;

EMULATOR_API int current_device();  // kNoDevice until the thread sets one
void set_current_device(int device);

// Returns ACL_SUCCESS if the thread has a device, else an error that names `function`.
EMULATOR_API int require_device(const char* function);

}  // namespace vllm_npu::emulator
