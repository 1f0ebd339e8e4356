// Attention for inference, over a paged cache or plain keys and values.
//
// Contract: CANN's documents of aclnnFusedInferAttentionScoreV2 to V4. Quantisation, prefixes and padding are not
// emulated.
#include <algorithm>
#include <limits>
#include <map>

#include "attention.h"
#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

using Tensors = std::vector<at::Tensor>;
using Ints = std::vector<int64_t>;

constexpr int64_t kNoMask = 0;           // sparse_mode
constexpr int64_t kRightDownCausal = 3;  // the last query sees all keys

// The layouts of the query and of the output, which input_layout names together.
struct Layouts {
  std::string query;
  std::string out;
};

const Layouts& layouts_of(const std::string& input_layout) {
  static const std::map<std::string, Layouts> kLayouts{
      {"BSH", {"BSH", "BSH"}},         {"BSND", {"BSND", "BSND"}},      {"BNSD", {"BNSD", "BNSD"}},
      {"BNSD_BSND", {"BNSD", "BSND"}}, {"BSND_BNSD", {"BSND", "BNSD"}}, {"BSH_BNSD", {"BSH", "BNSD"}},
      {"BNSD_NBSD", {"BNSD", "NBSD"}}, {"BSND_NBSD", {"BSND", "NBSD"}}, {"BSH_NBSD", {"BSH", "NBSD"}},
      {"TND", {"TND", "TND"}},         {"NTD", {"NTD", "NTD"}},         {"TND_NTD", {"TND", "NTD"}},
      {"NTD_TND", {"NTD", "TND"}},
  };
  const auto found = kLayouts.find(input_layout);
  require(found != kLayouts.end(), "input_layout=", input_layout, " is not emulated");
  return found->second;
}

// Returns a view [B, N, S, D]. Layouts that join the sequences along T give [N, T, D].
at::Tensor heads_first(const at::Tensor& tensor, const std::string& layout, int64_t heads) {
  if (layout == "BSH") return tensor.view({tensor.size(0), tensor.size(1), heads, -1}).transpose(1, 2);
  if (layout == "BSND") return tensor.transpose(1, 2);
  if (layout == "NBSD" || layout == "TND") return tensor.transpose(0, 1);
  return tensor;  // BNSD, NTD
}

// Arguments that no op of this file supports.
struct NotEmulated {
  OptionalTensor dequant_scale1, quant_scale1, dequant_scale2, quant_scale2, quant_offset2, antiquant_scale,
      antiquant_offset;

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                            OptionalTensor, OptionalTensor>;

  void refuse_all() const {
    const char* reason = "quantised attention is not emulated";
    require_absent(dequant_scale1, "dequant_scale1", reason);
    require_absent(quant_scale1, "quant_scale1", reason);
    require_absent(dequant_scale2, "dequant_scale2", reason);
    require_absent(quant_scale2, "quant_scale2", reason);
    require_absent(quant_offset2, "quant_offset2", reason);
    require_absent(antiquant_scale, "antiquant_scale", reason);
    require_absent(antiquant_offset, "antiquant_offset", reason);
  }
};

struct AlsoNotEmulated {
  OptionalTensor query_padding, kv_padding, key_scale, key_offset, value_scale, value_offset, key_prefix, value_prefix;
  Ints prefix_length;

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                            OptionalTensor, OptionalTensor, OptionalTensor, Ints>;

  void refuse_all() const {
    require_absent(query_padding, "query_padding_size", "left padding is not emulated");
    require_absent(kv_padding, "kv_padding_size", "left padding is not emulated");
    const char* reason = "quantised keys and values are not emulated";
    require_absent(key_scale, "key_antiquant_scale", reason);
    require_absent(key_offset, "key_antiquant_offset", reason);
    require_absent(value_scale, "value_antiquant_scale", reason);
    require_absent(value_offset, "value_antiquant_offset", reason);
    require_absent(key_prefix, "key_shared_prefix", "shared prefixes are not emulated");
    require_absent(value_prefix, "value_shared_prefix", "shared prefixes are not emulated");
    require(prefix_length.empty(), "actual_shared_prefix_len is given, but shared prefixes are not emulated");
  }
};

struct Inputs {
  at::Tensor query;
  Tensors key;
  Tensors value;
  OptionalTensor position_shift;
  OptionalTensor mask;
  Ints query_lengths;  // the length of each sequence; running sums of them if sequences are joined along T
  Ints kv_lengths;     // the same, but always the length of each sequence if there is a block table

  using Fields = std::tuple<at::Tensor, Tensors, Tensors, OptionalTensor, OptionalTensor, Ints, Ints>;
};

struct Rope {
  OptionalTensor query;
  OptionalTensor key;

  using Fields = std::tuple<OptionalTensor, OptionalTensor>;
};

struct Attributes {
  int64_t heads;
  double scale;
  int64_t pre_tokens;   // only for modes that are refused
  int64_t next_tokens;  // only for modes that are refused
  std::string input_layout;
  int64_t kv_heads;  // 0: as many as heads
  int64_t sparse_mode;
  int64_t inner_precise;  // how the device rounds
  int64_t block_size;
  int64_t antiquant_mode;  // no effect without scales
  bool wants_lse;
  int64_t key_antiquant_mode;
  int64_t value_antiquant_mode;

  using Fields = std::tuple<int64_t, double, int64_t, int64_t, std::string, int64_t, int64_t, int64_t, int64_t, int64_t,
                            bool, int64_t, int64_t>;
};

struct Outputs {
  at::Tensor out;
  at::Tensor lse;

  using Fields = std::tuple<at::Tensor, at::Tensor>;
};

// The parts of the tensors that belong to one sequence.
struct Sequence {
  at::Tensor query;  // [N, n, D]
  at::Tensor key;    // [KN, m, D]
  at::Tensor value;  // [KN, m, Dv]
  at::Tensor out;    // [N, n, Dv]
  at::Tensor lse;    // [N, n], or undefined
};

// Returns the cache as [blocks, block_size, KN, D]. It may be given as [blocks, block_size, KN * D] or
// [blocks, KN, block_size, D].
at::Tensor as_blocks(const at::Tensor& cache, const char* name, int64_t kv_heads, int64_t block_size) {
  require(cache.dim() == 3 || cache.dim() == 4, name, " has the shape ", cache.sizes(),
          "; with block_table it must have 3 or 4 dimensions (NZ caches are not emulated)");
  const at::Tensor blocks =
      cache.dim() == 3 ? cache.view({cache.size(0), cache.size(1), kv_heads, -1}) : cache.transpose(1, 2);
  require(blocks.size(1) == block_size && blocks.size(2) == kv_heads, name, " has the shape ", cache.sizes(),
          ", block_size is ", block_size, " and num_key_value_heads ", kv_heads);
  return blocks;
}

class Attention {
 public:
  Attention(Inputs inputs, OptionalTensor block_table, Rope rope, Attributes attributes, Outputs outputs)
      : in_(std::move(inputs)),
        table_(std::move(block_table)),
        attributes_(std::move(attributes)),
        layouts_(layouts_of(attributes_.input_layout)),
        kv_heads_(attributes_.kv_heads == 0 ? attributes_.heads : attributes_.kv_heads),
        joined_(layouts_.query.size() == 3 && layouts_.query != "BSH"),
        out_(std::move(outputs)) {
    check_inputs();
    query_ = heads_first(in_.query, layouts_.query, attributes_.heads);
    key_ = in_.key[0];
    if (table_) {
      key_ = as_blocks(key_, "key", kv_heads_, attributes_.block_size);
      value_ = as_blocks(in_.value[0], "value", kv_heads_, attributes_.block_size);
    } else {
      key_ = heads_first(key_, layouts_.query, kv_heads_);
      value_ = heads_first(in_.value[0], layouts_.query, kv_heads_);
    }
    add_rope(rope);
    check_shapes();
    check_mask();
  }

  void run() const {
    fill_undefined(out_.out);
    if (attributes_.wants_lse) fill_undefined(out_.lse);
    for (int64_t i = 0; i < num_sequences(); ++i) {
      const Sequence sequence = part(i);
      if (sequence.query.size(1) == 0) continue;
      const Attended attended = attend(sequence.query, sequence.key, sequence.value, attributes_.scale,
                                       hidden(sequence.query.size(1), sequence.key.size(1)));
      sequence.out.copy_(attended.out);
      if (attributes_.wants_lse) sequence.lse.copy_(attended.lse);
    }
  }

 private:
  int64_t num_sequences() const { return joined_ ? static_cast<int64_t>(in_.query_lengths.size()) : query_.size(0); }

  void check_inputs() const {
    require_attention_dtype(in_.query, "query");
    require_absent(in_.position_shift, "pse_shift", "it is not emulated");
    require(in_.key.size() == 1 && in_.value.size() == 1, "key has ", in_.key.size(), " tensors and value ",
            in_.value.size(), "; one of each is emulated");
    require_dtype(in_.key[0], "key", {in_.query.scalar_type()});
    require_dtype(in_.value[0], "value", {in_.query.scalar_type()});
    require(attributes_.heads > 0 && attributes_.heads % kv_heads_ == 0, "num_heads=", attributes_.heads,
            " is no multiple of num_key_value_heads=", kv_heads_);
    require_one_of(attributes_.sparse_mode, "sparse_mode", {kNoMask, kRightDownCausal});
    require(!joined_ || !in_.query_lengths.empty(), "actual_seq_lengths is missing: ", attributes_.input_layout,
            " needs it");
    require(!joined_ || in_.query_lengths.size() == in_.kv_lengths.size(), "actual_seq_lengths has ",
            in_.query_lengths.size(), " values and actual_seq_lengths_kv ", in_.kv_lengths.size());
    require(!joined_ || std::is_sorted(in_.query_lengths.begin(), in_.query_lengths.end()),
            "actual_seq_lengths falls, but with ", attributes_.input_layout, " it must be running sums");
  }

  // Appends the rotated parts to query and key, so that one dot product has both parts.
  void add_rope(const Rope& rope) {
    require(rope.query.has_value() == rope.key.has_value(), "query_rope and key_rope go together");
    if (!rope.query) return;
    require_dtype(*rope.query, "query_rope", {in_.query.scalar_type()});
    require_dtype(*rope.key, "key_rope", {in_.query.scalar_type()});
    query_rope_ = heads_first(*rope.query, layouts_.query, attributes_.heads);
    key_rope_ = table_ ? as_blocks(*rope.key, "key_rope", kv_heads_, attributes_.block_size)
                       : heads_first(*rope.key, layouts_.query, kv_heads_);
  }

  void check_shapes() const {
    const at::Tensor out = heads_first(out_.out, layouts_.out, attributes_.heads);
    const auto rows = [](const at::Tensor& tensor) { return tensor.sizes().slice(0, tensor.dim() - 1); };
    require(query_.size(joined_ ? 0 : 1) == attributes_.heads, "query has the shape ", in_.query.sizes(),
            " and num_heads is ", attributes_.heads);
    require(query_.size(-1) == key_.size(-1), "query has the shape ", in_.query.sizes(), " and key ",
            in_.key[0].sizes());
    require(rows(out) == rows(query_) && out.size(-1) == value_.size(-1), "the output has the shape ", out_.out.sizes(),
            ", query ", in_.query.sizes(), " and value ", in_.value[0].sizes());
    if (query_rope_) {
      require(rows(*query_rope_) == rows(query_) && rows(*key_rope_) == rows(key_) &&
                  query_rope_->size(-1) == key_rope_->size(-1),
              "query_rope and key_rope have the shapes ", query_rope_->sizes(), " and ", key_rope_->sizes(),
              ", query and key ", query_.sizes(), " and ", key_.sizes());
    }
    if (table_) {
      require_dtype(*table_, "block_table", {at::kInt});
      require_dimensions(*table_, "block_table", 2);
      require(static_cast<int64_t>(in_.kv_lengths.size()) == num_sequences() && table_->size(0) >= num_sequences(),
              "there are ", num_sequences(), " sequences, ", in_.kv_lengths.size(), " actual_seq_lengths_kv and ",
              table_->size(0), " rows of block_table");
    }
    if (joined_) {
      require(in_.query_lengths.back() <= query_.size(1), "actual_seq_lengths ends at ", in_.query_lengths.back(),
              " and query has ", query_.size(1), " tokens");
      require(table_ || in_.kv_lengths.back() <= key_.size(1), "actual_seq_lengths_kv ends at ", in_.kv_lengths.back(),
              " and key has ", key_.size(1), " tokens");
    }
  }

  // The causal mode reads one mask for all sequences.
  void check_mask() const {
    if (attributes_.sparse_mode == kNoMask) {
      require_absent(in_.mask, "atten_mask", "sparse_mode=0 is emulated without a mask");
      return;
    }
    if (!in_.mask) refuse(Code::kMissing, "atten_mask is missing: sparse_mode=3 needs the one of 2048 x 2048");
    require_compressed_mask(*in_.mask, attributes_.sparse_mode);
  }

  OptionalTensor hidden(int64_t rows, int64_t columns) const {
    if (attributes_.sparse_mode == kNoMask) return std::nullopt;
    require_causal_values(*in_.mask, attributes_.sparse_mode, std::max(rows, columns));
    return at::ones({rows, columns}, at::kBool).triu(columns - rows + 1);
  }

  static int64_t length_of(const Ints& lengths, int64_t i, int64_t whole, const char* name) {
    if (lengths.empty()) return whole;
    const int64_t length = lengths[lengths.size() == 1 ? 0 : i];
    require(0 <= length && length <= whole, name, " has the length ", length, " of ", whole);
    return length;
  }

  Sequence part(int64_t i) const {
    const at::Tensor out = heads_first(out_.out, layouts_.out, attributes_.heads);
    Sequence result;
    const auto of_query = [&](const at::Tensor& tensor) {
      if (!joined_) {
        const at::Tensor mine = tensor[i];
        // One token a sequence is the decode branch, which has no lengths of queries: torch_npu's tests give 100 there.
        if (mine.size(1) == 1) return mine;
        return mine.narrow(1, 0, length_of(in_.query_lengths, i, mine.size(1), "actual_seq_lengths"));
      }
      const int64_t start = i == 0 ? 0 : in_.query_lengths[i - 1];
      return tensor.narrow(1, start, in_.query_lengths[i] - start);
    };
    const auto of_key = [&](const at::Tensor& tensor) {
      if (table_) return gather_blocks(tensor, (*table_)[i], in_.kv_lengths[i]).transpose(0, 1);
      if (!joined_) {
        const at::Tensor mine = tensor[i];
        return mine.narrow(1, 0, length_of(in_.kv_lengths, i, mine.size(1), "actual_seq_lengths_kv"));
      }
      const int64_t start = i == 0 ? 0 : in_.kv_lengths[i - 1];
      return tensor.narrow(1, start, in_.kv_lengths[i] - start);
    };
    result.query = of_query(query_);
    result.key = of_key(key_);
    if (query_rope_) {
      result.query = at::cat({result.query, of_query(*query_rope_)}, -1);
      result.key = at::cat({result.key, of_key(*key_rope_)}, -1);
    }
    result.value = of_key(value_);
    result.out = of_query(out);
    if (attributes_.wants_lse) {
      const at::Tensor lse = out_.lse.squeeze(-1);  // [T, N] or [B, N, S]
      result.lse = of_query((joined_ ? lse.transpose(0, 1) : lse).unsqueeze(-1)).squeeze(-1);
    }
    return result;
  }

  Inputs in_;
  OptionalTensor table_;
  Attributes attributes_;
  Layouts layouts_;
  int64_t kv_heads_;
  bool joined_;  // sequences are joined along T
  Outputs out_;
  at::Tensor query_, key_, value_;  // heads first; with a block table, key and value as blocks
  OptionalTensor query_rope_, key_rope_;
};

Plan plan(const Inputs& inputs, const NotEmulated& not_emulated, const OptionalTensor& block_table,
          const AlsoNotEmulated& also_not_emulated, const Rope& rope, const Attributes& attributes,
          const Outputs& outputs) {
  refuse_on_310p("npu_fused_infer_attention_score");
  not_emulated.refuse_all();
  also_not_emulated.refuse_all();
  const Attention attention(inputs, block_table, rope, attributes, outputs);
  return [attention] { attention.run(); };
}

Plan fused_infer_attention_v2(Inputs inputs, NotEmulated not_emulated, OptionalTensor block_table,
                              AlsoNotEmulated also_not_emulated, Attributes attributes, Outputs outputs) {
  return plan(inputs, not_emulated, block_table, also_not_emulated, {}, attributes, outputs);
}

Plan fused_infer_attention_v3(Inputs inputs, NotEmulated not_emulated, OptionalTensor block_table,
                              AlsoNotEmulated also_not_emulated, Rope rope, OptionalTensor key_rope_scale,
                              Attributes attributes, Outputs outputs) {
  require_absent(key_rope_scale, "key_rope_antiquant_scale", "quantised keys are not emulated");
  return plan(inputs, not_emulated, block_table, also_not_emulated, rope, attributes, outputs);
}

Plan fused_infer_attention_v4(Inputs inputs, NotEmulated not_emulated, OptionalTensor block_table,
                              AlsoNotEmulated also_not_emulated, Rope rope, OptionalTensor key_rope_scale,
                              OptionalTensor query_scale, OptionalTensor sink, Attributes attributes,
                              int64_t /*query_quant_mode: no effect without scales*/, Outputs outputs) {
  require_absent(query_scale, "dequant_scale_query", "quantised queries are not emulated");
  require_absent(sink, "learnable_sink", "it is not emulated");
  return fused_infer_attention_v3(inputs, not_emulated, block_table, also_not_emulated, rope, key_rope_scale,
                                  attributes, outputs);
}

// Merges the outputs for parts of the keys. The weight of a part in a row is the softmax of its lse over the parts.
Plan attention_update(Tensors lse, Tensors outs, int64_t update_type, at::Tensor out, OptionalTensor lse_out) {
  require_one_of(update_type, "update_type", {0, 1});
  require(!lse.empty() && lse.size() == outs.size(), "lse has ", lse.size(), " tensors and local_out ", outs.size());
  for (size_t i = 0; i < lse.size(); ++i) {
    require_dtype(lse[i], "lse", {at::kFloat});
    require_shape(lse[i], "lse", {outs[i].size(0)});
    require_shape(outs[i], "local_out", out.sizes());
  }
  require(lse_out.has_value() == (update_type == 1), "lse_out goes with update_type=1");
  return [=] {
    // A part without keys has an lse of +infinity, and its weight must be 0.
    at::Tensor all = at::stack(lse);
    all = at::where(at::isposinf(all), -std::numeric_limits<float>::infinity(), all);
    const at::Tensor total = at::logsumexp(all, 0);
    const at::Tensor weights = at::exp(all - total).unsqueeze(-1);
    Tensors floats;
    for (const at::Tensor& part : outs) floats.push_back(part.to(at::kFloat));
    out.copy_((weights * at::stack(floats)).sum(0));
    if (lse_out) lse_out->copy_(total);
  };
}

}  // namespace

ACLNN_OP(aclnnFusedInferAttentionScoreV2, fused_infer_attention_v2);
ACLNN_OP(aclnnFusedInferAttentionScoreV3, fused_infer_attention_v3);
ACLNN_OP(aclnnFusedInferAttentionScoreV4, fused_infer_attention_v4);
ACLNN_MAX_WORKSPACE(aclnnFusedInferAttentionScoreV2, fused_infer_attention_v2);
ACLNN_MAX_WORKSPACE(aclnnFusedInferAttentionScoreV3, fused_infer_attention_v3);
ACLNN_MAX_WORKSPACE(aclnnFusedInferAttentionScoreV4, fused_infer_attention_v4);
ACLNN_OP(aclnnAttentionUpdate, attention_update);

}  // namespace vllm_npu::emulator::aclnn
