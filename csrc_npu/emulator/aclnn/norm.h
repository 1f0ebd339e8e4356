// Root-mean-square norms in float32, for the ops that fuse other work with them.
#pragma once

#include <ATen/ATen.h>

namespace vllm_npu::emulator::aclnn {

struct Normed {
  at::Tensor values;  // float32, with the shape of x
  at::Tensor rstd;    // [..., 1] float32
};

// `more` is added to gamma: Gemma's weights are differences from one.
Normed rms_normed(const at::Tensor& x, const at::Tensor& gamma, double epsilon, double more = 0);

// Refuses a gamma whose dimensions are not x's last, and types that no norm takes.
void require_norm(const at::Tensor& x, const at::Tensor& gamma);

// The same for x1 + x2.
void require_added_norm(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma);

}  // namespace vllm_npu::emulator::aclnn
