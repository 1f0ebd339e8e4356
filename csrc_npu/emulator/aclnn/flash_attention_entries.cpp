// The versions of CANN's functions for attention of training. They differ in what they take beside query, key and
// value.
//
// Contract: CANN's documents of aclnnFlashAttentionScore, -VarLenScore, -ScoreGrad and -UnpaddingScoreGrad, their
// versions V2, V3 (rotated parts beside query and key) and V4 (the layout of the statistics), and op-plugin's calls of
// them.
#include "flash_attention.h"

namespace vllm_npu::emulator::aclnn {
namespace {

struct Masks {
  OptionalTensor pse, drop, padding, attention;

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

struct Prefix {
  std::vector<int64_t> lengths;

  using Fields = std::tuple<std::vector<int64_t>>;
};

struct Starts {  // only for a position encoding that the op computes
  std::vector<int64_t> query, key;

  using Fields = std::tuple<std::vector<int64_t>, std::vector<int64_t>>;
};

struct AttentionInputs {
  at::Tensor query, key, value;

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
};

struct InputsWithRope {
  at::Tensor query;
  OptionalTensor query_rope;
  at::Tensor key;
  OptionalTensor key_rope;
  at::Tensor value;

  using Fields = std::tuple<at::Tensor, OptionalTensor, at::Tensor, OptionalTensor, at::Tensor>;
};

struct Gradients {
  at::Tensor query, key, value;
  OptionalTensor pse;

  using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, OptionalTensor>;

  AttentionGradients without_rope() const { return {query, key, value, std::nullopt, std::nullopt}; }
};

struct GradientsWithRope {
  at::Tensor query;
  OptionalTensor query_rope;
  at::Tensor key;
  OptionalTensor key_rope;
  at::Tensor value;
  OptionalTensor pse;

  using Fields = std::tuple<at::Tensor, OptionalTensor, at::Tensor, OptionalTensor, at::Tensor, OptionalTensor>;
};

TrainingAttention call_of(const InputsWithRope& inputs, const Masks& masks, const Prefix& prefix,
                          const SequenceEnds& ends, const AttentionOptions& options) {
  require_absent(masks.pse, "pse", "it is not emulated");
  require_absent(masks.padding, "padding_mask", "op-plugin's document says that it is not supported");
  require(prefix.lengths.empty(), "prefix is not emulated");
  return {inputs.query,    inputs.key, inputs.value, inputs.query_rope, inputs.key_rope, masks.drop,
          masks.attention, ends,       options};
}

TrainingAttention call_of(const AttentionInputs& inputs, const Masks& masks, const Prefix& prefix,
                          const SequenceEnds& ends, const AttentionOptions& options) {
  return call_of(InputsWithRope{inputs.query, std::nullopt, inputs.key, std::nullopt, inputs.value}, masks, prefix,
                 ends, options);
}

bool as_input(const std::string& softmax_layout) {
  require(softmax_layout.empty() || softmax_layout == "same_as_input", "softmax_layout=", softmax_layout,
          " is neither empty nor same_as_input");
  return !softmax_layout.empty();
}

// --- sequences of equal lengths ---

Plan padded(AttentionInputs inputs, Masks masks, Prefix prefix, AttentionOptions options, AttentionOutputs outputs) {
  return attention_forward(call_of(inputs, masks, prefix, {}, options), outputs);
}

Plan padded_v2(AttentionInputs inputs, Masks masks, Prefix prefix, Starts /*starts*/, AttentionOptions options,
               int64_t /*pse_type: no effect without pse*/, AttentionOutputs outputs) {
  return padded(inputs, masks, prefix, options, outputs);
}

Plan padded_grad(AttentionInputs inputs, at::Tensor dy, Masks masks, AttentionResults results, Prefix prefix,
                 AttentionOptions options, Gradients gradients) {
  return attention_backward(call_of(inputs, masks, prefix, {}, options), dy, results, gradients.without_rope());
}

Plan padded_grad_v2(AttentionInputs inputs, at::Tensor dy, Masks masks, AttentionResults results, Prefix prefix,
                    Starts /*starts*/, AttentionOptions options, int64_t /*pse_type*/, Gradients gradients) {
  return padded_grad(inputs, dy, masks, results, prefix, options, gradients);
}

// --- sequences that are joined along T ---

Plan joined(AttentionInputs inputs, Masks masks, Prefix prefix, SequenceEnds ends, AttentionOptions options,
            AttentionOutputs outputs) {
  return attention_forward(call_of(inputs, masks, prefix, ends, options), outputs);
}

Plan joined_v2(AttentionInputs inputs, Masks masks, Prefix prefix, SequenceEnds ends, Starts /*starts*/,
               AttentionOptions options, int64_t /*pse_type*/, AttentionOutputs outputs) {
  return joined(inputs, masks, prefix, ends, options, outputs);
}

Plan joined_v3(InputsWithRope inputs, Masks masks, Prefix prefix, SequenceEnds ends, Starts /*starts*/,
               AttentionOptions options, int64_t /*pse_type*/, AttentionOutputs outputs) {
  return attention_forward(call_of(inputs, masks, prefix, ends, options), outputs);
}

Plan joined_v4(AttentionInputs inputs, Masks masks, Prefix prefix, SequenceEnds ends, AttentionOptions options,
               std::string softmax_layout, AttentionOutputs outputs) {
  TrainingAttention call = call_of(inputs, masks, prefix, ends, options);
  call.statistics_as_input = as_input(softmax_layout);
  return attention_forward(call, outputs);
}

Plan joined_grad(AttentionInputs inputs, at::Tensor dy, Masks masks, AttentionResults results, Prefix prefix,
                 SequenceEnds ends, AttentionOptions options, Gradients gradients) {
  return attention_backward(call_of(inputs, masks, prefix, ends, options), dy, results, gradients.without_rope());
}

Plan joined_grad_v2(AttentionInputs inputs, at::Tensor dy, Masks masks, AttentionResults results, Prefix prefix,
                    SequenceEnds ends, Starts /*starts*/, AttentionOptions options, int64_t /*pse_type*/,
                    Gradients gradients) {
  return joined_grad(inputs, dy, masks, results, prefix, ends, options, gradients);
}

Plan joined_grad_v3(InputsWithRope inputs, at::Tensor dy, Masks masks, AttentionResults results, Prefix prefix,
                    SequenceEnds ends, Starts /*starts*/, AttentionOptions options, int64_t /*pse_type*/,
                    GradientsWithRope gradients) {
  return attention_backward(
      call_of(inputs, masks, prefix, ends, options), dy, results,
      {gradients.query, gradients.key, gradients.value, gradients.query_rope, gradients.key_rope});
}

Plan joined_grad_v4(AttentionInputs inputs, at::Tensor dy, Masks masks, AttentionResults results, Prefix prefix,
                    SequenceEnds ends, AttentionOptions options, Gradients gradients, std::string softmax_layout) {
  TrainingAttention call = call_of(inputs, masks, prefix, ends, options);
  call.statistics_as_input = as_input(softmax_layout);
  return attention_backward(call, dy, results, gradients.without_rope());
}

}  // namespace

ACLNN_OP(aclnnFlashAttentionScore, padded);
ACLNN_OP(aclnnFlashAttentionScoreV2, padded_v2);
ACLNN_OP(aclnnFlashAttentionScoreGrad, padded_grad);
ACLNN_OP(aclnnFlashAttentionScoreGradV2, padded_grad_v2);
ACLNN_OP(aclnnFlashAttentionVarLenScore, joined);
ACLNN_OP(aclnnFlashAttentionVarLenScoreV2, joined_v2);
ACLNN_OP(aclnnFlashAttentionVarLenScoreV3, joined_v3);
ACLNN_OP(aclnnFlashAttentionVarLenScoreV4, joined_v4);
ACLNN_OP(aclnnFlashAttentionUnpaddingScoreGrad, joined_grad);
ACLNN_OP(aclnnFlashAttentionUnpaddingScoreGradV2, joined_grad_v2);
ACLNN_OP(aclnnFlashAttentionUnpaddingScoreGradV3, joined_grad_v3);
ACLNN_OP(aclnnFlashAttentionUnpaddingScoreGradV4, joined_grad_v4);

}  // namespace vllm_npu::emulator::aclnn
