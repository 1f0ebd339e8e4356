// libatb.so: the operations of Ascend Transformer Boost that torch_npu creates.
//
// Contracts: op-plugin's sources of the operators, op_plugin/ops/atb, and ATB's documents of the parameters. torch_npu
// checks what Setup returns and ignores what Execute returns. Its error shows only the operation's name. So Setup makes
// all checks and puts the reason into the name, and an error during the computation is thrown.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

#include "abi.h"
#include "aclnn/attention.h"
#include "aclnn/cpu_kernels_only.h"
#include "aclnn/handles.h"
#include "aclnn/refusal.h"
#include "aclnn/rotary.h"
#include "runtime/runtime.h"

namespace {

using namespace vllm_npu::emulator;
using aclnn::refuse;
using aclnn::require;
using Work = std::function<void()>;
using Tensors = std::vector<at::Tensor>;

// An operation's tensors as torch tensors, in the order in which torch_npu passes them.
struct Operands {
  Tensors in;
  Tensors out;
};

at::Tensor as_torch(const atb::Tensor& tensor, const char* which, std::size_t index) {
  require(tensor.desc.format == ACL_FORMAT_ND, which, " ", index, " has the private format ", tensor.desc.format,
          "; only plain formats are emulated");
  const at::ScalarType type = aclnn::scalar_type(tensor.desc.dtype);
  require(type != at::kBits8, which, " ", index, " has the ACL type ", tensor.desc.dtype, ", which is not emulated");
  void* memory = tensor.deviceData != nullptr ? tensor.deviceData : tensor.hostData;
  const at::IntArrayRef sizes(tensor.desc.shape.dims, tensor.desc.shape.dimNum);
  const at::Tensor alias = at::from_blob(memory, sizes, at::TensorOptions().dtype(type));
  return tensor.deviceData != nullptr ? alias : alias.clone();  // host memory may be freed before the work runs
}

Operands as_torch(const atb::VariantPack& pack) {
  Operands operands;
  for (std::size_t i = 0; i < pack.inTensors.size(); ++i)
    operands.in.push_back(as_torch(pack.inTensors[i], "input", i));
  for (std::size_t i = 0; i < pack.outTensors.size(); ++i)
    operands.out.push_back(as_torch(pack.outTensors[i], "output", i));
  return operands;
}

// --- The operations: each checks its parameters and operands at once and returns the work to run later ---

// key, value [T, heads, width], caches [blocks, block_size, heads, width], slots [T] int32. A slot of -1 is not cached.
Work plan(const atb::infer::ReshapeAndCacheParam& param, const Operands& operands) {
  aclnn::require_one_of(param.compressType, "compressType", {0});
  aclnn::require_one_of(param.kvCacheCfg, "kvCacheCfg", {0});
  const at::Tensor slots = operands.in[4];
  aclnn::require_dtype(slots, "slot_indices", {at::kInt});
  for (const int i : {0, 1}) {
    const at::Tensor &rows = operands.in[i], &cache = operands.out[i];
    const char* name = i == 0 ? "key" : "value";
    aclnn::require_dtype(rows, name, {cache.scalar_type()});
    aclnn::require_dimensions(cache, i == 0 ? "key_cache" : "value_cache", 4);
    aclnn::require_shape(rows, name, {slots.numel(), cache.size(2), cache.size(3)});
  }
  return [=] {
    const at::Tensor kept = slots >= 0;
    const at::Tensor where = slots.masked_select(kept).to(at::kLong);
    for (const int i : {0, 1}) {
      const at::Tensor cache = operands.out[i].flatten(0, 1);
      require((where < cache.size(0)).all().item<bool>(), "slot_indices names a slot outside of the cache, which has ",
              cache.size(0));
      cache.index_copy_(0, where, operands.in[i].index({kept}));
    }
  };
}

// query, key [T, heads * width], cos, sin [T, width], number of tokens [1].
Work plan(const atb::infer::RopeParam& param, const Operands& operands) {
  const at::Tensor cos = operands.in[2], sin = operands.in[3];
  const int64_t width = cos.size(-1);
  aclnn::require_one_of(param.rotaryCoeff, "rotaryCoeff", {2, width});
  aclnn::require_one_of(param.cosFormat, "cosFormat", {0});
  aclnn::require_dimensions(cos, "cos", 2);
  aclnn::require_shape(sin, "sin", cos.sizes());
  for (const int i : {0, 1}) {
    require(operands.in[i].size(0) == cos.size(0) && operands.in[i].numel() % std::max<int64_t>(cos.numel(), 1) == 0,
            i == 0 ? "query" : "key", " has the shape ", operands.in[i].sizes(), " and cos ", cos.sizes());
  }
  return [=] {
    const auto factor = [](const at::Tensor& tensor) { return tensor.to(at::kFloat).unsqueeze(1); };
    for (const int i : {0, 1}) {
      const at::Tensor x = operands.in[i].to(at::kFloat).reshape({cos.size(0), -1, width});
      const at::Tensor turned = param.rotaryCoeff == 2 ? aclnn::turned_halves(x) : aclnn::turned_neighbours(x);
      operands.out[i].copy_((x * factor(cos) + turned * factor(sin)).view(operands.out[i].sizes()));
    }
  };
}

// query [T, N, D] with one token for each sequence, caches [blocks, block_size, KN, D], block table [T, blocks],
// lengths [T] int32.
Work plan(const atb::infer::PagedAttentionParam& param, const Operands& operands) {
  aclnn::require_one_of(param.maskType, "maskType", {0});
  aclnn::require_one_of(param.batchRunStatusEnable, "batchRunStatusEnable", {0});
  aclnn::require_one_of(param.quantType, "quantType", {0});
  aclnn::require_one_of(param.compressType, "compressType", {0});
  aclnn::require_one_of(param.calcType, "calcType", {0});
  aclnn::require_one_of(param.scaleType, "scaleType", {0});
  aclnn::require_one_of(param.inputLayout, "inputLayout", {0});
  aclnn::require_one_of(param.mlaVHeadSize, "mlaVHeadSize", {0});
  const at::Tensor query = operands.in[0], key = operands.in[1], value = operands.in[2];
  const at::Tensor table = operands.in[3], lengths = operands.in[4], out = operands.out[0];
  aclnn::require_attention_dtype(query, "query");
  aclnn::require_dtype(key, "key_cache", {query.scalar_type()});
  aclnn::require_dtype(value, "value_cache", {query.scalar_type()});
  aclnn::require_dtype(table, "block_table", {at::kInt});
  aclnn::require_dtype(lengths, "context_lens", {at::kInt});
  aclnn::require_dimensions(query, "query", 3);
  aclnn::require_dimensions(key, "key_cache", 4);
  aclnn::require_dimensions(value, "value_cache", 4);
  require(param.kvHeadNum > 0 && param.headNum % param.kvHeadNum == 0, "num_heads=", param.headNum,
          " is no multiple of num_kv_heads=", param.kvHeadNum);
  require(query.size(1) == param.headNum && key.size(2) == param.kvHeadNum && value.size(2) == param.kvHeadNum &&
              key.size(3) == query.size(2),
          "query has the shape ", query.sizes(), ", key_cache ", key.sizes(), " and value_cache ", value.sizes(),
          "; num_heads is ", param.headNum, " and num_kv_heads ", param.kvHeadNum);
  require(lengths.numel() <= query.size(0) && table.size(0) >= lengths.numel(), "there are ", query.size(0),
          " rows of query, ", table.size(0), " of block_table and ", lengths.numel(), " context_lens");
  return [=] {
    for (int64_t i = 0; i < lengths.numel(); ++i) {
      const int64_t length = lengths[i].item<int64_t>();
      if (length <= 0) {
        out[i].zero_();
        continue;
      }
      const aclnn::Attended attended =
          aclnn::attend(query[i].unsqueeze(1), aclnn::gather_blocks(key, table[i], length).transpose(0, 1),
                        aclnn::gather_blocks(value, table[i], length).transpose(0, 1), param.qkScale, std::nullopt);
      out[i].copy_(attended.out.view(out[i].sizes()));
    }
  };
}

// C += A^T B in float32, which torch_npu's _npu_matmul_add_fp32 needs. Other combinations are refused.
Work plan(const atb::infer::LinearParam& param, const Operands& operands) {
  require(!param.hasBias && param.outDataType == ACL_DT_UNDEFINED && param.enAccum, "hasBias=", param.hasBias,
          ", outDataType=", param.outDataType, ", enAccum=", param.enAccum,
          " are not emulated together; there is enAccum alone");
  aclnn::require_dtype(operands.out[0], "C", {at::kFloat});
  const at::Tensor left = param.transposeA ? operands.in[0].t() : operands.in[0];
  const at::Tensor right = param.transposeB ? operands.in[1].t() : operands.in[1];
  require(left.size(1) == right.size(0), "x has the shape ", operands.in[0].sizes(), " and weight ",
          operands.in[1].sizes());
  aclnn::require_shape(operands.out[0], "C", {left.size(0), right.size(1)});
  return [=] { operands.out[0].add_(at::matmul(left.to(at::kFloat), right.to(at::kFloat))); };
}

struct NotEmulated {};

Work plan(const NotEmulated&, const Operands&) { refuse(aclnn::Code::kUnusable, "this operation is not emulated"); }

template <class Param>
class EmulatedOperation : public atb::Operation {
 public:
  EmulatedOperation(const char* name, const Param& param) : name_(name), param_(param) {}

  std::string GetName() const override { return refusal_.empty() ? name_ : name_ + ": " + refusal_ + ":"; }
  atb::Status InferShape(const atb::SVector<atb::TensorDesc>&, atb::SVector<atb::TensorDesc>&) const override {
    return atb::ERROR_INTERNAL_ERROR;  // torch_npu infers shapes itself
  }
  uint32_t GetInputNum() const override { return 0; }
  uint32_t GetOutputNum() const override { return 0; }

  atb::Status Setup(const atb::VariantPack& tensors, uint64_t& workspace_size, atb::Context*) override {
    workspace_size = 0;
    try {
      const aclnn::CpuKernelsOnly kernels;
      refusal_.clear();
      plan(param_, as_torch(tensors));
      return atb::NO_ERROR;
    } catch (const std::exception& error) {
      refusal_ = error.what();
      fail(atb::ERROR_INVALID_PARAM, "%s: %s", name_.c_str(), error.what());
      return atb::ERROR_INVALID_PARAM;
    }
  }

  atb::Status Execute(const atb::VariantPack& tensors, uint8_t*, uint64_t, atb::Context* context) override {
    trace(name_.c_str());
    const Work work = [&] {
      const aclnn::CpuKernelsOnly kernels;
      return plan(param_, as_torch(tensors));
    }();
    const std::string name = name_;
    const int code = enqueue(context->GetExecuteStream(), name_.c_str(), [work, name] {
      try {
        const aclnn::CpuKernelsOnly kernels;
        work();
        return atb::NO_ERROR;
      } catch (const std::exception& error) {
        return static_cast<atb::ErrorType>(fail(atb::ERROR_INTERNAL_ERROR, "%s: %s", name.c_str(), error.what()));
      }
    });
    if (code != atb::NO_ERROR) throw std::runtime_error(last_error_text());
    return atb::NO_ERROR;
  }

 private:
  std::string name_;
  Param param_;
  std::string refusal_;
};

class StreamContext : public atb::Context {
 public:
  atb::Status SetExecuteStream(aclrtStream stream) override {
    stream_ = stream;
    return atb::NO_ERROR;
  }
  aclrtStream GetExecuteStream() const override { return stream_; }
  atb::Status SetAsyncTilingCopyStatus(bool enable) override {
    async_tiling_ = enable;
    return atb::NO_ERROR;
  }
  bool GetAsyncTilingCopyStatus() const override { return async_tiling_; }

 private:
  aclrtStream stream_ = nullptr;
  bool async_tiling_ = false;
};

template <class Param>
atb::Status create(const char* name, const Param& param, atb::Operation** operation) {
  *operation = new EmulatedOperation<Param>(name, param);
  return atb::NO_ERROR;
}

}  // namespace

namespace atb {

Status CreateContext(Context** context) {
  *context = new StreamContext;
  return NO_ERROR;
}

Status DestroyContext(Context* context) {
  delete context;
  return NO_ERROR;
}

Status DestroyOperation(Operation* operation) {
  delete operation;
  return NO_ERROR;
}

uint64_t Utils::GetTensorSize(const Tensor& tensor) {
  uint64_t bytes = c10::elementSize(vllm_npu::emulator::aclnn::scalar_type(tensor.desc.dtype));
  for (uint64_t i = 0; i < tensor.desc.shape.dimNum; ++i) bytes *= static_cast<uint64_t>(tensor.desc.shape.dims[i]);
  return bytes;
}

#define EMULATED_OPERATION(Name)                                                           \
  template <>                                                                              \
  ATB_API Status CreateOperation(const infer::Name##Param& param, Operation** operation) { \
    return create("ATB " #Name, param, operation);                                         \
  }
#define REFUSED_OPERATION(Name)                                                      \
  template <>                                                                        \
  ATB_API Status CreateOperation(const infer::Name##Param&, Operation** operation) { \
    return create("ATB " #Name, NotEmulated{}, operation);                           \
  }

EMULATED_OPERATION(Linear)
EMULATED_OPERATION(PagedAttention)
EMULATED_OPERATION(ReshapeAndCache)
EMULATED_OPERATION(Rope)
REFUSED_OPERATION(Elewise)
REFUSED_OPERATION(GroupTopk)
REFUSED_OPERATION(RmsNorm)
REFUSED_OPERATION(SelfAttention)

}  // namespace atb
