// Code that dispatch and combine share: the owner of each expert, the facts on which all ranks must agree, and the
// record that a dispatch leaves for its combine.
//
// Contract: op-plugin's documents of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2, the documents of
// aclnnMoeDistributeDispatchV4 and aclnnMoeDistributeCombineV4, and in CANN's ops-transformer the A3 kernels, the checks
// of both chips (op_tiling), and A2's golden scripts.
#pragma once

#include <string>

#include "op.h"

namespace vllm_npu::emulator::aclnn {

// The ranks and experts of a call, in the order of the parameters of every version of both ops.
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

// The experts of each rank. The first shared_ranks ranks hold copies of the shared experts. Each of the other ranks
// holds moe_experts / (world_size - shared_ranks) routed experts, in order.
struct Placement {
  std::string group;  // the communicator's name
  int64_t world_size;
  int64_t rank;
  int64_t moe_experts;
  int64_t shared_experts;  // 0 if no rank is reserved for them
  int64_t shared_ranks;
  int64_t global_bs;  // world_size times the largest number of tokens of a rank
  std::string comm_alg;

  bool is_hierarchical() const { return comm_alg == "hierarchy"; }
  bool is_shared_rank() const { return rank < shared_ranks; }
  int64_t experts_per_rank() const { return moe_experts / (world_size - shared_ranks); }
  int64_t num_local_experts() const { return is_shared_rank() ? 1 : experts_per_rank(); }
  int64_t max_tokens() const { return global_bs / world_size; }
  // Returns the rank whose copy of shared expert `shared` computes this rank's tokens.
  int64_t shared_rank(int64_t shared) const {
    const int64_t copies = shared_ranks / shared_experts;
    return shared * copies + rank % copies;
  }
};

// Numbers of experts that need no rank. Their ids start at moe_experts, in this order. A zero expert returns 0, a copy
// expert x, and a constant expert a * x + b * v.
struct SpecialExperts {
  int64_t zero;
  int64_t copy;
  int64_t constant;

  using Fields = std::tuple<int64_t, int64_t, int64_t>;
  int64_t total() const { return zero + copy + constant; }
};

// Builds the placement. Refuses sizes that do not fit together, and options of later versions that are not emulated.
Placement make_placement(const Members& members, int64_t global_bs, const std::string& comm_alg = "",
                         const OptionalTensor& elastic_info = {}, const OptionalTensor& performance_info = {});

// Returns a text of the arguments that both ops have and that must be equal on all ranks.
std::string agreed_facts(const std::string& version, const Placement& place, const SpecialExperts& special,
                         int64_t top_k, int64_t width, at::ScalarType dtype);

// Returns which pairs of a token and an expert are sent, [B, K] bool. Without a mask these are all pairs. A mask [B]
// selects the pairs of the first tokens, and a mask [B, K] selects any pairs.
at::Tensor active_pairs(const at::Tensor& expert_ids, const OptionalTensor& mask);

void check_mask(const Placement& place, const at::Tensor& expert_ids, const OptionalTensor& mask);

// Refuses negative numbers, and experts that the chip or the algorithm does not have.
void check_special(const Placement& place, const SpecialExperts& special);

// Refuses ids that are negative or too large, and a row that has an id twice.
void check_ids(const at::Tensor& expert_ids, const at::Tensor& active, int64_t num_ids);

// --- pairing.cpp: finds the dispatch of a combine ---

struct PendingDispatch {
  std::string version;       // the combine must have the same version
  at::Tensor expert_ids;     // [B, K]
  at::Tensor active;         // [B, K] bool
  at::Tensor sources;        // [rows, 3] int64: (source rank, token, k) of each row of expand_x
  at::Tensor recv_counts;    // the first values of ep_recv_counts
  at::Tensor combine_index;  // version 1: expand_idx; else assist_info_for_combine's first 3 * rows cells
};

void remember_dispatch(const std::string& group, PendingDispatch dispatch);

// Returns the group's last dispatch and forgets it. Refuses if there is none, or if the arguments of the combine do not
// match the dispatch.
PendingDispatch take_dispatch(const std::string& group, const std::string& version, const at::Tensor& expert_ids,
                              const at::Tensor& active, const at::Tensor& combine_index, const at::Tensor& send_counts);

}  // namespace vllm_npu::emulator::aclnn
