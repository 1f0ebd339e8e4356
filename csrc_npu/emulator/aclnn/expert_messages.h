// What vllm-ascend's fused operators send: a row for each pair of a token and an expert, to the rank of the expert.
#pragma once

#include <vector>

#include "exchange.h"
#include "numerics.h"

namespace vllm_npu::emulator::aclnn {

// The tensors of a message to the experts of a rank. kSlot is the place of the expert on its rank.
enum SentField { kSlot, kPair, kValues, kScales };

// A message for each rank. ids: [tokens * top_k] int64; a pair whose id is no expert of any rank is not sent.
std::vector<Message> messages_to_experts(const at::Tensor& ids, const Quantized& rows, int64_t top_k,
                                         int64_t experts_per_rank, int64_t world_size);

// One field of all messages, in their order.
at::Tensor joined(const std::vector<Message>& received, size_t field);

// silu(gate) * up of [n, 2 * width] float32, whose first half is gate.
at::Tensor swiglu_of(const at::Tensor& products);

}  // namespace vllm_npu::emulator::aclnn
