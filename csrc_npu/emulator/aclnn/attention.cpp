#include "attention.h"

#include <algorithm>
#include <limits>

#include "refusal.h"
#include "runtime/settings.h"

namespace vllm_npu::emulator::aclnn {

Attended attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale,
                const std::optional<at::Tensor>& hidden) {
  const int64_t heads = query.size(0), rows = query.size(1), kv_heads = key.size(0), columns = key.size(1);
  const at::Tensor grouped = query.to(at::kFloat).reshape({kv_heads, heads / kv_heads * rows, query.size(2)});
  at::Tensor scores = at::matmul(grouped, key.to(at::kFloat).transpose(1, 2)) * scale;
  scores = scores.view({heads, rows, columns});
  if (hidden) scores = scores.masked_fill(*hidden, -std::numeric_limits<float>::infinity());
  const at::Tensor lse = at::logsumexp(scores, -1);
  const at::Tensor blind = at::isneginf(lse);
  const at::Tensor weights = at::exp(scores - at::where(blind, 0.0F, lse).unsqueeze(-1));
  const at::Tensor out = at::matmul(weights.view({kv_heads, heads / kv_heads * rows, columns}), value.to(at::kFloat));
  return {out.view({heads, rows, value.size(2)}), at::where(blind, std::numeric_limits<float>::infinity(), lse)};
}

at::Tensor gather_blocks(const at::Tensor& cache, const at::Tensor& blocks, int64_t length) {
  const int64_t block_size = cache.size(1);
  const int64_t count = (length + block_size - 1) / block_size;
  require(count <= blocks.size(0), "a sequence of ", length, " tokens needs ", count, " blocks of ", block_size,
          " and the block table has ", blocks.size(0), " for it");
  const at::Tensor used = blocks.narrow(0, 0, count).to(at::kLong);
  require(count == 0 || used.ge(0).logical_and(used < cache.size(0)).all().item<bool>(),
          "the block table names a block outside 0..", cache.size(0) - 1);
  return cache.index_select(0, used).flatten(0, 1).narrow(0, 0, length);
}

void require_compressed_mask(const at::Tensor& mask, int64_t sparse_mode) {
  require_dtype(mask, "atten_mask", {at::kBool, at::kChar, at::kByte});
  require(mask.numel() == kCompressedMask * kCompressedMask && mask.size(-1) == kCompressedMask,
          "atten_mask has the shape ", mask.sizes(), "; sparse_mode=", sparse_mode, " needs 2048 x 2048");
}

void require_causal_values(const at::Tensor& mask, int64_t sparse_mode, int64_t size) {
  const int64_t read = std::min(size, kCompressedMask);
  const at::Tensor corner =
      mask.view({kCompressedMask, kCompressedMask}).narrow(0, 0, read).narrow(1, 0, read).to(at::kBool);
  require(at::equal(corner, at::ones({read, read}, at::kBool).triu(1)), "atten_mask of sparse_mode=", sparse_mode,
          " must be ones above the diagonal and zeros elsewhere");
}

void require_attention_dtype(const at::Tensor& tensor, const char* name) {
  if (limits_are_off() && tensor.scalar_type() == at::kFloat) return;
  require_dtype(tensor, name, {at::kHalf, at::kBFloat16});
}

}  // namespace vllm_npu::emulator::aclnn
