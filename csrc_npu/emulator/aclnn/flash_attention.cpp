// Attention of training, npu_fusion_attention, and its gradient.
//
// Contract: op-plugin's document of npu_fusion_attention, and its call of the aclnn functions. Both are computed in
// float32, rounded once. A query that sees no key gets zeros.
#include <limits>

#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kCompressedMask = 2048;  // rows and columns of the mask that the causal modes take
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the functions take and the emulator does not.
struct Absent {
  OptionalTensor pse, drop_mask, padding_mask;

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;
};

struct Prefix {
  std::vector<int64_t> lengths;

  using Fields = std::tuple<std::vector<int64_t>>;
};

struct Options {
  double scale, keep_prob;
  int64_t pre_tokens, next_tokens, heads;
  std::string layout;
  int64_t inner_precise, sparse_mode;

  using Fields = std::tuple<double, double, int64_t, int64_t, int64_t, std::string, int64_t, int64_t>;
};

struct Lengths {  // cumulative, of each sequence; in the layout TND only
  std::vector<int64_t> query, key;

  using Fields = std::tuple<std::vector<int64_t>, std::vector<int64_t>>;
};

// Returns a view [B, N, S, D]; of TND, [1, N, T, D].
at::Tensor heads_first(const at::Tensor& x, const std::string& layout, int64_t heads) {
  if (layout == "BNSD") return x;
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "TND") return x.transpose(0, 1).unsqueeze(0);
  if (layout == "BSH") return x.unflatten(-1, {heads, x.size(-1) / heads}).transpose(1, 2);
  require(layout == "SBH", "input_layout=", layout, " is none of BSH, SBH, BNSD, BSND and TND");
  return x.unflatten(-1, {heads, x.size(-1) / heads}).permute({1, 2, 0, 3});
}

int64_t kv_heads(const at::Tensor& query, const at::Tensor& key, const Options& options) {
  if (options.layout == "BNSD" || options.layout == "TND") return key.size(1);
  if (options.layout == "BSND") return key.size(2);
  return key.size(-1) * options.heads / query.size(-1);
}

struct Rows {  // a sequence's place in the dimension S
  int64_t query, num_queries, key, num_keys;
};

// One entry without lengths: all sequences have the same. Zeros at the end of the lengths are sequences that take no
// part.
std::vector<Rows> sequences(const at::Tensor& query, const at::Tensor& key, const Lengths& lengths) {
  if (lengths.query.empty()) return {{0, query.size(2), 0, key.size(2)}};
  std::vector<Rows> all;
  int64_t queries = 0, keys = 0;
  for (size_t i = 0; i < lengths.query.size() && !(i > 0 && lengths.query[i] == 0); ++i) {
    all.push_back({queries, lengths.query[i] - queries, keys, lengths.key[i] - keys});
    require(all.back().num_queries >= 0 && all.back().num_keys >= 0, "actual_seq_qlen or actual_seq_kvlen decreases");
    queries = lengths.query[i];
    keys = lengths.key[i];
  }
  require(queries <= query.size(2) && keys <= key.size(2), "actual_seq_qlen ends at ", queries, " of ", query.size(2),
          " tokens and actual_seq_kvlen at ", keys, " of ", key.size(2));
  return all;
}

// True where a query does not see a key, [.., queries, keys]. Without a mask, every query sees all keys.
OptionalTensor hidden_pairs(const OptionalTensor& mask, const Options& options, const Rows& rows) {
  if (!mask) return std::nullopt;
  const at::Tensor query = at::arange(rows.num_queries).unsqueeze(1), key = at::arange(rows.num_keys).unsqueeze(0);
  const int64_t aligned_right = rows.num_keys - rows.num_queries;
  switch (options.sparse_mode) {
    case 0: {
      const at::Tensor given = mask->slice(-2, 0, rows.num_queries).slice(-1, 0, rows.num_keys).to(at::kBool);
      const at::Tensor outside = (key > query + options.next_tokens).logical_or(key < query - options.pre_tokens);
      require(!outside.logical_and(given.logical_not()).any().item<bool>(), "atten_mask shows pairs that pre_tockens=",
              options.pre_tokens, " and next_tockens=", options.next_tokens, " hide; the document forbids it");
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

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Absent& absent,
           const OptionalTensor& mask, const Prefix& prefix, const Lengths& lengths, const Options& options) {
  refuse_on_310p("npu_fusion_attention");
  require_absent(absent.pse, "pse", "it is not emulated");
  require_absent(absent.drop_mask, "drop_mask", "dropout is not emulated");
  require_absent(absent.padding_mask, "padding_mask", "op-plugin's document says that it is not supported");
  require(options.keep_prob == 1, "keep_prob=", options.keep_prob, " is not emulated; use 1");
  require(prefix.lengths.empty(), "prefix is not emulated");
  require_dtype(query, "query", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dtype(key, "key", {query.scalar_type()});
  require_dtype(value, "value", {query.scalar_type()});
  require_one_of(options.sparse_mode, "sparse_mode", {0, 1, 2, 3, 4});
  require(lengths.query.empty() == (options.layout != "TND"), "actual_seq_qlen goes with the input_layout TND only");
  require(lengths.query.size() == lengths.key.size(), "actual_seq_qlen and actual_seq_kvlen have different lengths");
  const int64_t keys = kv_heads(query, key, options);
  require(keys > 0 && options.heads % keys == 0, "head_num=", options.heads, " is no multiple of the ", keys,
          " heads of key");
  if (!mask) return;
  require_dtype(*mask, "atten_mask", {at::kBool, at::kByte});
  if (options.sparse_mode >= 2) {
    require_shape(*mask, "atten_mask of a compressed mode", {kCompressedMask, kCompressedMask});
  } else {
    require(mask->dim() == 4 || mask->dim() == 2, "atten_mask has the shape ", mask->sizes(), "; it must be [B, N, S, S], "
            "[B, 1, S, S], [1, 1, S, S] or [S, S]");
  }
}

// The views of a call with heads first; key and value once for each head of query.
struct Inputs {
  at::Tensor query, key, value;  // float32
};

Inputs of_sequence(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Rows& rows) {
  const int64_t group = query.size(1) / key.size(1);
  const auto spread = [&](const at::Tensor& x) {
    return x.narrow(2, rows.key, rows.num_keys).to(at::kFloat).repeat_interleave(group, 1);
  };
  return {query.narrow(2, rows.query, rows.num_queries).to(at::kFloat), spread(key), spread(value)};
}

at::Tensor scores_of(const Inputs& inputs, double scale, const OptionalTensor& hidden) {
  const at::Tensor scores = at::matmul(inputs.query, inputs.key.transpose(-1, -2)) * scale;
  return hidden ? scores.masked_fill(*hidden, -kInfinity) : scores;
}

// A view [B, N, S, 8] of the statistics; of TND, [1, N, T, 8]: their memory has the heads first.
at::Tensor statistics(const at::Tensor& values, const std::string& layout) {
  return layout == "TND" ? values.view({1, values.size(1), values.size(0), values.size(2)}) : values;
}

Plan forward(at::Tensor query, at::Tensor key, at::Tensor value, Absent absent, OptionalTensor mask, Prefix prefix,
             Lengths lengths, Options options, at::Tensor most, at::Tensor sum, at::Tensor /*reserved*/,
             at::Tensor out) {
  check(query, key, value, absent, mask, prefix, lengths, options);
  return [=] {
    const int64_t keys = kv_heads(query, key, options);
    const at::Tensor q = heads_first(query, options.layout, options.heads);
    const at::Tensor k = heads_first(key, options.layout, keys), v = heads_first(value, options.layout, keys);
    const at::Tensor y = heads_first(out, options.layout, options.heads);
    const at::Tensor maxima = statistics(most, options.layout), sums = statistics(sum, options.layout);
    for (const at::Tensor& written : {y, maxima, sums}) {
      if (!lengths.query.empty()) fill_undefined(written);  // sequences may leave rows at the end
    }
    for (const Rows& rows : sequences(q, k, lengths)) {
      if (rows.num_queries == 0) continue;
      const Inputs inputs = of_sequence(q, k, v, rows);
      const at::Tensor scores = scores_of(inputs, options.scale, hidden_pairs(mask, options, rows));
      const at::Tensor peak = rows.num_keys == 0 ? at::full({q.size(0), q.size(1), rows.num_queries, 1}, -kInfinity)
                                                 : scores.amax(-1, /*keepdim=*/true);
      const at::Tensor blind = at::isneginf(peak);
      const at::Tensor weights = at::exp(scores - peak.masked_fill(blind, 0));
      const at::Tensor total = weights.sum(-1, /*keepdim=*/true).masked_fill(blind, kInfinity);
      y.narrow(2, rows.query, rows.num_queries).copy_(at::matmul(weights / total, inputs.value));
      maxima.narrow(2, rows.query, rows.num_queries).copy_(peak.masked_fill(blind, 0).expand({-1, -1, -1, 8}));
      sums.narrow(2, rows.query, rows.num_queries).copy_(total.expand({-1, -1, -1, 8}));
    }
  };
}

Plan backward(at::Tensor query, at::Tensor key, at::Tensor value, at::Tensor dy, Absent absent, OptionalTensor mask,
              at::Tensor most, at::Tensor sum, OptionalTensor /*reserved*/, at::Tensor out, Prefix prefix,
              Lengths lengths, Options options, at::Tensor dq, at::Tensor dk, at::Tensor dv, at::Tensor /*dpse*/) {
  check(query, key, value, absent, mask, prefix, lengths, options);
  return [=] {
    const int64_t keys = kv_heads(query, key, options), group = options.heads / keys;
    const auto view = [&](const at::Tensor& x, int64_t heads) { return heads_first(x, options.layout, heads); };
    const at::Tensor q = view(query, options.heads), k = view(key, keys), v = view(value, keys);
    const at::Tensor gradient = view(dy, options.heads), y = view(out, options.heads);
    const at::Tensor maxima = statistics(most, options.layout), sums = statistics(sum, options.layout);
    for (const at::Tensor& written : {dq, dk, dv}) written.zero_();
    for (const Rows& rows : sequences(q, k, lengths)) {
      if (rows.num_queries == 0 || rows.num_keys == 0) continue;
      const auto of_queries = [&](const at::Tensor& x) { return x.narrow(2, rows.query, rows.num_queries); };
      const Inputs inputs = of_sequence(q, k, v, rows);
      const at::Tensor scores = scores_of(inputs, options.scale, hidden_pairs(mask, options, rows));
      const at::Tensor weights =
          at::exp(scores - of_queries(maxima).narrow(-1, 0, 1)) / of_queries(sums).narrow(-1, 0, 1);
      const at::Tensor dout = of_queries(gradient).to(at::kFloat);
      const at::Tensor common = (dout * of_queries(y).to(at::kFloat)).sum(-1, /*keepdim=*/true);
      const at::Tensor slopes =
          weights * (at::matmul(dout, inputs.value.transpose(-1, -2)) - common) * options.scale;
      const auto per_key_head = [&](const at::Tensor& x) { return x.unflatten(1, {keys, group}).sum(2); };
      of_queries(view(dq, options.heads)).copy_(at::matmul(slopes, inputs.key));
      view(dk, keys)
          .narrow(2, rows.key, rows.num_keys)
          .copy_(per_key_head(at::matmul(slopes.transpose(-1, -2), inputs.query)));
      view(dv, keys).narrow(2, rows.key, rows.num_keys).copy_(per_key_head(at::matmul(weights.transpose(-1, -2), dout)));
    }
  };
}

Plan padded_forward(at::Tensor query, at::Tensor key, at::Tensor value, Absent absent, OptionalTensor mask,
                    Prefix prefix, Options options, at::Tensor most, at::Tensor sum, at::Tensor reserved,
                    at::Tensor out) {
  return forward(query, key, value, absent, mask, prefix, {}, options, most, sum, reserved, out);
}

Plan padded_backward(at::Tensor query, at::Tensor key, at::Tensor value, at::Tensor dy, Absent absent,
                     OptionalTensor mask, at::Tensor most, at::Tensor sum, OptionalTensor reserved, at::Tensor out,
                     Prefix prefix, Options options, at::Tensor dq, at::Tensor dk, at::Tensor dv, at::Tensor dpse) {
  return backward(query, key, value, dy, absent, mask, most, sum, reserved, out, prefix, {}, options, dq, dk, dv, dpse);
}

}  // namespace

ACLNN_OP(aclnnFlashAttentionScore, padded_forward);
ACLNN_OP(aclnnFlashAttentionVarLenScore, forward);
ACLNN_OP(aclnnFlashAttentionScoreGrad, padded_backward);
ACLNN_OP(aclnnFlashAttentionUnpaddingScoreGrad, backward);

}  // namespace vllm_npu::emulator::aclnn
