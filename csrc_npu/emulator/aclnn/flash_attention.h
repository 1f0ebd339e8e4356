// Attention of training and its gradient, for the functions of flash_attention_entries.cpp.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "op.h"

namespace vllm_npu::emulator::aclnn {

// The options that all functions take in this order.
struct AttentionOptions {
  double scale, keep_prob;
  int64_t pre_tokens, next_tokens, heads;
  std::string layout;
  int64_t inner_precise, sparse_mode;

  using Fields = std::tuple<double, double, int64_t, int64_t, int64_t, std::string, int64_t, int64_t>;
};

struct SequenceEnds {  // cumulative lengths of the sequences; in the layout TND only
  std::vector<int64_t> query, key;

  using Fields = std::tuple<std::vector<int64_t>, std::vector<int64_t>>;
};

// What forward and backward take alike. Shapes are those of `options.layout`.
struct TrainingAttention {
  at::Tensor query, key, value;
  OptionalTensor query_rope, key_rope;  // further values of each row of query and key
  OptionalTensor drop_mask;             // bits: [B, N, S, S], or [N, S, S] of one sequence after the other
  OptionalTensor mask;
  SequenceEnds ends;
  AttentionOptions options;
  bool statistics_as_input = false;  // TND: softmax_max and softmax_sum are [T, N, 8], not [N, T, 8]
};

struct AttentionOutputs {
  at::Tensor most, sum;  // of each row's scores, float32, 8 times: the maximum and the sum of exponents
  at::Tensor reserved;
  at::Tensor out;

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};

struct AttentionResults {  // of a forward call
  at::Tensor most, sum;
  OptionalTensor reserved;
  at::Tensor out;

  using Fields = std::tuple<at::Tensor, at::Tensor, OptionalTensor, at::Tensor>;
};

struct AttentionGradients {
  at::Tensor query, key, value;
  OptionalTensor query_rope, key_rope;
};

Plan attention_forward(const TrainingAttention& call, const AttentionOutputs& outputs);
Plan attention_backward(const TrainingAttention& call, const at::Tensor& dy, const AttentionResults& results,
                        const AttentionGradients& gradients);

}  // namespace vllm_npu::emulator::aclnn
