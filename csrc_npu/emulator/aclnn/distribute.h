// What dispatch and combine share: who owns which expert, what ranks must agree on, and what a dispatch leaves for its
// combine.
//
// Contract: op-plugin's documents of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2, and the A3
// kernels in CANN's ops-transformer.
#pragma once

#include <string>

#include "op.h"

namespace vllm_npu::emulator::aclnn {

// Who takes part, as every version of both ops lists it.
struct Members {
  std::string group_ep;  // the communicator's name
  int64_t world_size;
  int64_t rank;
  int64_t moe_experts;
  std::string group_tp;
  int64_t tp_world_size;
  int64_t tp_rank;
  int64_t expert_shard_type;
  int64_t shared_experts;
  int64_t shared_ranks;

  using Fields =
      std::tuple<std::string, int64_t, int64_t, int64_t, std::string, int64_t, int64_t, int64_t, int64_t, int64_t>;
};

// A rank's place among the experts. The first shared_ranks ranks hold copies of the shared experts, the others
// moe_experts / (world_size - shared_ranks) experts each, in order.
struct Placement {
  std::string group;  // the communicator's name
  int64_t world_size;
  int64_t rank;
  int64_t moe_experts;
  int64_t shared_experts;  // 0 where no rank is set aside for them
  int64_t shared_ranks;
  int64_t global_bs;  // tokens of all ranks, each counted with the most tokens that any rank has
  std::string comm_alg;

  bool is_hierarchical() const { return comm_alg == "hierarchy"; }
  bool is_shared_rank() const { return rank < shared_ranks; }
  int64_t experts_per_rank() const { return moe_experts / (world_size - shared_ranks); }
  int64_t num_local_experts() const { return is_shared_rank() ? 1 : experts_per_rank(); }
  int64_t max_tokens() const { return global_bs / world_size; }
  // The rank whose copy of shared expert `shared` serves this rank's tokens.
  int64_t shared_rank(int64_t shared) const {
    const int64_t copies = shared_ranks / shared_experts;
    return shared * copies + rank % copies;
  }
};

// Ids from moe_experts on stand for experts that need no rank: zero gives 0, copy gives x, constant a * x + b * v.
struct SpecialExperts {
  int64_t zero;
  int64_t copy;
  int64_t constant;

  using Fields = std::tuple<int64_t, int64_t, int64_t>;
  int64_t total() const { return zero + copy + constant; }
};

// Builds the placement. Refuses sizes that do not fit together, and what later versions of the ops have and the
// emulator does not.
Placement make_placement(const Members& members, int64_t global_bs, const std::string& comm_alg = "",
                         const OptionalTensor& elastic_info = {}, const OptionalTensor& performance_info = {});

// What all ranks must say alike, of what both ops have.
std::string agreed_facts(const std::string& version, const Placement& place, const SpecialExperts& special,
                         int64_t top_k, int64_t width, at::ScalarType dtype);

// Which pairs of a token and an expert take part: all, those of a prefix of the tokens, or any. [B, K] bool.
at::Tensor active_pairs(const at::Tensor& expert_ids, const OptionalTensor& mask);

void check_mask(const at::Tensor& expert_ids, const OptionalTensor& mask);

// Refuses ids that are negative or too large, and ids that are twice in a row.
void check_ids(const at::Tensor& expert_ids, const at::Tensor& active, int64_t num_ids);

// --- pairing.cpp: between a dispatch and its combine ---

struct PendingDispatch {
  std::string version;       // combine's must be the same
  at::Tensor expert_ids;     // [B, K]
  at::Tensor active;         // [B, K] bool
  at::Tensor sources;        // [rows, 3] int64: (source rank, token, k) of each row of expand_x
  at::Tensor recv_counts;    // what ep_recv_counts begins with
  at::Tensor combine_index;  // version 1: expand_idx; else assist_info_for_combine's first 3 * rows cells
};

void remember_dispatch(const std::string& group, PendingDispatch dispatch);

// Takes the group's last dispatch. Refuses if there is none, or if combine's arguments are not that dispatch's.
PendingDispatch take_dispatch(const std::string& group, const std::string& version, const at::Tensor& expert_ids,
                              const at::Tensor& active, const at::Tensor& combine_index, const at::Tensor& send_counts);

}  // namespace vllm_npu::emulator::aclnn
