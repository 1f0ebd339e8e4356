// HCCL's messages between two ranks. They wait for their peer on the stream's thread. The calling thread goes on, as on
// a real device, and may make the call for which the peer waits.
#include <string>

#include "communicator.h"
#include "data_types.h"
#include "group.h"

using namespace vllm_npu::emulator;

namespace {

HcclResult enqueue_transfers(const char* function, const HcclSendRecvItem* items, std::uint32_t count, HcclComm handle,
                             aclrtStream stream) {
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  if (communicator->failure() != HCCL_SUCCESS) return HcclResult(communicator->report_failed_before(function));
  std::vector<Transfer> transfers;
  for (std::uint32_t i = 0; i < count; ++i) {
    const HcclSendRecvItem& item = items[i];
    const std::size_t element = size_of(item.dataType);
    if (element == 0 || item.remoteRank >= static_cast<std::uint32_t>(communicator->size())) {
      return HcclResult(fail(HCCL_E_PARA, "%s: rank %u of %d, data type %d: there is no such rank or type", function,
                             item.remoteRank, communicator->size(), item.dataType));
    }
    const bool sends = item.sendRecvType == HCCL_SEND;
    const std::string facts = "count=" + std::to_string(item.count) + " dtype=" + name_of(item.dataType);
    trace(function, "group=%s %s rank %u %s", communicator->name().c_str(), sends ? "to" : "from", item.remoteRank,
          facts.c_str());
    transfers.push_back(
        {sends, static_cast<char*>(item.buf), item.count * element, static_cast<int>(item.remoteRank), facts});
  }
  if (group_is_open()) return HcclResult(enqueue_messages_of_group(function, stream, communicator, transfers));
  return HcclResult(enqueue_in_background(
      stream, function, [communicator, function, transfers] { return communicator->transfer(function, transfers); }));
}

}  // namespace

HcclResult HcclSend(void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm communicator,
                    aclrtStream stream) {
  const HcclSendRecvItem item{HCCL_SEND, buffer, count, type, peer};
  return enqueue_transfers(__func__, &item, 1, communicator, stream);
}

HcclResult HcclRecv(void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm communicator,
                    aclrtStream stream) {
  const HcclSendRecvItem item{HCCL_RECV, buffer, count, type, peer};
  return enqueue_transfers(__func__, &item, 1, communicator, stream);
}

// Messages between the same two ranks travel in the order of the items. CANN's document of the call allows one such
// message in a batch, and HCCL once refused a second one ("Send Tasks are duplicated"). Its present source sorts the
// items by rank and keeps their order. Source: cann-hccl, CollBatchSendRecvExecutor::GetPairWiseList in
// coll_batch_send_recv_executor.cc.
HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm communicator, aclrtStream stream) {
  if (const int code = refuse_in_group(__func__)) return HcclResult(code);
  return enqueue_transfers(__func__, items, count, communicator, stream);
}
