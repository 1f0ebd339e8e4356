// Messages of tensors between the ranks of a communicator.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <string>
#include <vector>

namespace vllm_npu::emulator::aclnn {

using Message = std::vector<at::Tensor>;

// What all ranks must say alike; where they differ, each rank's refusal shows what each rank said.
struct ExchangeCall {
  std::string group;  // the communicator's name
  int64_t world_size;
  int64_t rank;
  std::string operation;  // such as "MoeDistributeDispatch"
  std::string agreed;     // such as "K=8 H=7168"; at most 200 bytes
};

// Sends make_messages()[i] to rank i and returns what each rank sent here, in rank order.
//
// COLLECTIVE over the group; waits for all ranks. Refuses on every rank where ranks disagree, and where make_messages
// throws a Refusal or an error of torch's on one of them; also an unknown group, and one in which this process has
// another place.
std::vector<Message> exchange(const ExchangeCall& call, const std::function<std::vector<Message>()>& make_messages);

}  // namespace vllm_npu::emulator::aclnn
