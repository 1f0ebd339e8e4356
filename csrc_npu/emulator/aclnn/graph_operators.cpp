// Operators that op-plugin runs as graph operators, because they have no aclnn function.
//
// Contract: the documents of CANN's operator library (FastGelu, Swish, ArgMaxWithValue, ArgMinWithValue).
#include <ATen/ATen.h>

#include "cpu_kernels_only.h"
#include "handles.h"
#include "runtime/graph_operator.h"

namespace vllm_npu::emulator::aclnn {
namespace {

at::Tensor tensor_of(const GraphTensor& tensor) {
  return at::from_blob(tensor.data, tensor.sizes, at::TensorOptions().dtype(scalar_type(tensor.type)));
}

double attribute(const GraphCall& call, const char* name, double usual) {
  const auto found = call.attributes.find(name);
  return found == call.attributes.end() ? usual : found->second;
}

// x * sigmoid(factor * x), which is rounded once.
void swish(const GraphCall& call, double factor) {
  const CpuKernelsOnly kernels;
  const auto x = tensor_of(call.inputs.at(0));
  const auto wide = x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  tensor_of(call.outputs.at(0)).copy_(wide * at::sigmoid(wide * factor));
}

void run_fast_gelu(const GraphCall& call) { swish(call, 1.702); }
void run_swish(const GraphCall& call) { swish(call, attribute(call, "scale", 1.0)); }

void extreme_with_index(const GraphCall& call, bool largest) {
  const CpuKernelsOnly kernels;
  const auto x = tensor_of(call.inputs.at(0));
  const auto dimension = static_cast<int64_t>(attribute(call, "dimension", 0));
  const auto [values, indices] = largest ? x.max(dimension) : x.min(dimension);
  const auto index_out = tensor_of(call.outputs.at(0));
  const auto value_out = tensor_of(call.outputs.at(1));
  index_out.copy_(indices.view(index_out.sizes()));
  value_out.copy_(values.view(value_out.sizes()));
}

void run_arg_max(const GraphCall& call) { extreme_with_index(call, true); }
void run_arg_min(const GraphCall& call) { extreme_with_index(call, false); }

const bool added = [] {
  add_graph_operator("FastGelu", run_fast_gelu);
  add_graph_operator("Swish", run_swish);
  add_graph_operator("ArgMaxWithValue", run_arg_max);
  add_graph_operator("ArgMinWithValue", run_arg_min);
  return true;
}();

}  // namespace
}  // namespace vllm_npu::emulator::aclnn
