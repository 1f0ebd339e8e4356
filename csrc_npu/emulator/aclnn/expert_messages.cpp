#include "expert_messages.h"

#include <ATen/ATen.h>

namespace vllm_npu::emulator::aclnn {

std::vector<Message> messages_to_experts(const at::Tensor& ids, const Quantized& rows, int64_t top_k,
                                         int64_t experts_per_rank, int64_t world_size) {
  std::vector<Message> messages;
  for (int64_t receiver = 0; receiver < world_size; ++receiver) {
    const int64_t first = receiver * experts_per_rank;
    const at::Tensor pairs = (ids >= first).logical_and(ids < first + experts_per_rank).nonzero().squeeze(-1);
    const at::Tensor tokens = pairs.floor_divide(top_k);
    messages.push_back({ids.index_select(0, pairs) - first, pairs, rows.values.index_select(0, tokens),
                        rows.scales.index_select(0, tokens)});
  }
  return messages;
}

at::Tensor joined(const std::vector<Message>& received, size_t field) {
  std::vector<at::Tensor> parts;
  for (const Message& message : received) parts.push_back(message[field]);
  return at::cat(parts);
}

at::Tensor swiglu_of(const at::Tensor& products) {
  const std::vector<at::Tensor> halves = products.chunk(2, -1);
  return halves[0] / ((-halves[0]).exp() + 1) * halves[1];
}

}  // namespace vllm_npu::emulator::aclnn
