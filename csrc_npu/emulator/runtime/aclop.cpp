// The graph-operator path (aclop), which torch_npu takes for operators without an aclnn kernel. torch_npu's
// descriptions of operators are stored. Identity, which casts between formats, is emulated here, and a few operators in
// other libraries (graph_operator.h). The execution of any other operator fails with its name.
#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "acl/acl_op.h"
#include "acl/acl_op_compiler.h"
#include "graph_operator.h"
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
  std::vector<int64_t> stored_shape = {};  // of an internal format
  aclMemType placement = ACL_MEMTYPE_DEVICE;
};

struct aclopAttr {
  std::map<std::string, double> numbers;
};

namespace {

std::map<std::string, GraphOperator>& graph_operators() {
  static auto* all = new std::map<std::string, GraphOperator>;
  return *all;
}

aclError set_number(aclopAttr* attributes, const char* name, double value) {
  attributes->numbers[name] = value;
  return ACL_SUCCESS;
}

std::vector<GraphTensor> graph_tensors(int count, const aclTensorDesc* const descriptions[],
                                       const aclDataBuffer* const buffers[], Addresses& memory) {
  std::vector<GraphTensor> tensors;
  for (int i = 0; i < count; ++i) {
    tensors.push_back({buffers[i]->data, descriptions[i]->type, descriptions[i]->shape});
    if (buffers[i]->bytes > 0) memory.push_back(buffers[i]->data);
  }
  return tensors;
}

// An internal format (FRACTAL_NZ, NC1HWC0, ...) has the size that it has on a device. In emulated memory its elements
// are in the order of the plain format, at the start: no kernel here reads another order. So a cast is a copy.
int run_operator(const char* function, const char* operator_name, int num_inputs,
                 const aclTensorDesc* const input_descriptions[], const aclDataBuffer* const inputs[], int num_outputs,
                 const aclTensorDesc* const output_descriptions[], const aclDataBuffer* const outputs[],
                 const aclopAttr* attributes, aclrtStream stream) {
  if (std::strcmp(operator_name, "Identity") == 0 && num_inputs == 1 && num_outputs == 1) {
    const size_t bytes = std::min(inputs[0]->bytes, outputs[0]->bytes);
    return copy_on_stream(outputs[0]->data, inputs[0]->data, bytes, stream, operator_name);
  }
  const auto found = graph_operators().find(operator_name);
  if (found == graph_operators().end()) {
    return fail(ACL_ERROR_GE_FAILURE,
                "%s: operator %s has no aclnn kernel in the emulator, and this graph operator is not emulated", function,
                operator_name);
  }
  Addresses memory;
  GraphCall call{graph_tensors(num_inputs, input_descriptions, inputs, memory),
                 graph_tensors(num_outputs, output_descriptions, outputs, memory),
                 attributes == nullptr ? std::map<std::string, double>() : attributes->numbers};
  const char* name = found->first.c_str();
  trace(name);
  const auto work = [name, compute = found->second, call = std::move(call)] {
    try {
      compute(call);
      return int{ACL_SUCCESS};
    } catch (const std::exception& error) {
      return fail(ACL_ERROR_GE_FAILURE, "%s: %s", name, error.what());
    }
  };
  return enqueue(stream, name, work, std::move(memory));
}

}  // namespace

void vllm_npu::emulator::add_graph_operator(const char* name, GraphOperator compute) {
  graph_operators()[name] = compute;
}

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
  description->stored_shape.assign(shape, shape + dimensions);
  return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc* description, aclMemType placement) {
  description->placement = placement;
  return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attributes) { delete attributes; }

aclError aclopSetAttrBool(aclopAttr* attributes, const char* name, uint8_t value) {
  return set_number(attributes, name, value);
}
aclError aclopSetAttrInt(aclopAttr* attributes, const char* name, int64_t value) {
  return set_number(attributes, name, static_cast<double>(value));
}
aclError aclopSetAttrFloat(aclopAttr* attributes, const char* name, float value) {
  return set_number(attributes, name, value);
}

// Other attributes are not kept: no emulated operator has one.
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) {
  return ACL_SUCCESS;
}

aclError aclopCompileAndExecute(const char* name, int num_inputs, const aclTensorDesc* const input_descriptions[],
                                const aclDataBuffer* const inputs[], int num_outputs,
                                const aclTensorDesc* const output_descriptions[], aclDataBuffer* const outputs[],
                                const aclopAttr* attributes, aclopEngineType, aclopCompileType, const char*,
                                aclrtStream stream) {
  return run_operator(__func__, name, num_inputs, input_descriptions, inputs, num_outputs, output_descriptions, outputs,
                      attributes, stream);
}

aclError aclopCompileAndExecuteV2(const char* name, int num_inputs, aclTensorDesc* input_descriptions[],
                                  aclDataBuffer* inputs[], int num_outputs, aclTensorDesc* output_descriptions[],
                                  aclDataBuffer* outputs[], aclopAttr* attributes, aclopEngineType, aclopCompileType,
                                  const char*, aclrtStream stream) {
  return run_operator(__func__, name, num_inputs, input_descriptions, inputs, num_outputs, output_descriptions, outputs,
                      attributes, stream);
}

// Options of the operator compiler are accepted without effect, because there is no operator compiler.
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }

size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t bytes) {
  if (bytes > 0) value[0] = '\0';
  return ACL_SUCCESS;
}
