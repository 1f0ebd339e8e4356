// Root-mean-square norms and rotary position embeddings.
//
// Contracts: op-plugin's documents of npu_rms_norm, npu_add_rms_norm, npu_gemma_rms_norm, npu_rotary_mul,
// npu_apply_rotary_pos_emb, npu_interleave_rope and npu_kv_rmsnorm_rope_cache. The ops compute in float32 and round
// once.
#include "norm.h"

#include "op.h"
#include "rotary.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {

Normed rms_normed(const at::Tensor& x, const at::Tensor& gamma, double epsilon, double more) {
  const at::Tensor values = x.to(at::kFloat);
  std::vector<int64_t> normed;
  for (int64_t dim = x.dim() - gamma.dim(); dim < x.dim(); ++dim) normed.push_back(dim);
  const at::Tensor rstd = at::rsqrt(values.square().mean(normed, /*keepdim=*/true) + epsilon);
  return {values * rstd * (gamma.to(at::kFloat) + more), rstd};
}

void require_norm(const at::Tensor& x, const at::Tensor& gamma) {
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dtype(gamma, "gamma", {x.scalar_type(), at::kFloat});
  require(gamma.dim() <= x.dim() && x.sizes().slice(x.dim() - gamma.dim()) == gamma.sizes(), "x has the shape ",
          x.sizes(), " and gamma ", gamma.sizes(), "; gamma's dimensions must be x's last");
}

void require_added_norm(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma) {
  require_norm(x1, gamma);
  require_dtype(x2, "x2", {x1.scalar_type()});
  require_shape(x2, "x2", x1.sizes());
}

namespace {

constexpr int64_t kHalves = 0;       // rotary mode: pairs of an element of the first half and one of the second
constexpr int64_t kInterleaved = 1;  // rotary mode: pairs of neighbours

void check_norm(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& rstd) {
  require_norm(x, gamma);
  require_dtype(rstd, "rstd", {at::kFloat});
}

Plan rms_norm(at::Tensor x, at::Tensor gamma, double epsilon, at::Tensor y, at::Tensor rstd) {
  check_norm(x, gamma, rstd);
  return [=] {
    const Normed normed = rms_normed(x, gamma, epsilon);
    y.copy_(normed.values);
    rstd.copy_(normed.rstd.view(rstd.sizes()));
  };
}

Plan gemma_rms_norm(at::Tensor x, at::Tensor gamma, double epsilon, at::Tensor y, at::Tensor rstd) {
  refuse_on_310p("npu_gemma_rms_norm");
  check_norm(x, gamma, rstd);
  return [=] {
    const Normed normed = rms_normed(x, gamma, epsilon, 1);
    y.copy_(normed.values);
    rstd.copy_(normed.rstd.view(rstd.sizes()));
  };
}

Plan add_rms_norm(at::Tensor x1, at::Tensor x2, at::Tensor gamma, double epsilon, at::Tensor y, at::Tensor rstd,
                  at::Tensor sum) {
  require_added_norm(x1, x2, gamma);
  require_dtype(rstd, "rstd", {at::kFloat});
  return [=] {
    const at::Tensor added = x1.to(at::kFloat) + x2.to(at::kFloat);
    const Normed normed = rms_normed(added, gamma, epsilon);
    y.copy_(normed.values);
    rstd.copy_(normed.rstd.view(rstd.sizes()));
    sum.copy_(added);
  };
}

// Writes the norm to x1 and the sum to x2.
Plan inplace_add_rms_norm(at::Tensor x1, at::Tensor x2, at::Tensor gamma, double epsilon, at::Tensor rstd) {
  return add_rms_norm(x1, x2, gamma, epsilon, x1, rstd, x2);
}

// Rotates as DeepSeek's models do. Moves the first elements of the pairs of neighbours to the first half and the second
// ones to the second half, then rotates halves.
at::Tensor interleave_rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor apart = x.to(at::kFloat).unflatten(-1, {x.size(-1) / 2, 2}).transpose(-1, -2).flatten(-2);
  return apart * cos.to(at::kFloat) + turned_halves(apart) * sin.to(at::kFloat);
}

Plan rotary_position_embedding(at::Tensor x, at::Tensor cos, at::Tensor sin, int64_t mode, at::Tensor out) {
  require_dtype(x, "self", {at::kHalf, at::kBFloat16, at::kFloat});
  require_one_of(mode, "rotary_mode", {kHalves, kInterleaved});
  require(x.size(-1) % 2 == 0 && cos.size(-1) == x.size(-1), "self has the shape ", x.sizes(), " and r1 ", cos.sizes());
  require_shape(sin, "r2", cos.sizes());
  return [=] {
    const at::Tensor values = x.to(at::kFloat);
    const at::Tensor turned = mode == kHalves ? turned_halves(values) : turned_neighbours(values);
    out.copy_(values * cos.to(at::kFloat) + turned * sin.to(at::kFloat));
  };
}

// Rotates query and key in place. cos and sin have one head, so they fit every layout.
Plan apply_rotary_pos_emb(at::Tensor query, at::Tensor key, at::Tensor cos, at::Tensor sin, int64_t layout,
                          std::string mode) {
  require_one_of(layout, "layout", {1, 2, 3, 4});
  require(mode == "half" || mode == "interleave", "rotary_mode=", mode, " is not emulated; use half or interleave");
  require_shape(sin, "sin", cos.sizes());
  for (const auto& [x, name] : {std::pair(query, "query"), std::pair(key, "key")}) {
    require_dtype(x, name, {at::kHalf, at::kBFloat16, at::kFloat});
    require(x.size(-1) % 2 == 0 && x.size(-1) == cos.size(-1), name, " has the shape ", x.sizes(), " and cos ",
            cos.sizes());
  }
  return [=] {
    for (const at::Tensor& x : {query, key}) {
      const at::Tensor values = x.to(at::kFloat);
      const at::Tensor turned = mode == "half" ? turned_halves(values) : turned_neighbours(values);
      x.copy_(values * cos.to(at::kFloat) + turned * sin.to(at::kFloat));
    }
  };
}

Plan apply_rotary_pos_emb_of_halves(at::Tensor query, at::Tensor key, at::Tensor cos, at::Tensor sin, int64_t layout) {
  return apply_rotary_pos_emb(query, key, cos, sin, layout, "half");
}

Plan interleave_rope(at::Tensor x, at::Tensor cos, at::Tensor sin, at::Tensor out) {
  refuse_on_310p("npu_interleave_rope");
  require_dimensions(x, "x", 4);
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  require(x.size(-1) % 2 == 0 && cos.size(-1) == x.size(-1), "x has the shape ", x.sizes(), " and cos ", cos.sizes());
  require_shape(sin, "sin", cos.sizes());
  return [=] { out.copy_(interleave_rotated(x, cos, sin)); };
}

struct CacheQuantisation {
  OptionalTensor k_rope_scale, c_kv_scale, k_rope_offset, c_kv_offset;

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

// kv is [B, 1, 1, latent + rope]. Normalises the latent part and writes it to ckv_cache. Rotates the rest and writes it
// to k_cache. `index` has the slots in both caches.
Plan kv_rms_norm_rope_cache(at::Tensor kv, at::Tensor gamma, at::Tensor cos, at::Tensor sin, at::Tensor index,
                            at::Tensor k_cache, at::Tensor ckv_cache, CacheQuantisation quantisation, double epsilon,
                            std::string cache_mode, bool wants_outputs, at::Tensor k_rope, at::Tensor c_kv) {
  refuse_on_310p("npu_kv_rmsnorm_rope_cache");
  const char* reason = "quantised caches are not emulated";
  require_absent(quantisation.k_rope_scale, "k_rope_scale", reason);
  require_absent(quantisation.c_kv_scale, "c_kv_scale", reason);
  require_absent(quantisation.k_rope_offset, "k_rope_offset", reason);
  require_absent(quantisation.c_kv_offset, "c_kv_offset", reason);
  require(cache_mode == "PA" || cache_mode == "PA_BNSD", "cache_mode=", cache_mode,
          " is not emulated; use PA or PA_BNSD");
  require_dtype(kv, "kv", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dimensions(kv, "kv", 4);
  require(kv.size(1) == 1 && kv.size(2) == 1, "kv has the shape ", kv.sizes(),
          "; one head and one token a row are emulated");
  const int64_t latent = gamma.size(0), rope = cos.size(-1);
  require(kv.size(3) == latent + rope, "kv has the shape ", kv.sizes(), ", gamma ", gamma.sizes(), " and cos ",
          cos.sizes());
  require_shape(sin, "sin", cos.sizes());
  require_dtype(index, "index", {at::kLong});
  require(index.numel() == kv.size(0), "index has ", index.numel(), " slots and kv ", kv.size(0), " rows");
  for (const auto& [cache, name, width] :
       {std::tuple(k_cache, "k_cache", rope), std::tuple(ckv_cache, "ckv_cache", latent)}) {
    require_dimensions(cache, name, 4);
    require(cache.size(2) == 1 && cache.size(3) == width, name, " has the shape ", cache.sizes(),
            "; it must be [blocks, block_size, 1, ", width, "]");
    require_dtype(cache, name, {kv.scalar_type()});
  }
  return [=] {
    const at::Tensor rows = kv.flatten(0, 2);
    const at::Tensor normed = rms_normed(rows.narrow(1, 0, latent), gamma, epsilon).values.to(kv.scalar_type());
    const at::Tensor rotated =
        interleave_rotated(rows.narrow(1, latent, rope), cos.reshape({-1, rope}), sin.reshape({-1, rope}))
            .to(kv.scalar_type());
    const at::Tensor slots = index.flatten();
    const at::Tensor kept = slots >= 0;  // -1: not cached
    require((slots < k_cache.size(0) * k_cache.size(1)).all().item<bool>(), "index names a slot outside of the cache");
    const at::Tensor where = slots.masked_select(kept);
    k_cache.flatten(0, 2).index_copy_(0, where, rotated.index({kept}));
    ckv_cache.flatten(0, 2).index_copy_(0, where, normed.index({kept}));
    if (!wants_outputs) {
      fill_undefined(k_rope);
      fill_undefined(c_kv);
      return;
    }
    k_rope.copy_(rotated.view(k_rope.sizes()));
    c_kv.copy_(normed.view(c_kv.sizes()));
  };
}

}  // namespace

ACLNN_OP(aclnnRmsNorm, rms_norm);
ACLNN_OP(aclnnAddRmsNorm, add_rms_norm);
ACLNN_OP(aclnnInplaceAddRmsNorm, inplace_add_rms_norm);
ACLNN_OP(aclnnGemmaRmsNorm, gemma_rms_norm);
ACLNN_OP(aclnnRotaryPositionEmbedding, rotary_position_embedding);
ACLNN_OP(aclnnApplyRotaryPosEmb, apply_rotary_pos_emb_of_halves);
ACLNN_OP(aclnnApplyRotaryPosEmbV2, apply_rotary_pos_emb);
ACLNN_OP(aclnnInterleaveRope, interleave_rope);
ACLNN_OP(aclnnKvRmsNormRopeCache, kv_rms_norm_rope_cache);

}  // namespace vllm_npu::emulator::aclnn
