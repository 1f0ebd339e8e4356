// The part of the binary interface of ATB's libatb.so that torch_npu's libop_plugin_atb.so uses: layouts of structures,
// the order of virtual functions, and mangled names. Source: the headers with which op-plugin is compiled
// (third_party/atb/inc). Trailing members that the emulator does not read are left out. This is safe, because op-plugin
// creates the objects and passes them by reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "acl/acl.h"

#define ATB_API __attribute__((visibility("default")))

namespace atb {

using Status = int32_t;

enum ErrorType : int { NO_ERROR = 0, ERROR_INVALID_PARAM = 1, ERROR_INTERNAL_ERROR = 3 };

// A vector with room for 64 elements inside the object. More elements would be on the heap.
template <class T>
class SVector {
 public:
  std::size_t size() const { return size_; }
  const T& operator[](std::size_t i) const { return heap_ != nullptr ? heap_[i] : inside_[i]; }

 private:
  std::size_t capacity_;
  std::size_t size_;
  T inside_[65];
  T* heap_;
};

struct Dims {
  int64_t dims[8];
  uint64_t dimNum;
};

struct TensorDesc {
  aclDataType dtype;
  aclFormat format;
  Dims shape;
};

struct Tensor {
  TensorDesc desc;
  void* deviceData;
  void* hostData;
  uint64_t dataSize;
};

struct VariantPack {
  SVector<Tensor> inTensors;
  SVector<Tensor> outTensors;
};

class ATB_API Context {
 public:
  virtual ~Context() = default;
  virtual Status SetExecuteStream(aclrtStream stream) = 0;
  virtual aclrtStream GetExecuteStream() const = 0;
  virtual Status SetAsyncTilingCopyStatus(bool enable) = 0;
  virtual bool GetAsyncTilingCopyStatus() const = 0;
};

class ATB_API Operation {
 public:
  virtual ~Operation() = default;
  virtual std::string GetName() const = 0;
  virtual Status InferShape(const SVector<TensorDesc>& inputs, SVector<TensorDesc>& outputs) const = 0;
  virtual uint32_t GetInputNum() const = 0;
  virtual uint32_t GetOutputNum() const = 0;
  virtual Status Setup(const VariantPack& tensors, uint64_t& workspaceSize, Context* context) = 0;
  virtual Status Execute(const VariantPack& tensors, uint8_t* workspace, uint64_t workspaceSize, Context* context) = 0;
};

ATB_API Status CreateContext(Context** context);
ATB_API Status DestroyContext(Context* context);
template <typename Param>
ATB_API Status CreateOperation(const Param& param, Operation** operation);
ATB_API Status DestroyOperation(Operation* operation);

class ATB_API Utils {
 public:
  static uint64_t GetTensorSize(const Tensor& tensor);  // bytes
};

namespace infer {

struct ATB_API LinearParam {
  bool transposeA;
  bool transposeB;
  bool hasBias;
  aclDataType outDataType;
  bool enAccum;
};

struct ATB_API RopeParam {
  int32_t rotaryCoeff;  // 2 rotates halves; the head's size rotates neighbours
  int32_t cosFormat;
};

struct ATB_API ReshapeAndCacheParam {
  int32_t compressType;
  int32_t kvCacheCfg;
};

struct ATB_API PagedAttentionParam {
  int32_t headNum;
  float qkScale;
  int32_t kvHeadNum;
  int32_t maskType;
  bool batchRunStatusEnable;
  int32_t quantType;
  aclDataType outDataType;
  bool hasQuantOffset;
  int32_t compressType;
  int32_t calcType;
  int32_t scaleType;
  int32_t inputLayout;
  uint32_t mlaVHeadSize;
};

// The parameters of operations that are refused. The emulator does not read them.
struct ATB_API ElewiseParam;
struct ATB_API GroupTopkParam;
struct ATB_API RmsNormParam;
struct ATB_API SelfAttentionParam;

}  // namespace infer
}  // namespace atb
