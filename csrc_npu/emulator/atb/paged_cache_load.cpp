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
#include "aclnn/cpu_kernels_only.h"
#include "aclnn/handles.h"
#include "aclnn/join_sequences.h"
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
    if (*operation == nullptr) *operation = new PagedCacheLoad;
    static_cast<PagedCacheLoad*>(*operation)->work =
        aclnn::join_sequences({tensor_of(key_cache, "key_cache"), tensor_of(value_cache, "value_cache")},
                              {tensor_of(block_table, "block_table"), "block_table"},
                              {tensor_of(context_lens, "context_lens"), "context_lens"},
                              {has_seq_starts ? tensor_of(seq_starts, "seq_starts") : at::Tensor(), "seq_starts"},
                              {tensor_of(key, "key"), tensor_of(value, "value")}, cumsum);
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
