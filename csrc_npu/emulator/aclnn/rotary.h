// Replaces each pair (a, b) of the last dimension by (-b, a). Rotary position embeddings multiply the result by the
// sines.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace vllm_npu::emulator::aclnn {

// Pairs have an element of the first half and one of the second half.
inline at::Tensor turned_halves(const at::Tensor& x) {
  const std::vector<at::Tensor> halves = x.chunk(2, -1);
  return at::cat({-halves[1], halves[0]}, -1);
}

// Pairs are neighbours.
inline at::Tensor turned_neighbours(const at::Tensor& x) {
  const at::Tensor pairs = x.unflatten(-1, {x.size(-1) / 2, 2});
  return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
}

}  // namespace vllm_npu::emulator::aclnn
