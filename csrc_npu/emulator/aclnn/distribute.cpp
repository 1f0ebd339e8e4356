// Checks that dispatch and combine share.
#include "distribute.h"

#include <algorithm>

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kMaxSharedExperts = 4;

}  // namespace

Placement make_placement(const Members& members, int64_t global_bs, const std::string& comm_alg,
                         const OptionalTensor& elastic_info, const OptionalTensor& performance_info) {
  const int64_t world_size = members.world_size;
  const int64_t rank = members.rank;
  const int64_t moe_experts = members.moe_experts;
  const int64_t shared_ranks = members.shared_ranks;
  int64_t shared_experts = members.shared_experts;
  require(members.tp_world_size == 0 || members.tp_world_size == 1, "tp_world_size=", members.tp_world_size,
          " is not emulated; leave it at 0");
  require_one_of(members.expert_shard_type, "expert_shard_type", {0});
  require_absent(elastic_info, "elastic_info", "it is not emulated");
  require_absent(performance_info, "performance_info", "it is not emulated");
  const bool hierarchy = comm_alg == "hierarchy";
  const std::vector<std::string> algorithms =
      current_soc().family == Family::kA2 ? std::vector<std::string>{"", "fullmesh", "hierarchy"}
                                          : std::vector<std::string>{"", "fullmesh_v1", "fullmesh_v2", "hierarchy"};
  require(std::find(algorithms.begin(), algorithms.end(), comm_alg) != algorithms.end(), "comm_alg=", comm_alg,
          " is refused: ", current_soc().name, " takes one of ", algorithms);
  require(!hierarchy || shared_ranks == 0, "comm_alg=hierarchy takes shared_expert_rank_num=0 only, not ",
          shared_ranks);
  require(rank >= 0 && rank < world_size, "ep_rank_id=", rank, " is not in 0..", world_size - 1);
  require(shared_ranks >= 0 && shared_ranks < world_size, "shared_expert_rank_num=", shared_ranks, " is not in 0..",
          world_size - 1);
  if (shared_ranks == 0) {
    require(shared_experts == 0 || shared_experts == 1, "shared_expert_num=", shared_experts,
            " needs shared_expert_rank_num");
    shared_experts = 0;
  } else {
    require(current_soc().family != Family::kA2, "shared_expert_rank_num=", shared_ranks, ": ", current_soc().name,
            " takes 0 only");
    require(shared_experts > 0 && shared_experts <= kMaxSharedExperts, "shared_expert_num=", shared_experts,
            " is not in 1..", kMaxSharedExperts);
    require(shared_ranks % shared_experts == 0, "shared_expert_num=", shared_experts,
            " does not divide shared_expert_rank_num=", shared_ranks);
  }
  require(moe_experts > 0 && moe_experts % (world_size - shared_ranks) == 0, "moe_expert_num=", moe_experts,
          " is not a multiple of the ", world_size - shared_ranks, " ranks that hold routed experts");
  require(global_bs > 0 && global_bs % world_size == 0, "global_bs=", global_bs,
          " is not a multiple of ep_world_size=", world_size);
  return {members.group_ep, world_size, rank, moe_experts, shared_experts, shared_ranks, global_bs, comm_alg};
}

std::string agreed_facts(const std::string& version, const Placement& place, const SpecialExperts& special,
                         int64_t top_k, int64_t width, at::ScalarType dtype) {
  return c10::str("version=", version, " K=", top_k, " H=", width, " dtype=", dtype, " experts=", place.moe_experts,
                  " shared=", place.shared_experts, "/", place.shared_ranks, " special=", special.zero, "/",
                  special.copy, "/", special.constant, " global_bs=", place.global_bs,
                  place.is_hierarchical() ? " hierarchy" : "");
}

void check_special(const Placement& place, const SpecialExperts& special) {
  require(special.zero >= 0 && special.copy >= 0 && special.constant >= 0,
          "zero_expert_num, copy_expert_num and const_expert_num must not be negative");
  require(special.constant == 0 || current_soc().family != Family::kA2, "const_expert_num=", special.constant, ": ",
          current_soc().name, " takes 0 only");
  require(special.total() == 0 || !place.is_hierarchical(),
          "comm_alg=hierarchy takes no special experts, and the sum of "
          "zero_expert_num, copy_expert_num and const_expert_num is ",
          special.total());
}

void check_mask(const Placement& place, const at::Tensor& expert_ids, const OptionalTensor& mask) {
  if (!mask) return;
  require_dtype(*mask, "x_active_mask", {at::kBool});
  require(!place.is_hierarchical() || current_soc().family != Family::kA2,
          "x_active_mask is given, but comm_alg=hierarchy on ", current_soc().name,
          " takes none; pass active tokens only");
  if (mask->dim() == 2) {
    require(!place.is_hierarchical(), "x_active_mask has 2 dimensions; comm_alg=hierarchy takes 1");
    require(current_soc().family != Family::kA2, "x_active_mask has 2 dimensions; ", current_soc().name, " takes 1");
    require_shape(*mask, "x_active_mask", expert_ids.sizes());
  } else {
    require_shape(*mask, "x_active_mask", {expert_ids.size(0)});
  }
}

at::Tensor active_pairs(const at::Tensor& expert_ids, const OptionalTensor& mask) {
  if (!mask) return at::ones(expert_ids.sizes(), at::kBool);
  if (mask->dim() == 2) return mask->clone();
  require((mask->to(at::kInt).diff() <= 0).all().item<bool>(),
          "x_active_mask has a hole: active tokens must come first, since the op only counts them");
  return mask->unsqueeze(-1).expand(expert_ids.sizes()).contiguous();
}

void check_ids(const at::Tensor& expert_ids, const at::Tensor& active, int64_t num_ids) {
  const at::Tensor bad = active.logical_and((expert_ids < 0).logical_or(expert_ids >= num_ids));
  if (bad.any().item<bool>()) {
    refuse(Code::kUnusable, "expert_ids has the id ", expert_ids.masked_select(bad)[0].item<int64_t>(),
           "; ids must be in 0..", num_ids - 1);
  }
  const at::Tensor distinct = -1 - at::arange(expert_ids.size(1), expert_ids.scalar_type());
  const at::Tensor sorted = std::get<0>(at::where(active, expert_ids, distinct).sort(-1));
  require(!(sorted.diff() == 0).any().item<bool>(), "expert_ids has an id twice in the row of one token");
}

}  // namespace vllm_npu::emulator::aclnn
