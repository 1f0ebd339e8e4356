// AtbPagedCacheLoad: rows of a paged cache, joined. torch_npu looks this function up by name, as it does with aclnn's, and
// passes aclnn's handles.
//
// Contract: op-plugin's op_plugin/ops/atb/PagedCacheLoadAtb.cpp and atb/AtbCommon.h (EXEC_ATB_CMD), for the sizes and the blocks
// its test of npu_paged_cache_load. `op` is null at the first call with these arguments; torch_npu keeps what is returned, and
// passes it again.
#include <ATen/ATen.h>

#include <functional>
#include <stdexcept>
#include <string>

#include "abi.h"
#include "aclnn/attention.h"
#include "aclnn/cpu_kernels_only.h"
#include "aclnn/handles.h"
#include "aclnn/refusal.h"
#include "runtime/runtime.h"

namespace {

using namespace vllm_npu::emulator;
using aclnn::require;

constexpr char kName[] = "ATB PagedCacheLoad";
constexpr int8_t kPlainCaches = 1;  // 0: FRACTAL_NZ

// Holds the work of the last GetWorkspaceSize, which Execute puts into the stream.
class PagedCacheLoad : public atb::Operation {
 public:
  std::string GetName() const override { return kName; }
  atb::Status InferShape(const atb::SVector<atb::TensorDesc>&, atb::SVector<atb::TensorDesc>&) const override {
    return atb::ERROR_INTERNAL_ERROR;  // torch_npu infers shapes itself
  }
  uint32_t GetInputNum() const override { return 0; }
  uint32_t GetOutputNum() const override { return 0; }
  atb::Status Setup(const atb::VariantPack&, uint64_t&, atb::Context*) override { return atb::ERROR_INTERNAL_ERROR; }
  atb::Status Execute(const atb::VariantPack&, uint8_t*, uint64_t, atb::Context* context) override {
    trace(kName);
    const int code = enqueue(context->GetExecuteStream(), kName, [work = work] {
      try {
        const aclnn::CpuKernelsOnly kernels;
        work();
        return atb::NO_ERROR;
      } catch (const std::exception& error) {
        return static_cast<atb::ErrorType>(fail(atb::ERROR_INTERNAL_ERROR, "%s: %s", kName, error.what()));
      }
    });
    if (code != atb::NO_ERROR) throw std::runtime_error(last_error_text());
    return atb::NO_ERROR;
  }

  std::function<void()> work;
};

at::Tensor tensor_of(const aclTensor* handle, const char* name) {
  require(handle != nullptr, name, " is missing");
  require(handle->fault.empty(), name, " ", handle->fault);
  return handle->tensor;
}

// caches [blocks, block_size, heads, width], block_table [B, blocks of a sequence] int32, lengths and starts [B] int32, outputs
// [sum of lengths, heads, width]. A sequence is read from the block that holds its start.
std::function<void()> plan(const at::Tensor (&caches)[2], const at::Tensor& table, const at::Tensor& lengths,
                           const at::Tensor& starts, const at::Tensor (&out)[2]) {
  aclnn::require_dtype(table, "block_table", {at::kInt});
  aclnn::require_dtype(lengths, "context_lens", {at::kInt});
  aclnn::require_dimensions(table, "block_table", 2);
  aclnn::require_shape(lengths, "context_lens", {table.size(0)});
  if (starts.defined()) {
    aclnn::require_dtype(starts, "seq_starts", {at::kInt});
    aclnn::require_shape(starts, "seq_starts", {table.size(0)});
  }
  for (const int i : {0, 1}) {
    const char* name = i == 0 ? "key" : "value";
    aclnn::require_dimensions(caches[i], i == 0 ? "key_cache" : "value_cache", 4);
    aclnn::require_dtype(out[i], name, {caches[i].scalar_type()});
    aclnn::require_shape(out[i], name, {out[0].size(0), caches[i].size(2), caches[i].size(3)});
  }
  require(caches[0].sizes().slice(0, 2) == caches[1].sizes().slice(0, 2), "key_cache has the shape ", caches[0].sizes(),
          " and value_cache ", caches[1].sizes(), "; their blocks differ");
  return [=, key_cache = caches[0], value_cache = caches[1], key = out[0], value = out[1]] {
    int64_t row = 0;
    for (int64_t i = 0; i < table.size(0); ++i) {
      const int64_t length = lengths[i].item<int64_t>();
      const int64_t first = starts.defined() ? starts[i].item<int64_t>() / key_cache.size(1) : 0;
      require(length >= 0 && row + length <= key.size(0), "context_lens has ", length, " at ", i, ", and key has ",
              key.size(0), " rows, of which ", row, " are taken");
      require(first >= 0 && first <= table.size(1), "seq_starts names block ", first, " of ", table.size(1));
      const at::Tensor blocks = table[i].slice(0, first);
      key.narrow(0, row, length).copy_(aclnn::gather_blocks(key_cache, blocks, length));
      value.narrow(0, row, length).copy_(aclnn::gather_blocks(value_cache, blocks, length));
      row += length;
    }
  };
}

}  // namespace

extern "C" {

ATB_API atb::Status AtbPagedCacheLoadGetWorkspaceSize(const aclTensor* key_cache, const aclTensor* value_cache,
                                                      const aclTensor* block_table, const aclTensor* context_lens,
                                                      const aclTensor* key, const aclTensor* value,
                                                      const aclTensor* seq_starts, int8_t kv_cache_cfg, bool cumsum,
                                                      bool has_seq_starts, uint64_t* workspace_size,
                                                      atb::Operation** operation, atb::Context*) {
  *workspace_size = 0;
  try {
    const aclnn::CpuKernelsOnly kernels;
    require(kv_cache_cfg == kPlainCaches, "caches in the format FRACTAL_NZ are not emulated");
    require(!cumsum, "cumsum=True is not emulated");
    if (*operation == nullptr) *operation = new PagedCacheLoad;
    static_cast<PagedCacheLoad*>(*operation)->work =
        plan({tensor_of(key_cache, "key_cache"), tensor_of(value_cache, "value_cache")},
             tensor_of(block_table, "block_table"), tensor_of(context_lens, "context_lens"),
             has_seq_starts ? tensor_of(seq_starts, "seq_starts") : at::Tensor(),
             {tensor_of(key, "key"), tensor_of(value, "value")});
    return atb::NO_ERROR;
  } catch (const std::exception& error) {
    // torch_npu's own error names the function only.
    throw std::runtime_error(std::string(kName) + ": " + error.what());
  }
}

ATB_API atb::Status AtbPagedCacheLoad(void*, uint64_t, atb::Operation* operation, atb::Context* context) {
  return operation->Execute({}, nullptr, 0, context);
}

}  // extern "C"
