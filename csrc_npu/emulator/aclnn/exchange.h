// Messages of tensors between the ranks of a communicator.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <string>
#include <vector>

namespace vllm_npu::emulator::aclnn {

using Message = std::vector<at::Tensor>;

// The arguments that must be equal on all ranks. If they differ, every rank refuses and its text shows those of each
// rank.
struct ExchangeCall {
  std::string group;  // the communicator's name
  int64_t world_size;
  int64_t rank;
  std::string operation;  // such as "MoeDistributeDispatch"
  std::string agreed;     // such as "K=8 H=7168"; at most 200 bytes
};

// Sends make_messages()[i] to rank i. Returns the messages to this rank, in the order of the sending ranks.
//
// COLLECTIVE over the group, waits for all ranks. Refuses on every rank if the ranks' arguments differ, or if
// make_messages throws a Refusal or an error of torch on one rank. Also refuses an unknown group, and a group in which
// this process has another rank or size.
std::vector<Message> exchange(const ExchangeCall& call, const std::function<std::vector<Message>()>& make_messages);

}  // namespace vllm_npu::emulator::aclnn
