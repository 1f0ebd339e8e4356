// Writes keys and values of new tokens to their slots in the paged cache: npu_scatter_pa_kv_cache.
// Source: CANN's document of aclnnScatterPaKvCache. Only its plain layout is emulated: cacheMode "Norm" without compression.
#include <algorithm>

#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

void check_cache(const at::Tensor& rows, const at::Tensor& cache, const char* name, int64_t tokens) {
  require_dimensions(rows, name, 3);
  require_dimensions(cache, name, 4);
  require_dtype(rows, name, {cache.scalar_type()});
  require(rows.size(0) == tokens && rows.size(1) == cache.size(2) && rows.size(2) == cache.size(3), name,
          " has the shape ", rows.sizes(), ", its cache ", cache.sizes(), "; they must be [tokens=", tokens,
          ", heads, size] and [blocks, block size, heads, size]");
}

void write(const at::Tensor& rows, const at::Tensor& cache, const at::Tensor& slots, const at::Tensor& used) {
  const int64_t block_size = cache.size(1);
  require(slots.numel() == 0 || slots.max().item<int64_t>() < cache.size(0) * block_size,
          "slotMapping must lie below ", cache.size(0) * block_size, ", the slots of the cache");
  cache.index_put_({slots.div(block_size, "floor"), slots.remainder(block_size)}, rows.index_select(0, used));
}

Plan scatter_kv_cache(at::Tensor key, at::Tensor key_cache, at::Tensor slot_mapping, at::Tensor value,
                      at::Tensor value_cache, OptionalTensor compress_lens, OptionalTensor compress_offsets,
                      OptionalTensor seq_lens, std::string cache_mode, std::string scatter_mode,
                      std::vector<int64_t> strides, std::vector<int64_t> offsets) {
  refuse_on_310p("npu_scatter_pa_kv_cache");
  for (const OptionalTensor& each : {compress_lens, compress_offsets, seq_lens}) {
    require_absent(each, "compress_lens, compress_seq_offsets or seq_lens", "compression is not emulated");
  }
  require(cache_mode == "Norm", "cache_mode '", cache_mode, "' is not emulated; use 'Norm'");
  require(scatter_mode.empty() || scatter_mode == "None", "scatter_mode '", scatter_mode, "' is not emulated");
  require(std::all_of(strides.begin(), strides.end(), [](int64_t each) { return each == 1; }) &&
              std::all_of(offsets.begin(), offsets.end(), [](int64_t each) { return each == 0; }),
          "strides and offsets are not emulated");
  require_dimensions(slot_mapping, "slot_mapping", 1);
  require_dtype(slot_mapping, "slot_mapping", {at::kInt, at::kLong});
  check_cache(key, key_cache, "key", slot_mapping.size(0));
  check_cache(value, value_cache, "value", slot_mapping.size(0));
  return [=] {
    const at::Tensor all = slot_mapping.to(at::kLong);
    const at::Tensor used = all.ge(0).nonzero().flatten();  // a negative slot writes nothing
    const at::Tensor slots = all.index_select(0, used);
    write(key, key_cache, slots, used);
    write(value, value_cache, slots, used);
  };
}

}  // namespace

ACLNN_OP(aclnnScatterPaKvCache, scatter_kv_cache);

}  // namespace vllm_npu::emulator::aclnn
