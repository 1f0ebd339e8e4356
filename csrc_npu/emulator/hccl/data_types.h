// HCCL's data types: sizes, names, reductions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "communicator.h"
#include "hccl/hccl_types.h"

namespace vllm_npu::emulator {

// Bytes of one element. 0 for a type that does not exist.
std::size_t size_of(HcclDataType type);
const char* name_of(HcclDataType type);
const char* name_of(HcclReduceOp reduction);

bool can_reduce(HcclDataType type, HcclReduceOp reduction);

// Sets destination[i] to the reduction of element first + i of all parts, in the order of the ranks, for i < count.
// 16-bit floats are computed in fp32 and rounded once.
void reduce(void* destination, const Chunk& chunk, std::uint64_t first, std::uint64_t count, HcclDataType type,
            HcclReduceOp reduction);

}  // namespace vllm_npu::emulator
