// Ops that permute tokens by expert and back, merge the experts' outputs, and change rows from rank-major to
// expert-major.
//
// Contracts: op-plugin's documents of npu_moe_token_permute, npu_moe_token_unpermute, npu_moe_finalize_routing and
// npu_moe_re_routing. The types of npu_moe_finalize_routing are in CANN 8.5's document of aclnnMoeFinalizeRoutingV2. The
// documents do not say in which type rows are added up, and what happens with an index of no row. For this the source is
// the kernels of moe_token_unpermute and moe_finalize_routing_v2 in CANN's ops-transformer. On Ascend950 both ops run one
// kernel.
#include <utility>
#include <vector>

#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kMaxTopK = 512;
constexpr int64_t kMaxReRoutingWidth = 16384;  // exclusive

int64_t top_k_of(const at::Tensor& indices) { return indices.dim() == 1 ? 1 : indices.size(1); }

at::Tensor inverse_permutation(const at::Tensor& order) {
  at::Tensor inverse = at::empty_like(order);
  inverse.index_copy_(0, order, at::arange(order.numel()));
  return inverse;
}

bool is_a5() { return current_soc().family == Family::kA5; }

// Raises a refusal where an index is in neither [least, most) nor `ignored`.
void require_rows(const at::Tensor& index, int64_t least, int64_t most, const at::Tensor& ignored, const char* name) {
  const at::Tensor bad = (index < least).logical_or(index >= most).logical_and(ignored.logical_not());
  if (bad.any().item<bool>()) {
    refuse(Code::kUnusable, name, " has the value ", index.masked_select(bad)[0].item<int64_t>(), "; it must be in ",
           least, "..", most - 1);
  }
}

// Returns the rows of `source` at `index` in `type`, and zeros where `skipped`.
at::Tensor rows_at(const at::Tensor& source, const at::Tensor& index, const at::Tensor& skipped, at::ScalarType type) {
  if (source.size(0) == 0) return at::zeros({index.size(0), source.size(1)}, type);
  const at::Tensor rows = source.index_select(0, at::where(skipped, 0, index)).to(type);
  return at::where(skipped.unsqueeze(-1), at::zeros({}, type), rows);
}

Plan permute(at::Tensor tokens, at::Tensor indices, int64_t num_out_tokens, bool padded_mode, at::Tensor permuted,
             at::Tensor sorted_indices) {
  require(!padded_mode, "padded_mode=true is not emulated");
  require_dimensions(tokens, "tokens", 2);
  require_dtype(indices, "indices", {at::kInt, at::kLong});
  require(indices.dim() == 1 || indices.dim() == 2, "indices has the shape ", indices.sizes(),
          "; it must be [N] or [N, K]");
  require(indices.size(0) == tokens.size(0), "tokens has ", tokens.size(0), " rows and indices has ", indices.size(0));
  require(top_k_of(indices) <= kMaxTopK, "indices has ", top_k_of(indices), " experts a token; at most ", kMaxTopK);
  require(num_out_tokens == permuted.size(0) && num_out_tokens <= indices.numel(), "num_out_tokens=", num_out_tokens,
          " does not fit: there are ", indices.numel(), " rows and the output has ", permuted.size(0));
  return [=] {
    const at::Tensor order = at::argsort(indices.flatten().to(at::kLong), /*stable=*/true, 0, /*descending=*/false);
    sorted_indices.copy_(inverse_permutation(order));
    permuted.copy_(tokens.index_select(0, order.narrow(0, 0, num_out_tokens).floor_divide(top_k_of(indices))));
  };
}

// Adds in float32 with k ascending, and rounds after the multiply and after the add. An index past the last row is left
// out. A2 and A3 leave out pairs of weight 0 too, and read memory in front of the rows for a negative index of another
// pair. Ascend950 leaves out index -1.
Plan unpermute(at::Tensor permuted, at::Tensor sorted_indices, OptionalTensor probs, bool padded_mode,
               std::vector<int64_t> /*restore_shape: only for padded_mode*/, at::Tensor unpermuted) {
  require(!padded_mode, "padded_mode=true is not emulated");
  require_dimensions(permuted, "permuted_tokens", 2);
  require_dimensions(sorted_indices, "sorted_indices", 1);
  require_dtype(permuted, "permuted_tokens", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dtype(sorted_indices, "sorted_indices", {at::kInt});
  if (probs) {
    require_dimensions(*probs, "probs", 2);
    require_dtype(*probs, "probs", {at::kHalf, at::kBFloat16, at::kFloat});
    require(probs->numel() == sorted_indices.numel(), "probs has the shape ", probs->sizes(),
            " and sorted_indices has ", sorted_indices.numel(), " entries");
  }
  const int64_t top_k = probs ? probs->size(1) : 1;
  require(top_k <= kMaxTopK, "probs has ", top_k, " experts a token; at most ", kMaxTopK);
  return [=] {
    const at::Tensor indices = sorted_indices.to(at::kLong).view({-1, top_k});
    at::Tensor total = at::zeros(unpermuted.sizes(), at::kFloat);
    for (int64_t k = 0; k < top_k; ++k) {
      const at::Tensor index = indices.select(1, k);
      at::Tensor skipped = index >= permuted.size(0);
      if (is_a5()) {
        skipped = skipped.logical_or(index == -1);
      } else if (probs) {
        skipped = skipped.logical_or(probs->select(1, k) == 0);
      }
      require_rows(index, 0, permuted.size(0), skipped, "sorted_indices");
      const at::Tensor rows = rows_at(permuted, index, skipped, at::kFloat);
      const at::Tensor addend = probs ? rows * probs->select(1, k).unsqueeze(-1).to(at::kFloat) : rows;
      total = total + at::where(skipped.unsqueeze(-1), 0.0F, addend);
    }
    unpermuted.copy_(total);
  };
}

// All tensors must have the rows' type. Only with bfloat16 rows, the scales may be float32. On Ascend950 the scales may
// have any of the three types.
void check_finalize_types(const at::Tensor& rows, const OptionalTensor& skip1, const OptionalTensor& skip2,
                          const OptionalTensor& bias, const OptionalTensor& scales) {
  const at::ScalarType type = rows.scalar_type();
  require_dtype(rows, "expanded_permuted_rows", {at::kHalf, at::kBFloat16, at::kFloat});
  if (skip1) require_dtype(*skip1, "skip1", {type});
  if (skip2) require_dtype(*skip2, "skip2", {type});
  if (bias) require_dtype(*bias, "bias", {type});
  if (scales && is_a5()) {
    require_dtype(*scales, "scales", {at::kHalf, at::kBFloat16, at::kFloat});
    return;
  }
  const bool is_mixed = type == at::kBFloat16 && scales && scales->scalar_type() == at::kFloat;
  if (scales && !is_mixed) require_dtype(*scales, "scales", {type});
}

// The document's limits of 310P.
void check_finalize_on_310p(const at::Tensor& rows, const std::vector<std::pair<const char*, OptionalTensor>>& optional,
                            int64_t drop_pad_mode) {
  if (current_soc().family != Family::k310P) return;
  require_dtype(rows, "expanded_permuted_rows on Ascend310P", {at::kHalf, at::kFloat});
  require(drop_pad_mode == 2, "drop_pad_mode=", drop_pad_mode, ": Ascend310P takes 2 only");
  require(rows.size(-1) % 32 == 0, "expanded_permuted_rows has rows of ", rows.size(-1),
          "; Ascend310P takes multiples of 32");
  for (const auto& [name, tensor] : optional) require_absent(tensor, name, "Ascend310P takes none");
}

// Adds with k ascending, and rounds after each multiply and add: float16 rows in float16 on A2 and A3, all others in
// float32. -1 is an index of no row. On A2 and A3 it needs a drop_pad_mode with a capacity: without, the kernel multiplies
// whatever row is in its buffer.
Plan finalize_routing(at::Tensor rows, at::Tensor source_to_row, OptionalTensor skip1, OptionalTensor skip2,
                      OptionalTensor bias, OptionalTensor scales, OptionalTensor expert_of_source,
                      int64_t drop_pad_mode, at::Tensor out) {
  require_one_of(drop_pad_mode, "drop_pad_mode", {0, 1, 2, 3});
  const bool has_capacity = drop_pad_mode == 1 || drop_pad_mode == 3;
  const bool token_major = drop_pad_mode >= 2;
  check_finalize_types(rows, skip1, skip2, bias, scales);
  check_finalize_on_310p(
      rows, {{"skip1", skip1}, {"skip2", skip2}, {"bias", bias}, {"export_for_source_row", expert_of_source}},
      drop_pad_mode);
  require(skip1 || !skip2, "skip2 is given without skip1");
  require_dimensions(rows, "expanded_permuted_rows", has_capacity ? 3 : 2);
  require_dtype(source_to_row, "expanded_src_to_dst_row", {at::kInt});
  const int64_t num_tokens = out.size(0);
  const int64_t top_k = scales ? scales->size(1) : 1;
  require_shape(source_to_row, "expanded_src_to_dst_row", {num_tokens * top_k});
  if (skip1) require_shape(*skip1, "skip1", out.sizes());
  if (skip2) require_shape(*skip2, "skip2", out.sizes());
  if (scales) require_shape(*scales, "scales", {num_tokens, top_k});
  if (bias) {
    if (!expert_of_source) refuse(Code::kMissing, "bias needs export_for_source_row, which is missing");
    require_dimensions(*bias, "bias", 2);
    require_dtype(*expert_of_source, "export_for_source_row", {at::kInt});
    require_shape(*expert_of_source, "export_for_source_row", {num_tokens, top_k});
  }
  return [=] {
    const at::Tensor flat_rows = rows.flatten(0, rows.dim() - 2);
    const at::Tensor index = source_to_row.to(at::kLong).view(token_major ? at::IntArrayRef({num_tokens, top_k})
                                                                          : at::IntArrayRef({top_k, num_tokens}));
    const at::ScalarType type = is_a5() || rows.scalar_type() != at::kHalf ? at::kFloat : at::kHalf;
    const int64_t least = has_capacity || is_a5() ? -1 : 0;
    at::Tensor total = at::zeros(out.sizes(), type);
    if (skip1) total = total + skip1->to(type);
    if (skip2) total = total + skip2->to(type);
    for (int64_t k = 0; k < top_k; ++k) {
      const at::Tensor row = index.select(token_major ? 1 : 0, k);
      const at::Tensor skipped = row == -1;
      require_rows(row, least, flat_rows.size(0), at::zeros_like(skipped), "expanded_src_to_dst_row");
      at::Tensor addend = rows_at(flat_rows, row, skipped, type);
      if (bias) {
        const at::Tensor experts = expert_of_source->select(1, k).to(at::kLong);
        const at::Tensor none = at::zeros_like(skipped);
        require_rows(experts, 0, bias->size(0), none, "export_for_source_row");
        addend = addend + rows_at(*bias, experts, none, type);
      }
      if (scales) addend = addend * scales->select(1, k).unsqueeze(-1).to(type);
      total = total + addend;
    }
    out.copy_(total);
  };
}

// Sorts rows that are ordered by (source rank, expert) by (expert, source rank).
Plan re_routing(at::Tensor tokens, at::Tensor counts, OptionalTensor scales, int64_t counts_type, int64_t index_type,
                at::Tensor out_tokens, OptionalTensor out_scales, at::Tensor source_rows, at::Tensor expert_counts) {
  refuse_on_310p("npu_moe_re_routing");
  require_one_of(counts_type, "expert_token_num_type", {1});
  require_one_of(index_type, "idx_type", {0});
  require_dimensions(tokens, "tokens", 2);
  require_dtype(tokens, "tokens", {at::kHalf, at::kBFloat16, at::kChar});
  require(tokens.size(1) < kMaxReRoutingWidth, "tokens has rows of ", tokens.size(1), "; they must be shorter than ",
          kMaxReRoutingWidth);
  require_dimensions(counts, "expert_token_num_per_rank", 2);
  require_dtype(counts, "expert_token_num_per_rank", {at::kInt, at::kLong});
  if (scales) {
    require_dtype(*scales, "per_token_scales", {at::kFloat});
    require(scales->size(0) == tokens.size(0), "per_token_scales has ", scales->size(0), " rows and tokens has ",
            tokens.size(0));
  }
  return [=] {
    const at::Tensor sizes = counts.to(at::kLong).contiguous();  // [W, L]
    require((sizes >= 0).all().item<bool>(), "expert_token_num_per_rank has a negative count");
    const int64_t total = sizes.sum().item<int64_t>();
    require(total <= tokens.size(0), "expert_token_num_per_rank adds up to ", total, " and tokens has ", tokens.size(0),
            " rows");
    const at::Tensor starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(sizes.sizes());
    std::vector<at::Tensor> ranges;
    for (int64_t expert = 0; expert < sizes.size(1); ++expert) {
      for (int64_t rank = 0; rank < sizes.size(0); ++rank) {
        const int64_t start = starts[rank][expert].item<int64_t>();
        ranges.push_back(at::arange(start, start + sizes[rank][expert].item<int64_t>()));
      }
    }
    const at::Tensor order = at::cat(ranges);
    write_front(source_rows, order);
    write_front(out_tokens, tokens.index_select(0, order));
    if (out_scales && scales) write_front(*out_scales, scales->index_select(0, order));
    if (out_scales && !scales) fill_undefined(*out_scales);
    expert_counts.copy_(sizes.sum(0));
  };
}

}  // namespace

ACLNN_OP(aclnnMoeTokenPermute, permute);
ACLNN_OP(aclnnMoeTokenUnpermute, unpermute);
ACLNN_OP(aclnnMoeFinalizeRoutingV2, finalize_routing);
ACLNN_OP(aclnnMoeReRouting, re_routing);

}  // namespace vllm_npu::emulator::aclnn
