// The graph-operator path (aclop), which torch_npu takes for operators without an aclnn kernel. torch_npu's
// descriptions of operators are stored. Execution fails with the operator's name.
#include <string>
#include <vector>

#include "acl/acl_op.h"
#include "acl/acl_op_compiler.h"
#include "runtime.h"

using namespace vllm_npu::emulator;

struct aclDataBuffer {
  void* data;
  size_t bytes;
};

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> shape;
  std::string name;
  aclMemType placement = ACL_MEMTYPE_DEVICE;
};

struct aclopAttr {};

namespace {

int refuse_operator(const char* function, const char* operator_name) {
  return fail(ACL_ERROR_GE_FAILURE,
              "%s: operator %s has no aclnn kernel in the emulator, and graph operators are not emulated", function,
              operator_name);
}

}  // namespace

aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) { return new aclDataBuffer{data, bytes}; }

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int dimensions, const int64_t* shape, aclFormat format) {
  return new aclTensorDesc{type, format, std::vector<int64_t>(shape, shape + dimensions), ""};
}

void aclDestroyTensorDesc(const aclTensorDesc* description) { delete description; }
aclDataType aclGetTensorDescType(const aclTensorDesc* description) { return description->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc* description) { return description->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* description) { return description->shape.size(); }

aclError aclGetTensorDescDimV2(const aclTensorDesc* description, size_t index, int64_t* size) {
  if (index >= description->shape.size()) {
    return fail(ACL_ERROR_INVALID_PARAM, "%s: dimension %zu of %zu", __func__, index, description->shape.size());
  }
  *size = description->shape[index];
  return ACL_SUCCESS;
}

void aclSetTensorDescName(aclTensorDesc* description, const char* name) {
  description->name = name == nullptr ? "" : name;
}

aclError aclSetTensorFormat(aclTensorDesc* description, aclFormat format) {
  description->format = format;
  return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc* description, int dimensions, const int64_t* shape) {
  description->shape.assign(shape, shape + dimensions);
  return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc* description, aclMemType placement) {
  description->placement = placement;
  return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attributes) { delete attributes; }

// Attributes are not kept. Only the execution would need them, and it always fails.
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) {
  return ACL_SUCCESS;
}

aclError aclopCompileAndExecute(const char* name, int, const aclTensorDesc* const[], const aclDataBuffer* const[], int,
                                const aclTensorDesc* const[], aclDataBuffer* const[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  return refuse_operator(__func__, name);
}

aclError aclopCompileAndExecuteV2(const char* name, int, aclTensorDesc*[], aclDataBuffer*[], int, aclTensorDesc*[],
                                  aclDataBuffer*[], aclopAttr*, aclopEngineType, aclopCompileType, const char*,
                                  aclrtStream) {
  return refuse_operator(__func__, name);
}

// Options of the operator compiler are accepted without effect, because there is no operator compiler.
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }

size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t bytes) {
  if (bytes > 0) value[0] = '\0';
  return ACL_SUCCESS;
}
