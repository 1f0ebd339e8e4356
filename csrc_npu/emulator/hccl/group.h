// Calls between HcclGroupStart and HcclGroupEnd, which run together at the end.
#pragma once

#include <functional>

#include "communicator.h"

namespace vllm_npu::emulator {

// Whether the calling thread is between HcclGroupStart and HcclGroupEnd.
bool group_is_open();

// Keeps a collective until the group of the calling thread ends. Refuses it in a group that has messages.
int keep_collective(const char* function, std::function<int()> run);

// Keeps a message until the group of the calling thread ends. Refuses it in a group that has collectives.
int keep_message(const char* function, const HcclSendRecvItem& item, HcclComm communicator, aclrtStream stream);

// Refuses a call that a group cannot have.
int refuse_in_group(const char* function);

}  // namespace vllm_npu::emulator
