// Calls between HcclGroupStart and HcclGroupEnd, which run together at the end.
#pragma once

#include <functional>
#include <memory>

#include "communicator.h"

namespace vllm_npu::emulator {

// Whether the calling thread is between HcclGroupStart and HcclGroupEnd.
bool group_is_open();

// Enqueue work that waits for the end of the calling thread's group. Later work of the stream waits too: torch_npu
// records the events of a call before the end of its group. A group has collectives or messages; the other kind is
// refused.
int enqueue_collective_of_group(const char* function, aclrtStream stream, std::function<int()> exchange);
int enqueue_messages_of_group(const char* function, aclrtStream stream,
                              const std::shared_ptr<Communicator>& communicator, const std::vector<Transfer>& messages);

// Refuses a call that a group cannot have.
int refuse_in_group(const char* function);

}  // namespace vllm_npu::emulator
