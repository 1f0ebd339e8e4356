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

// Attention of one sequence: query [N, n, D], key [KN, m, D], value [KN, m, Dv]. Head h of the query reads head h / (N
// / KN) of key and value. `hidden` [n, m] bool is true where a query does not see a key. A query that sees no key gets
// zeros and an lse of infinity.
EMULATOR_API Attended attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale,
                             const std::optional<at::Tensor>& hidden);

// Returns the first `length` tokens of a sequence, [length, ...], from a cache [blocks, block_size, ...]. `blocks` is
// the sequence's row of the block table. Refuses blocks that the cache does not have.
EMULATOR_API at::Tensor gather_blocks(const at::Tensor& cache, const at::Tensor& blocks, int64_t length);

constexpr int64_t kCompressedMask = 2048;  // rows and columns of the mask that all causal sequences share

// Refuses a mask of the causal modes (sparse_mode 2 to 4) that is not one of 2048 x 2048.
EMULATOR_API void require_compressed_mask(const at::Tensor& mask, int64_t sparse_mode);

// Refuses such a mask whose part for a sequence is not ones above the diagonal and zeros elsewhere. `size` is the
// larger number of the sequence's queries and keys. Reads the mask's values: call it on the stream.
EMULATOR_API void require_causal_values(const at::Tensor& mask, int64_t sparse_mode, int64_t size);

// Refuses a type that attention does not take. With VLLM_NPU_EMULATOR_LIMITS=none it takes float32, which no chip
// takes.
EMULATOR_API void require_attention_dtype(const at::Tensor& tensor, const char* name);

}  // namespace vllm_npu::emulator::aclnn
