// Operators of the graph-operator path (aclop.cpp) that other libraries compute.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime.h"

namespace vllm_npu::emulator {

struct GraphTensor {
  void* data;
  aclDataType type;
  std::vector<std::int64_t> sizes;
};

struct GraphCall {
  std::vector<GraphTensor> inputs;
  std::vector<GraphTensor> outputs;
  std::map<std::string, double> attributes;  // numbers and truth values; others are not kept
};

// Computes the outputs, on the stream. May throw a std::exception.
using GraphOperator = void (*)(const GraphCall&);

EMULATOR_API void add_graph_operator(const char* name, GraphOperator compute);

}  // namespace vllm_npu::emulator
