// _npu_distribute_barrier: work of a stream that waits for all ranks of a group.
//
// Contract: CANN's document of aclnnDistributeBarrierV2.
#include "hccl/communicator.h"
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

// `x` only sets the order of this op among others. It is neither read nor written.
Plan distribute_barrier_v2(at::Tensor /*x*/, OptionalTensor time_out, OptionalTensor elastic_info,
                           std::string group_name, int64_t world_size) {
  require(current_soc().family == Family::kA3, current_soc().name,
          " has no _npu_distribute_barrier; Ascend910_93 has it");
  require_absent(time_out, "time_out", "it is not emulated; set HCCL_EXEC_TIMEOUT");
  require_absent(elastic_info, "elastic_info", "it is not emulated");
  const std::shared_ptr<Communicator> group = find_communicator_by_name(group_name);
  require(group != nullptr, "group ", group_name, " names no HCCL communicator of this process");
  require(world_size == group->size(), "world_size=", world_size, " is not that of group ", group_name, ", which is ",
          group->size());
  return [group] {
    if (group->exchange({"DistributeBarrier", "", {}, {}}, {}, [](const Chunk&) {}) != HCCL_SUCCESS) {
      refuse(Code::kRuntime, last_error_text());
    }
  };
}

Plan distribute_barrier(at::Tensor x, std::string group_name, int64_t world_size) {
  return distribute_barrier_v2(x, std::nullopt, std::nullopt, group_name, world_size);
}

}  // namespace

ACLNN_OP(aclnnDistributeBarrier, distribute_barrier);
ACLNN_OP(aclnnDistributeBarrierV2, distribute_barrier_v2);

}  // namespace vllm_npu::emulator::aclnn
