// What rotary position embeddings add, times the sines: each pair (a, b) of the last dimension, turned to (-b, a).
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace vllm_npu::emulator::aclnn {

// The first half pairs with the second.
inline at::Tensor turned_halves(const at::Tensor& x) {
  const std::vector<at::Tensor> halves = x.chunk(2, -1);
  return at::cat({-halves[1], halves[0]}, -1);
}

// Neighbours are pairs.
inline at::Tensor turned_neighbours(const at::Tensor& x) {
  const at::Tensor pairs = x.unflatten(-1, {x.size(-1) / 2, 2});
  return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
}

}  // namespace vllm_npu::emulator::aclnn
