// The pending dispatch of each group, for the group's next combine.
#include <map>
#include <mutex>

#include "distribute.h"

namespace vllm_npu::emulator::aclnn {
namespace {

std::mutex mutex;

// One for each group. Dispatch and combine alternate, and a device keeps only the last dispatch.
std::map<std::string, PendingDispatch>& pending() {
  static auto& dispatches = *new std::map<std::string, PendingDispatch>;  // never destroyed: streams' threads use it
  return dispatches;
}

std::string groups_with_a_dispatch() {
  std::string names;
  for (const auto& [group, dispatch] : pending()) names += (names.empty() ? "" : ", ") + group;
  return names.empty() ? "no group has one" : "a dispatch waits on " + names;
}

// Whether `given` begins with `expected`.
bool begins_with(const at::Tensor& given, const at::Tensor& expected) {
  const int64_t length = expected.numel();
  return given.numel() >= length &&
         at::equal(given.flatten().narrow(0, 0, length).to(expected.scalar_type()), expected);
}

}  // namespace

void remember_dispatch(const std::string& group, PendingDispatch dispatch) {
  std::lock_guard<std::mutex> lock(mutex);
  pending()[group] = std::move(dispatch);
}

PendingDispatch take_dispatch(const std::string& group, const std::string& version, const at::Tensor& expert_ids,
                              const at::Tensor& active, const at::Tensor& combine_index,
                              const at::Tensor& send_counts) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = pending().find(group);
  require(found != pending().end(), "group_ep ", group, " has no dispatch without its combine (",
          groups_with_a_dispatch(), "); dispatch and combine alternate on one group");
  const PendingDispatch dispatch = found->second;
  pending().erase(found);
  require(dispatch.version == version, "the dispatch on group_ep ", group, " was of version ", dispatch.version,
          " and this combine is of version ", version);
  const char* advice = "; give combine what the last dispatch on the group took and returned";
  require(at::equal(dispatch.expert_ids, expert_ids), "expert_ids differ from those of the dispatch", advice);
  require(at::equal(dispatch.active, active), "x_active_mask differs from that of the dispatch", advice);
  require(begins_with(send_counts, dispatch.recv_counts), "ep_send_counts differ from the dispatch's ep_recv_counts",
          advice);
  require(begins_with(combine_index, dispatch.combine_index),
          version == "1" ? "expand_idx differs" : "assist_info_for_combine differs", " from what the dispatch returned",
          advice);
  return dispatch;
}

}  // namespace vllm_npu::emulator::aclnn
