// Attention of training, npu_fusion_attention, and its gradient.
//
// Contract: op-plugin's document of npu_fusion_attention, and its call of the aclnn functions. Both are computed in
// float32, rounded once. A query that sees no key gets zeros.
#include "flash_attention.h"

#include <algorithm>
#include <limits>

#include "attention.h"
#include "dropout.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kFirstCompressedMode = 2;  // sparse_mode 2 to 4 take the mask of 2048 x 2048
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Returns a view [B, N, S, D]; of TND, [1, N, T, D].
at::Tensor heads_first(const at::Tensor& x, const std::string& layout, int64_t heads) {
  if (layout == "BNSD") return x;
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "TND") return x.transpose(0, 1).unsqueeze(0);
  if (layout == "BSH") return x.unflatten(-1, {heads, x.size(-1) / heads}).transpose(1, 2);
  require(layout == "SBH", "input_layout=", layout, " is none of BSH, SBH, BNSD, BSND and TND");
  return x.unflatten(-1, {heads, x.size(-1) / heads}).permute({1, 2, 0, 3});
}

int64_t kv_heads(const TrainingAttention& call) {
  const std::string& layout = call.options.layout;
  if (layout == "BNSD" || layout == "TND") return call.key.size(1);
  if (layout == "BSND") return call.key.size(2);
  return call.key.size(-1) * call.options.heads / call.query.size(-1);
}

struct Rows {  // a sequence's place in the dimension S, and its first bit in the mask of dropout
  int64_t query, num_queries, key, num_keys, first_bit;
};

// One entry without ends: all sequences have the same. Zeros at the end of the ends are sequences that take no part.
std::vector<Rows> sequences(const at::Tensor& query, const at::Tensor& key, const SequenceEnds& ends) {
  if (ends.query.empty()) return {{0, query.size(2), 0, key.size(2), 0}};
  std::vector<Rows> all;
  int64_t queries = 0, keys = 0, bits = 0;
  for (size_t i = 0; i < ends.query.size() && !(i > 0 && ends.query[i] == 0); ++i) {
    all.push_back({queries, ends.query[i] - queries, keys, ends.key[i] - keys, bits});
    const Rows& rows = all.back();
    require(rows.num_queries >= 0 && rows.num_keys >= 0, "actual_seq_qlen or actual_seq_kvlen decreases");
    queries = ends.query[i];
    keys = ends.key[i];
    bits += query.size(1) * rows.num_queries * rows.num_keys;
  }
  require(queries <= query.size(2) && keys <= key.size(2), "actual_seq_qlen ends at ", queries, " of ", query.size(2),
          " tokens and actual_seq_kvlen at ", keys, " of ", key.size(2));
  return all;
}

// True where a query does not see a key, [.., queries, keys]. Without a mask, every query sees all keys.
OptionalTensor hidden_pairs(const OptionalTensor& mask, const AttentionOptions& options, const Rows& rows) {
  if (!mask) return std::nullopt;
  if (options.sparse_mode >= kFirstCompressedMode) {
    require_causal_values(*mask, options.sparse_mode, std::max(rows.num_queries, rows.num_keys));
  }
  const at::Tensor query = at::arange(rows.num_queries).unsqueeze(1), key = at::arange(rows.num_keys).unsqueeze(0);
  const int64_t aligned_right = rows.num_keys - rows.num_queries;
  switch (options.sparse_mode) {
    case 0: {
      const at::Tensor given = mask->slice(-2, 0, rows.num_queries).slice(-1, 0, rows.num_keys).to(at::kBool);
      const at::Tensor outside = (key > query + options.next_tokens).logical_or(key < query - options.pre_tokens);
      require(!outside.logical_and(given.logical_not()).any().item<bool>(),
              "atten_mask shows pairs that pre_tockens=", options.pre_tokens, " and next_tockens=", options.next_tokens,
              " hide; the document forbids it");
      return given;
    }
    case 1:
      return mask->slice(-2, 0, rows.num_queries).slice(-1, 0, rows.num_keys).to(at::kBool);
    case 2:
      return key > query;
    case 3:
      return key > query + aligned_right;
    default:
      return (key > query + aligned_right + options.next_tokens)
          .logical_or(key < query + aligned_right - options.pre_tokens);
  }
}

void check_rope(const TrainingAttention& call) {
  require(call.query_rope.has_value() == call.key_rope.has_value(), "query_rope and key_rope go together");
  if (!call.query_rope) return;
  for (const auto& [rope, whole, name] :
       {std::tuple(*call.query_rope, call.query, "query_rope"), std::tuple(*call.key_rope, call.key, "key_rope")}) {
    require_dtype(rope, name, {whole.scalar_type()});
    require(rope.sizes().slice(0, rope.dim() - 1) == whole.sizes().slice(0, whole.dim() - 1), name, " has the shape ",
            rope.sizes(), " beside ", whole.sizes());
  }
}

void check_mask(const OptionalTensor& mask, int64_t sparse_mode) {
  require_one_of(sparse_mode, "sparse_mode", {0, 1, 2, 3, 4});
  if (!mask) return;
  require_dtype(*mask, "atten_mask", {at::kBool, at::kByte});
  if (sparse_mode >= kFirstCompressedMode) {
    require_compressed_mask(*mask, sparse_mode);
  } else {
    require(mask->dim() == 4 || mask->dim() == 2, "atten_mask has the shape ", mask->sizes(),
            "; it must be [B, N, S, S], [B, 1, S, S], [1, 1, S, S] or [S, S]");
  }
}

void check(const TrainingAttention& call) {
  refuse_on_310p("npu_fusion_attention");
  const AttentionOptions& options = call.options;
  require_dtype(call.query, "query", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dtype(call.key, "key", {call.query.scalar_type()});
  require_dtype(call.value, "value", {call.query.scalar_type()});
  const SequenceEnds& ends = call.ends;
  require(ends.query.empty() == (options.layout != "TND"), "actual_seq_qlen goes with the input_layout TND only");
  require(ends.query.size() == ends.key.size(), "actual_seq_qlen and actual_seq_kvlen have different lengths");
  const int64_t keys = kv_heads(call);
  require(keys > 0 && options.heads % keys == 0, "head_num=", options.heads, " is no multiple of the ", keys,
          " heads of key");
  require(options.keep_prob > 0 && options.keep_prob <= 1, "keep_prob=", options.keep_prob, " is not in (0, 1]");
  require(call.drop_mask.has_value() == (options.keep_prob < 1), "keep_prob=", options.keep_prob,
          call.drop_mask ? " with a mask of dropout: the documents give no meaning to it" : " needs a mask of dropout");
  if (call.drop_mask) require_dtype(*call.drop_mask, "drop_mask", {at::kByte});
  check_rope(call);
  check_mask(call.mask, options.sparse_mode);
}

// The views of a call with heads first, and what one sequence needs of them.
struct Views {
  explicit Views(const TrainingAttention& of_call)
      : call(of_call),
        heads(call.options.heads),
        keys(kv_heads(call)),
        query(with_rope(call.query, call.query_rope, heads)),
        key(with_rope(call.key, call.key_rope, keys)),
        value(view(call.value, keys)) {}

  at::Tensor view(const at::Tensor& x, int64_t of_heads) const { return heads_first(x, call.options.layout, of_heads); }

  at::Tensor with_rope(const at::Tensor& x, const OptionalTensor& rope, int64_t of_heads) const {
    return rope ? at::cat({view(x, of_heads), view(*rope, of_heads)}, -1) : view(x, of_heads);
  }

  // A view [B, N, S, 8] of the statistics; of TND, [1, N, T, 8].
  at::Tensor statistics(const at::Tensor& values) const {
    if (call.options.layout != "TND") return values;
    if (call.statistics_as_input) return values.transpose(0, 1).unsqueeze(0);
    return values.view({1, values.size(1), values.size(0), values.size(2)});  // their memory has the heads first
  }

  at::Tensor query_of(const Rows& rows) const { return query.narrow(2, rows.query, rows.num_queries).to(at::kFloat); }
  at::Tensor key_of(const Rows& rows) const { return spread(key, rows); }
  at::Tensor value_of(const Rows& rows) const { return spread(value, rows); }

  // Once for each head of query.
  at::Tensor spread(const at::Tensor& x, const Rows& rows) const {
    return x.narrow(2, rows.key, rows.num_keys).to(at::kFloat).repeat_interleave(heads / keys, 1);
  }

  // [B, N, queries, keys]
  at::Tensor scores_of(const Rows& rows) const {
    const at::Tensor scores = at::matmul(query_of(rows), key_of(rows).transpose(-1, -2)) * call.options.scale;
    const OptionalTensor hidden = hidden_pairs(call.mask, call.options, rows);
    return hidden ? scores.masked_fill(*hidden, -kInfinity) : scores;
  }

  // Values for each pair, after dropout.
  at::Tensor dropped(const at::Tensor& values, const Rows& rows) const {
    if (!call.drop_mask) return values;
    const int64_t end = rows.first_bit + values.numel();
    require(call.drop_mask->numel() * 8 >= end, "drop_mask has ", call.drop_mask->numel(), " bytes for ", end,
            " pairs");
    const at::Tensor kept = kept_by(*call.drop_mask, end).narrow(0, rows.first_bit, values.numel());
    return at::where(kept.view(values.sizes()), values / call.options.keep_prob, 0);
  }

  const TrainingAttention& call;
  const int64_t heads, keys;
  const at::Tensor query, key, value;  // with rope
};

// Writes the gradient of rows with rope to both parts.
void write_parts(const at::Tensor& rows, const at::Tensor& part, const OptionalTensor& rope) {
  part.copy_(rows.narrow(-1, 0, part.size(-1)));
  if (rope) rope->copy_(rows.narrow(-1, part.size(-1), rope->size(-1)));
}

}  // namespace

Plan attention_forward(const TrainingAttention& call, const AttentionOutputs& outputs) {
  check(call);
  return [=] {
    const Views views(call);
    const at::Tensor y = views.view(outputs.out, views.heads);
    const at::Tensor maxima = views.statistics(outputs.most), sums = views.statistics(outputs.sum);
    for (const at::Tensor& written : {y, maxima, sums}) {
      if (!call.ends.query.empty()) fill_undefined(written);  // sequences may leave rows at the end
    }
    for (const Rows& rows : sequences(views.query, views.key, call.ends)) {
      if (rows.num_queries == 0) continue;
      const at::Tensor scores = views.scores_of(rows);
      const at::Tensor peak = rows.num_keys == 0
                                  ? scores.new_full({scores.size(0), scores.size(1), rows.num_queries, 1}, -kInfinity)
                                  : scores.amax(-1, /*keepdim=*/true);
      const at::Tensor blind = at::isneginf(peak);
      const at::Tensor weights = at::exp(scores - peak.masked_fill(blind, 0));
      const at::Tensor total = weights.sum(-1, /*keepdim=*/true).masked_fill(blind, kInfinity);
      const auto of_queries = [&](const at::Tensor& x) { return x.narrow(2, rows.query, rows.num_queries); };
      of_queries(y).copy_(at::matmul(views.dropped(weights / total, rows), views.value_of(rows)));
      of_queries(maxima).copy_(peak.masked_fill(blind, 0).expand({-1, -1, -1, 8}));
      of_queries(sums).copy_(total.expand({-1, -1, -1, 8}));
    }
  };
}

Plan attention_backward(const TrainingAttention& call, const at::Tensor& dy, const AttentionResults& results,
                        const AttentionGradients& gradients) {
  check(call);
  return [=] {
    const Views views(call);
    const at::Tensor gradient = views.view(dy, views.heads), y = views.view(results.out, views.heads);
    const at::Tensor maxima = views.statistics(results.most), sums = views.statistics(results.sum);
    const auto part = [&](const OptionalTensor& x, int64_t heads, int64_t first, int64_t count) -> OptionalTensor {
      if (!x) return std::nullopt;
      return views.view(*x, heads).narrow(2, first, count);
    };
    for (const OptionalTensor& written : {OptionalTensor(gradients.query), OptionalTensor(gradients.key),
                                          OptionalTensor(gradients.value), gradients.query_rope, gradients.key_rope}) {
      if (written) written->zero_();
    }
    for (const Rows& rows : sequences(views.query, views.key, call.ends)) {
      if (rows.num_queries == 0 || rows.num_keys == 0) continue;
      const auto of_queries = [&](const at::Tensor& x) { return x.narrow(2, rows.query, rows.num_queries); };
      const auto of_keys = [&](const at::Tensor& x) { return x.narrow(2, rows.key, rows.num_keys); };
      const auto per_key_head = [&](const at::Tensor& x) {
        return x.unflatten(1, {views.keys, views.heads / views.keys}).sum(2);
      };
      const at::Tensor weights =
          at::exp(views.scores_of(rows) - of_queries(maxima).narrow(-1, 0, 1)) / of_queries(sums).narrow(-1, 0, 1);
      const at::Tensor dout = of_queries(gradient).to(at::kFloat);
      const at::Tensor common = (dout * of_queries(y).to(at::kFloat)).sum(-1, /*keepdim=*/true);
      const at::Tensor dweights = views.dropped(at::matmul(dout, views.value_of(rows).transpose(-1, -2)), rows);
      const at::Tensor slopes = weights * (dweights - common) * call.options.scale;
      write_parts(at::matmul(slopes, views.key_of(rows)), of_queries(views.view(gradients.query, views.heads)),
                  part(gradients.query_rope, views.heads, rows.query, rows.num_queries));
      write_parts(per_key_head(at::matmul(slopes.transpose(-1, -2), views.query_of(rows))),
                  of_keys(views.view(gradients.key, views.keys)),
                  part(gradients.key_rope, views.keys, rows.key, rows.num_keys));
      const at::Tensor kept = views.dropped(weights, rows);
      of_keys(views.view(gradients.value, views.keys)).copy_(per_key_head(at::matmul(kept.transpose(-1, -2), dout)));
    }
  };
}

}  // namespace vllm_npu::emulator::aclnn
