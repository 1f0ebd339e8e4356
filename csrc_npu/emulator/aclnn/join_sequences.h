// Joins the rows of sequences in a paged cache, for the ops of libopapi.so and libatb.so.
#pragma once

#include <ATen/ATen.h>

#include <functional>

#include "runtime/runtime.h"

namespace vllm_npu::emulator::aclnn {

struct Named {
  at::Tensor tensor;
  const char* name;  // in messages
};

// Checks the arguments, and returns the work: caches [blocks, block_size, heads, width], table [B, blocks of a sequence] int32,
// lengths [B] int32, or with `cumulative` their sums [B + 1] that begin with 0, starts [B] int32 or undefined, outputs
// [sum of lengths, heads, width]. A sequence is read from the block that holds its start.
EMULATOR_API std::function<void()> join_sequences(const at::Tensor (&caches)[2], const Named& table,
                                                  const Named& lengths, const Named& starts,
                                                  const at::Tensor (&out)[2], bool cumulative);

}  // namespace vllm_npu::emulator::aclnn
