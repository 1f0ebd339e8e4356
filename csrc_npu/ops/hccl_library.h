// HCCL's functions, looked up in the library that torch_npu has loaded, and the check of their result codes.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>
#include <vector>

#include "hccl/hccl.h"

namespace vllm_npu {

// A pointer is null if this version of HCCL lacks the function. Only HcclAllGatherV and HcclReduceScatterV may be
// missing.
struct HcclLibrary {
  decltype(&::HcclAllGather) all_gather;
  decltype(&::HcclAllGatherV) all_gather_v;
  decltype(&::HcclReduceScatter) reduce_scatter;
  decltype(&::HcclReduceScatterV) reduce_scatter_v;
  decltype(&::HcclAlltoAll) all_to_all;
  decltype(&::HcclAlltoAllV) all_to_all_v;
};

// Raises c10::Error if libhccl.so is not loaded, or lacks a function that every version has.
const HcclLibrary& hccl();

// Sets the texts that say what to do about the result codes, and about all other codes.
// vllm_npu/transport/hccl_direct/library.py has the table.
void set_remedies(c10::IntArrayRef codes, const std::vector<std::string>& texts, std::string other);

// Raises c10::Error unless `result` is HCCL_SUCCESS. The text has the function, the code, what to do, and HCCL's own
// text.
void check(HcclResult result, const char* function);

}  // namespace vllm_npu
