// HcclGroupStart and HcclGroupEnd. The calls between them run on their streams when the outermost group of the thread
// ends: all messages of a communicator and a stream at the same time, collectives in their order.
//
// Contract: HCCL's document of HcclGroupStart. A group has calls of one kind: messages, or collectives, or those that
// make and destroy communicators. The last kind is not emulated: it is for one process with several devices, and
// HcclCommInitAll serves that.
#include "group.h"

#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

namespace vllm_npu::emulator {
namespace {

// Closed until the group ends.
class Gate {
 public:
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_open_ = true;
    changed_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return is_open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_open_ = false;
};

// The messages of one communicator and stream. The calling thread adds them before the gate opens, and the stream reads
// them after that.
struct Batch {
  std::shared_ptr<Communicator> communicator;
  aclrtStream stream;
  std::vector<Transfer> messages;
};

struct Group {
  int depth = 0;
  bool has_collectives = false;
  std::shared_ptr<Gate> gate;
  std::vector<std::shared_ptr<Batch>> batches;
};

thread_local Group group;

int refuse_mixture(const char* function) {
  return fail(HCCL_E_NOT_SUPPORT, "%s: HCCL's group has messages or collectives, not both", function);
}

}  // namespace

bool group_is_open() { return group.depth > 0; }

int enqueue_collective_of_group(const char* function, aclrtStream stream, std::function<int()> exchange) {
  if (!group.batches.empty()) return refuse_mixture(function);
  group.has_collectives = true;
  return enqueue_in_background(stream, function, [gate = group.gate, exchange = std::move(exchange)] {
    gate->wait();
    return exchange();
  });
}

int enqueue_messages_of_group(const char* function, aclrtStream stream,
                              const std::shared_ptr<Communicator>& communicator,
                              const std::vector<Transfer>& messages) {
  if (group.has_collectives) return refuse_mixture(function);
  for (const auto& batch : group.batches) {
    if (batch->communicator != communicator || batch->stream != stream) continue;
    batch->messages.insert(batch->messages.end(), messages.begin(), messages.end());
    return HCCL_SUCCESS;
  }
  const auto batch = std::make_shared<Batch>(Batch{communicator, stream, messages});
  group.batches.push_back(batch);
  return enqueue_in_background(stream, function, [gate = group.gate, batch] {
    gate->wait();
    return batch->communicator->transfer("HcclGroupEnd", batch->messages);
  });
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
  if (group.depth++ == 0) group.gate = std::make_shared<Gate>();
  return HCCL_SUCCESS;
}

HcclResult HcclGroupEnd() {
  trace(__func__);
  if (group.depth == 0) {
    return HcclResult(fail(HCCL_E_NOT_SUPPORT, "%s: this thread has called no HcclGroupStart before", __func__));
  }
  if (--group.depth > 0) return HCCL_SUCCESS;
  group.gate->open();
  group = {};
  return HCCL_SUCCESS;
}
