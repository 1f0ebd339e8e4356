// Scaled dot-product attention in float32, and the paged cache, for the ops of libopapi.so and libatb.so.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "runtime/runtime.h"

namespace vllm_npu::emulator::aclnn {

struct Attended {
  at::Tensor out;  // [N, n, Dv] float32
  at::Tensor lse;  // [N, n] float32: log of the sum of exponents
};

// One sequence: query [N, n, D], key [KN, m, D], value [KN, m, Dv]; head h of the query reads head h / (N / KN).
// `hidden` [n, m] bool is true where a query does not see a key. A query that sees nothing has zeros and an lse of
// infinity.
EMULATOR_API Attended attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale,
                             const std::optional<at::Tensor>& hidden);

// The first `length` tokens of a sequence, [length, ...], from a cache [blocks, block_size, ...] by its row of the
// block table. Refuses blocks that the cache has not.
EMULATOR_API at::Tensor gather_blocks(const at::Tensor& cache, const at::Tensor& blocks, int64_t length);

// Refuses a type that attention is not made for. float32 passes with VLLM_NPU_EMULATOR_LIMITS=none, though no chip
// takes it.
EMULATOR_API void require_attention_dtype(const at::Tensor& tensor, const char* name);

}  // namespace vllm_npu::emulator::aclnn
