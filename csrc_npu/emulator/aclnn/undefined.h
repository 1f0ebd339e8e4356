// The values of memory that an op leaves unwritten. On a device they are arbitrary. The emulator writes values that
// make a wrong use visible.
#pragma once

#include <ATen/ATen.h>

#include <limits>

#include "runtime/settings.h"

namespace vllm_npu::emulator::aclnn {

// Fills with NaN, with the smallest value of an integer type, or with true. If undefined_is_zero(), fills with zeros,
// for software that multiplies unwritten rows by zero.
inline void fill_undefined(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  if (undefined_is_zero()) {
    tensor.zero_();
    return;
  }
  switch (tensor.scalar_type()) {
    case at::kChar:
      tensor.fill_(std::numeric_limits<int8_t>::min());
      break;
    case at::kByte:
      tensor.fill_(std::numeric_limits<uint8_t>::max());
      break;
    case at::kShort:
      tensor.fill_(std::numeric_limits<int16_t>::min());
      break;
    case at::kInt:
      tensor.fill_(std::numeric_limits<int32_t>::min());
      break;
    case at::kLong:
      tensor.fill_(std::numeric_limits<int64_t>::min());
      break;
    case at::kBool:
      tensor.fill_(true);
      break;
    default:
      tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  }
}

// Copies `rows` to the front of `out` and leaves the rest undefined.
inline void write_front(const at::Tensor& out, const at::Tensor& rows) {
  out.narrow(0, 0, rows.size(0)).copy_(rows);
  fill_undefined(out.narrow(0, rows.size(0), out.size(0) - rows.size(0)));
}

}  // namespace vllm_npu::emulator::aclnn
