// Creates and destroys aclnn's handles.
#include "handles.h"

#include <c10/core/InferenceMode.h>

#include <map>
#include <set>

#include "runtime/runtime.h"

namespace vllm_npu::emulator::aclnn {

at::ScalarType scalar_type(int acl_type) {
  static const std::map<int, at::ScalarType> kTypes{
      {ACL_FLOAT, at::kFloat},
      {ACL_FLOAT16, at::kHalf},
      {ACL_BF16, at::kBFloat16},
      {ACL_DOUBLE, at::kDouble},
      {ACL_INT8, at::kChar},
      {ACL_INT16, at::kShort},
      {ACL_INT32, at::kInt},
      {ACL_INT64, at::kLong},
      {ACL_UINT8, at::kByte},
      {ACL_UINT16, at::kUInt16},
      {ACL_UINT32, at::kUInt32},
      {ACL_UINT64, at::kUInt64},
      {ACL_BOOL, at::kBool},
      {ACL_COMPLEX64, at::kComplexFloat},
      {ACL_COMPLEX128, at::kComplexDouble},
      {ACL_FLOAT8_E5M2, at::kFloat8_e5m2},
      {ACL_FLOAT8_E4M3FN, at::kFloat8_e4m3fn},
      {ACL_FLOAT8_E8M0, at::kFloat8_e8m0fnu},
  };
  const auto found = kTypes.find(acl_type);
  return found == kTypes.end() ? at::kBits8 : found->second;
}

namespace {

// Whether memory of this format has torch's layout.
bool is_plain(aclFormat format) {
  static const std::set<aclFormat> kPlain{ACL_FORMAT_UNDEFINED, ACL_FORMAT_NCHW,  ACL_FORMAT_NHWC, ACL_FORMAT_ND,
                                          ACL_FORMAT_NDHWC,     ACL_FORMAT_NCDHW, ACL_FORMAT_NCL};
  return kPlain.count(format) > 0;
}

// Returns a CPU tensor on memory that it does not own. Modes of the calling thread have no effect.
at::Tensor alias(void* memory, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
  c10::InferenceMode ordinary_tensors(false);
  return at::from_blob(memory, sizes, strides, at::TensorOptions().dtype(type));
}

}  // namespace
}  // namespace vllm_npu::emulator::aclnn

using vllm_npu::emulator::aclnn::alias;
using vllm_npu::emulator::aclnn::is_plain;
using vllm_npu::emulator::aclnn::scalar_type;

extern "C" {

EMULATOR_API aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dimensions, aclDataType acl_type,
                                        const int64_t* strides, int64_t offset, aclFormat format,
                                        const int64_t* /*storage_sizes*/, uint64_t /*storage_dimensions*/,
                                        void* memory) {
  const at::ScalarType type = scalar_type(acl_type);
  if (!is_plain(format)) {
    return new aclTensor{{}, "has the private format " + std::to_string(format) + "; only plain formats are emulated"};
  }
  char* first = static_cast<char*>(memory) + offset * static_cast<int64_t>(c10::elementSize(type));
  return new aclTensor{alias(first, {sizes, dimensions}, {strides, dimensions}, type), ""};
}

EMULATOR_API aclScalar* aclCreateScalar(void* value, aclDataType acl_type) {
  const at::ScalarType type = scalar_type(acl_type);
  if (type == at::kBits8) {
    vllm_npu::emulator::fail(161002, "aclCreateScalar: the ACL type %d is not emulated", static_cast<int>(acl_type));
    return nullptr;
  }
  return new aclScalar{alias(value, {}, {}, type).item()};
}

EMULATOR_API aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{{values, values + size}};
}

EMULATOR_API aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) {
  return new aclFloatArray{{values, values + size}};
}

EMULATOR_API aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
  return new aclBoolArray{std::vector<bool>(values, values + size)};
}

EMULATOR_API aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t size) {
  return new aclTensorList{{tensors, tensors + size}};
}

EMULATOR_API aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t size) {
  return new aclScalarList{{scalars, scalars + size}};
}

EMULATOR_API int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return 0;
}

EMULATOR_API int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return 0;
}

EMULATOR_API int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return 0;
}

EMULATOR_API int aclDestroyFloatArray(const aclFloatArray* array) {
  delete array;
  return 0;
}

EMULATOR_API int aclDestroyBoolArray(const aclBoolArray* array) {
  delete array;
  return 0;
}

EMULATOR_API int aclDestroyTensorList(const aclTensorList* list) {
  for (const aclTensor* tensor : list->tensors) delete tensor;
  delete list;
  return 0;
}

EMULATOR_API int aclDestroyScalarList(const aclScalarList* list) {
  for (const aclScalar* scalar : list->scalars) delete scalar;
  delete list;
  return 0;
}

}  // extern "C"
