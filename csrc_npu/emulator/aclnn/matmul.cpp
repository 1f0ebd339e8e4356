// Matrix products of linear layers: int8 with scales, and the batched product of latent attention.
//
// Contracts: op-plugin's documents of npu_quant_matmul and npu_transpose_batchmatmul.
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

// For some arguments that are not given, torch_npu passes a tensor without elements.
void require_none(const OptionalTensor& tensor, const char* name, const char* reason) {
  if (tensor && tensor->numel() > 0) require_absent(tensor, name, reason);
}

Plan quant_matmul(at::Tensor x1, at::Tensor x2, OptionalTensor row_scale, OptionalTensor scale, OptionalTensor y_scale,
                  OptionalTensor x1_offset, OptionalTensor x2_offset, OptionalTensor y_offset, OptionalTensor bias,
                  bool transpose_x1, bool transpose_x2, int64_t group_size, at::Tensor out) {
  require_none(y_scale, "y_scale", "quantised outputs are not emulated");
  require_none(x1_offset, "x1_offset", "it is not emulated");
  require_none(x2_offset, "offset", "it is not emulated");
  require_none(y_offset, "y_offset", "it is not emulated");
  require(!transpose_x1 && !transpose_x2, "transposeX1 and transposeX2 are not emulated");
  require_one_of(group_size, "group_sizes", {0});
  require_dtype(x1, "x1", {at::kChar});
  require_dtype(x2, "x2", {at::kChar});
  require(x1.dim() >= 2 && x2.dim() == 2 && x1.size(-1) == x2.size(0), "x1 has the shape ", x1.sizes(), " and x2 ",
          x2.sizes(), "; [..., K] times [K, N] is emulated");
  const int64_t width = x2.size(1), rows = x1.numel() / x1.size(-1);
  if (out.scalar_type() == at::kInt) {
    require_none(row_scale, "pertoken_scale", "the output is int32");
  } else {
    require_dtype(out, "output_dtype", {at::kHalf, at::kBFloat16});
  }
  if (!scale) refuse(Code::kMissing, "scale is missing");
  require_dtype(*scale, "scale", {at::kFloat, at::kBFloat16});
  require(scale->numel() == width || scale->numel() == 1, "scale has the shape ", scale->sizes(), " and x2 ", width,
          " columns");
  if (row_scale) {
    require_dtype(*row_scale, "pertoken_scale", {at::kFloat});
    require_shape(*row_scale, "pertoken_scale", {rows});
  }
  if (bias) {
    require_dtype(*bias, "bias", {at::kInt, at::kFloat, at::kBFloat16, at::kHalf});
    require_shape(*bias, "bias", {width});
  }
  return [=] {
    at::Tensor sums = at::matmul(x1.reshape({rows, -1}).to(at::kInt), x2.to(at::kInt));
    if (bias && bias->scalar_type() == at::kInt) sums = sums + *bias;
    if (out.scalar_type() == at::kInt) {
      out.copy_(sums.view(out.sizes()));
      return;
    }
    at::Tensor result = sums.to(at::kFloat) * scale->to(at::kFloat).flatten();
    if (row_scale) result = result * row_scale->unsqueeze(-1);
    if (bias && bias->scalar_type() != at::kInt) result = result + bias->to(at::kFloat);
    out.copy_(result.view(out.sizes()));
  };
}

Plan transpose_batch_matmul(at::Tensor x1, at::Tensor x2, OptionalTensor bias, OptionalTensor scale,
                            std::vector<int64_t> permute_x1, std::vector<int64_t> permute_x2,
                            std::vector<int64_t> permute_y, int8_t /*cube_math_type: how the device rounds*/,
                            int32_t batch_split_factor, at::Tensor out) {
  refuse_on_310p("npu_transpose_batchmatmul");
  require_none(bias, "bias", "it is not emulated");
  require_none(scale, "scale", "quantised outputs are not emulated");
  require_one_of(batch_split_factor, "batch_split_factor", {1});
  require_dimensions(x1, "input", 3);
  require_dimensions(x2, "weight", 3);
  require_dtype(x1, "input", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dtype(x2, "weight", {x1.scalar_type()});
  require(permute_x1.size() == 3 && permute_x2.size() == 3 && permute_y.size() == 3,
          "perm_x1, perm_x2 and perm_y must have 3 values each");
  const at::Tensor left = x1.permute(permute_x1), right = x2.permute(permute_x2);
  require(left.size(0) == right.size(0) && left.size(2) == right.size(1), "input has the shape ", x1.sizes(),
          " and weight ", x2.sizes(), ", after their permutations ", left.sizes(), " and ", right.sizes());
  return [=] { out.copy_(at::matmul(left.to(at::kFloat), right.to(at::kFloat)).permute(permute_y)); };
}

}  // namespace

ACLNN_OP(aclnnQuantMatmulV5, quant_matmul);
ACLNN_OP(aclnnTransposeBatchMatMul, transpose_batch_matmul);

}  // namespace vllm_npu::emulator::aclnn
