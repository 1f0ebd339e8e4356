// Rows of a paged cache, joined: npu_gather_pa_kv_cache, and the plan of ATB's PagedCacheLoad.
// Source: CANN's document of aclnnGatherPaKvCache. Only its plain layout is emulated: cacheMode "Norm".
#include "join_sequences.h"

#include "attention.h"
#include "op.h"

namespace vllm_npu::emulator::aclnn {

std::function<void()> join_sequences(const at::Tensor (&caches)[2], const Named& table, const Named& lengths,
                                     const Named& starts, const at::Tensor (&out)[2], bool cumulative) {
  require_dtype(table.tensor, table.name, {at::kInt});
  require_dtype(lengths.tensor, lengths.name, {at::kInt});
  require_dimensions(table.tensor, table.name, 2);
  require_dimensions(out[0], "key", 3);
  const int64_t batch = table.tensor.size(0);
  require_shape(lengths.tensor, lengths.name, {cumulative ? batch + 1 : batch});
  if (starts.tensor.defined()) {
    require_dtype(starts.tensor, starts.name, {at::kInt});
    require_shape(starts.tensor, starts.name, {batch});
  }
  for (const int i : {0, 1}) {
    const char* name = i == 0 ? "key" : "value";
    require_dimensions(caches[i], i == 0 ? "key_cache" : "value_cache", 4);
    require_dtype(out[i], name, {caches[i].scalar_type()});
    require_shape(out[i], name, {out[0].size(0), caches[i].size(2), caches[i].size(3)});
  }
  require(caches[0].sizes().slice(0, 2) == caches[1].sizes().slice(0, 2), "key_cache has the shape ", caches[0].sizes(),
          " and value_cache ", caches[1].sizes(), "; their blocks differ");
  return [=, key_cache = caches[0], value_cache = caches[1], key = out[0], value = out[1]] {
    const at::Tensor each = cumulative ? lengths.tensor.diff() : lengths.tensor;
    require(!cumulative || lengths.tensor[0].item<int64_t>() == 0, lengths.name, " has sums that do not begin with 0");
    int64_t row = 0;
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t length = each[i].item<int64_t>();
      const int64_t first = starts.tensor.defined() ? starts.tensor[i].item<int64_t>() / key_cache.size(1) : 0;
      require(length >= 0 && row + length <= key.size(0), lengths.name, " has ", length, " at ", i, ", and key has ",
              key.size(0), " rows, of which ", row, " are taken");
      require(first >= 0 && first <= table.tensor.size(1), starts.name, " names block ", first, " of ",
              table.tensor.size(1));
      const at::Tensor blocks = table.tensor[i].slice(0, first);
      key.narrow(0, row, length).copy_(gather_blocks(key_cache, blocks, length));
      value.narrow(0, row, length).copy_(gather_blocks(value_cache, blocks, length));
      row += length;
    }
  };
}

namespace {

Plan gather_kv_cache(at::Tensor key_cache, at::Tensor value_cache, at::Tensor block_tables, at::Tensor seq_lens,
                     at::Tensor key, at::Tensor value, OptionalTensor seq_offset, std::string cache_mode,
                     bool is_seq_lens_cumsum) {
  require(cache_mode == "Norm", "caches in the format FRACTAL_NZ, cache_mode '", cache_mode, "', are not emulated");
  require_dtype(key_cache, "key_cache", {at::kChar, at::kHalf, at::kBFloat16});
  require_dtype(value_cache, "value_cache", {key_cache.scalar_type()});
  return join_sequences({key_cache, value_cache}, {block_tables, "block_tables"}, {seq_lens, "seq_lens"},
                        {seq_offset.value_or(at::Tensor()), "seq_offset"}, {key, value}, is_seq_lens_cumsum);
}

}  // namespace

ACLNN_OP(aclnnGatherPaKvCache, gather_kv_cache);

}  // namespace vllm_npu::emulator::aclnn
