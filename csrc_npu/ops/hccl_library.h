// HCCL's functions, looked up in the library that torch_npu has loaded, and what to do about their result codes.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>
#include <vector>

#include "hccl/hccl.h"

namespace vllm_npu {

// Null where this version of HCCL lacks the function; only those with V may be.
struct HcclLibrary {
  decltype(&::HcclAllGather) all_gather;
  decltype(&::HcclAllGatherV) all_gather_v;
  decltype(&::HcclReduceScatter) reduce_scatter;
  decltype(&::HcclReduceScatterV) reduce_scatter_v;
  decltype(&::HcclAlltoAll) all_to_all;
  decltype(&::HcclAlltoAllV) all_to_all_v;
};

// Raises c10::Error where libhccl.so is not loaded, or lacks what every version has.
const HcclLibrary& hccl();

// What to do about result codes, and about all others. vllm_npu/transport/hccl_direct/library.py has the table.
void set_remedies(c10::IntArrayRef codes, const std::vector<std::string>& texts, std::string other);

// Raises c10::Error unless `result` is HCCL_SUCCESS: the function, the code, HCCL's own text, and what to do.
void check(HcclResult result, const char* function);

}  // namespace vllm_npu
