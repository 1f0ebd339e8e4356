// Ops that torch_npu's C++ code calls directly and not through the dispatcher, and activations.
//
// Contracts: op-plugin's documents of npu_swiglu and npu_gelu_mul, and its schema of npu_gelu.
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

Plan copy(at::Tensor self, at::Tensor source) {
  return [=] { self.copy_(source); };
}

Plan zero(at::Tensor self) {
  return [=] {
    if (self.is_contiguous()) {
      zero_memory(self.data_ptr(), self.nbytes());
    } else {
      self.zero_();
    }
  };
}

Plan fill(at::Tensor self, at::Scalar value) {
  return [=] { self.fill_(value); };
}

Plan cast(at::Tensor self, int32_t acl_type, at::Tensor out) {
  require(scalar_type(acl_type) == out.scalar_type(), "dtype ", acl_type, " is not that of the output, ",
          out.scalar_type());
  return [=] { out.copy_(self); };
}

Plan concatenate(std::vector<at::Tensor> tensors, int64_t dim, at::Tensor out) {
  return [=] { out.copy_(at::cat(tensors, dim)); };
}

Plan constant_pad(at::Tensor self, std::vector<int64_t> padding, at::Scalar value, at::Tensor out) {
  return [=] { out.copy_(at::constant_pad_nd(self, padding, value)); };
}

// silu(first half) * second half, in float32.
Plan swiglu(at::Tensor x, int64_t dim, at::Tensor out) {
  require_dtype(x, "self", {at::kHalf, at::kBFloat16, at::kFloat});
  require(dim >= -x.dim() && dim < x.dim(), "dim=", dim, " is not a dimension of ", x.sizes());
  require(x.size(dim) % 2 == 0, "dimension ", dim, " of ", x.sizes(), " is not even");
  return [=] {
    const std::vector<at::Tensor> halves = x.to(at::kFloat).chunk(2, dim);
    out.copy_(at::silu(halves[0]) * halves[1]);
  };
}

Plan gelu(at::Tensor x, int64_t approximate, at::Tensor out) {
  require_dtype(x, "self", {at::kHalf, at::kBFloat16, at::kFloat});
  require_one_of(approximate, "approximate", {0, 1});
  return [=] { out.copy_(at::gelu(x.to(at::kFloat), approximate == 0 ? "none" : "tanh")); };
}

// gelu(first half) * second half, in float32.
Plan gelu_mul(at::Tensor x, std::string approximate, at::Tensor out) {
  require_dtype(x, "input", {at::kHalf, at::kBFloat16, at::kFloat});
  require(approximate == "none" || approximate == "tanh", "approximate=", approximate, " is neither none nor tanh");
  require(x.size(-1) % 2 == 0, "the last dimension of ", x.sizes(), " is not even");
  return [=] {
    const std::vector<at::Tensor> halves = x.to(at::kFloat).chunk(2, -1);
    out.copy_(at::gelu(halves[0], approximate) * halves[1]);
  };
}

}  // namespace

ACLNN_OP(aclnnInplaceCopy, copy);
ACLNN_OP(aclnnInplaceZero, zero);
ACLNN_OP(aclnnInplaceFillScalar, fill);
ACLNN_OP(aclnnCast, cast);
ACLNN_OP(aclnnCat, concatenate);
ACLNN_OP(aclnnConstantPadNd, constant_pad);
ACLNN_OP(aclnnSwiGlu, swiglu);
ACLNN_OP(aclnnGeluV2, gelu);
ACLNN_OP(aclnnGeluMul, gelu_mul);

}  // namespace vllm_npu::emulator::aclnn
