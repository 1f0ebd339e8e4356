// HcclGroupStart and HcclGroupEnd. The calls between them run when the outermost group of the thread ends: all messages
// of a communicator and a stream at the same time, collectives in their order.
//
// Contract: HCCL's document of HcclGroupStart. A group has calls of one kind: messages, or collectives, or those that
// make and destroy communicators. The last kind is not emulated: it is for one process with several devices, and
// HcclCommInitAll serves that.
#include "group.h"

#include <utility>
#include <vector>

namespace vllm_npu::emulator {
namespace {

struct Messages {
  HcclComm communicator;
  aclrtStream stream;
  std::vector<HcclSendRecvItem> items;
};

struct Group {
  int depth = 0;
  std::vector<std::function<int()>> collectives;
  std::vector<Messages> messages;
};

thread_local Group group;

int refuse_mixture(const char* function) {
  return fail(HCCL_E_NOT_SUPPORT, "%s: HCCL's group has messages or collectives, not both", function);
}

}  // namespace

bool group_is_open() { return group.depth > 0; }

int keep_collective(const char* function, std::function<int()> run) {
  if (!group.messages.empty()) return refuse_mixture(function);
  group.collectives.push_back(std::move(run));
  return HCCL_SUCCESS;
}

int keep_message(const char* function, const HcclSendRecvItem& item, HcclComm communicator, aclrtStream stream) {
  if (!group.collectives.empty()) return refuse_mixture(function);
  for (Messages& together : group.messages) {
    if (together.communicator != communicator || together.stream != stream) continue;
    together.items.push_back(item);
    return HCCL_SUCCESS;
  }
  group.messages.push_back({communicator, stream, {item}});
  return HCCL_SUCCESS;
}

int refuse_in_group(const char* function) {
  if (!group_is_open()) return HCCL_SUCCESS;
  return fail(HCCL_E_NOT_SUPPORT,
              "%s: not emulated between HcclGroupStart and HcclGroupEnd; call it outside of the group", function);
}

}  // namespace vllm_npu::emulator

using namespace vllm_npu::emulator;

HcclResult HcclGroupStart() {
  trace(__func__);
  ++group.depth;
  return HCCL_SUCCESS;
}

HcclResult HcclGroupEnd() {
  trace(__func__);
  if (group.depth == 0) {
    return HcclResult(fail(HCCL_E_NOT_SUPPORT, "%s: this thread has called no HcclGroupStart before", __func__));
  }
  if (--group.depth > 0) return HCCL_SUCCESS;
  Group ended = std::exchange(group, {});
  for (Messages& together : ended.messages) {
    const auto count = static_cast<uint32_t>(together.items.size());
    const HcclResult code = HcclBatchSendRecv(together.items.data(), count, together.communicator, together.stream);
    if (code != HCCL_SUCCESS) return code;
  }
  for (const auto& run : ended.collectives) {
    if (const int code = run()) return HcclResult(code);
  }
  return HCCL_SUCCESS;
}
