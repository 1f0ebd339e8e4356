// Matrix products of linear layers: int8 and int4 with scales, 16-bit rows with int8 or int4 weights, and the batched product of
// latent attention.
//
// Contracts: op-plugin's documents of npu_quant_matmul, npu_weight_quant_batchmatmul and npu_transpose_batchmatmul; CANN's of
// aclnnQuantMatmulV5 and aclnnWeightQuantBatchMatmulV2 and V3. They do not say where 16-bit types are rounded. Here, weights
// become float32, are rounded once to the rows' type, and are multiplied in float32.
#include "int4.h"
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

// For some arguments that are not given, torch_npu passes a tensor without elements.
void require_none(const OptionalTensor& tensor, const char* name, const char* reason) {
  if (tensor && tensor->numel() > 0) require_absent(tensor, name, reason);
}

// int8 rows [..., K] with int4 weights [K, N], whose scales, packed, are [G, N]:
// ((x1 @ (x2 * scale)) + y_offset) * row_scale. y_offset is what the int4 halves of the rows lack.
Plan int8_by_int4(const at::Tensor& x1, const at::Tensor& x2, const OptionalTensor& row_scale,
                  const OptionalTensor& scale, const OptionalTensor& y_offset, const OptionalTensor& bias,
                  int64_t group_size, const at::Tensor& out) {
  require_none(bias, "bias", "int8 rows with int4 weights take none");
  require_dtype(out, "output_dtype", {at::kHalf, at::kBFloat16});
  if (!scale || !row_scale || !y_offset) {
    refuse(Code::kMissing, "int8 rows with int4 weights need scale, pertoken_scale and offset");
  }
  if (!is_packed_scale(*scale)) refuse(Code::kInvalid, "scale is ", scale->scalar_type(), "; it must be int64");
  const int64_t inner = x1.size(-1), rows = x1.numel() / inner, width = out.size(-1);
  require(x2.dim() == 2 && !is_transposed(x2) && x2.size(0) == inner, "x1 has the shape ", x1.sizes(), " and x2 ",
          x2.sizes(), "; [..., K] times [K, N / 8] is emulated");
  require_weight_scale(*scale, "scale", inner, width, group_size);
  require_dtype(*row_scale, "pertoken_scale", {at::kFloat});
  require(row_scale->numel() == rows, "pertoken_scale has the shape ", row_scale->sizes(), " and x1 ", rows, " rows");
  require_dtype(*y_offset, "offset", {at::kFloat});
  require_shape(*y_offset, "offset", {width});
  return [=] {
    const at::Tensor weight = dequantised(unpack_int4(x2), unpack_scale(*scale), std::nullopt, group_size, at::kFloat);
    const at::Tensor sums = at::matmul(x1.reshape({rows, -1}).to(at::kFloat), weight) + *y_offset;
    out.copy_((sums * row_scale->reshape({-1, 1})).view(out.sizes()));
  };
}

Plan quant_matmul(at::Tensor x1, at::Tensor x2, OptionalTensor row_scale, OptionalTensor scale, OptionalTensor y_scale,
                  OptionalTensor x1_offset, OptionalTensor x2_offset, OptionalTensor y_offset, OptionalTensor bias,
                  bool transpose_x1, bool transpose_x2, int64_t group_size, at::Tensor out) {
  require_none(y_scale, "y_scale", "it is not emulated");
  require_none(x1_offset, "x1_offset", "it is not emulated");
  require(!transpose_x1 && !transpose_x2, "transposeX1 and transposeX2 are not emulated");
  require_dtype(x1, "x1", {at::kChar, at::kInt});
  require_dtype(x2, "x2", {at::kChar, at::kInt});
  if (x1.scalar_type() == at::kChar && x2.scalar_type() == at::kInt) {
    require_none(x2_offset, "x2Offset", "int8 rows with int4 weights take yOffset");
    return int8_by_int4(x1, x2, row_scale, scale, y_offset, bias, group_size, out);
  }
  if (x1.scalar_type() != x2.scalar_type()) refuse(Code::kInvalid, "x1 is int32 and x2 int8; no chip has this product");
  require_none(y_offset, "y_offset", "only int8 rows with int4 weights take it");
  require_one_of(group_size, "group_sizes", {0});
  const bool int4 = x1.scalar_type() == at::kInt;
  require(x1.dim() >= 2 && x2.dim() == 2, "x1 has the shape ", x1.sizes(), " and x2 ", x2.sizes(),
          "; [..., K] times [K, N] is emulated");
  const bool by_columns = int4 && is_transposed(x2);
  const int64_t inner = x1.size(-1) * (int4 ? kInt4InInt32 : 1), rows = x1.numel() / x1.size(-1);
  const int64_t width = x2.size(1) * (int4 && !by_columns ? kInt4InInt32 : 1);
  require(inner == x2.size(0) * (by_columns ? kInt4InInt32 : 1), "x1 has the shape ", x1.sizes(), " and x2 ", x2.sizes(),
          "; [..., K] times [K, N] is emulated");
  require_dtype(out, "output_dtype", {at::kHalf, at::kBFloat16, at::kInt, at::kChar});
  if (!scale) refuse(Code::kMissing, "scale is missing");
  require_dtype(*scale, "scale", {at::kFloat, at::kBFloat16, at::kLong, at::kUInt64});
  require(scale->numel() == width || scale->numel() == 1, "scale has the shape ", scale->sizes(), " and x2 ", width,
          " columns");
  const bool packed = is_packed_scale(*scale), quantised = out.scalar_type() == at::kChar;
  if (packed) require_none(row_scale, "pertoken_scale", "scale is int64");
  if (quantised && !packed) refuse(Code::kInvalid, "scale is ", scale->scalar_type(), "; for int8 it must be int64");
  // A packed scale has the offset, which op-plugin passes a second time.
  if (!quantised) require_none(x2_offset, "offset", "it is emulated for int8 outputs");
  if (out.scalar_type() == at::kInt) require_none(row_scale, "pertoken_scale", "the output is int32");
  if (row_scale) {
    require_dtype(*row_scale, "pertoken_scale", {at::kFloat});
    require_shape(*row_scale, "pertoken_scale", {rows});
  }
  if (bias) {
    require_dtype(*bias, "bias", {at::kInt, at::kFloat, at::kBFloat16, at::kHalf});
    require_shape(*bias, "bias", {width});
  }
  return [=] {
    const at::Tensor left = (int4 ? unpack_int4(x1) : x1).reshape({rows, -1}), right = int4 ? unpack_int4(x2) : x2;
    at::Tensor sums = at::matmul(left.to(at::kInt), right.to(at::kInt));
    if (bias && bias->scalar_type() == at::kInt) sums = sums + *bias;
    if (out.scalar_type() == at::kInt) {
      out.copy_(sums.view(out.sizes()));
      return;
    }
    at::Tensor result = sums.to(at::kFloat) * (packed ? unpack_scale(*scale) : scale->to(at::kFloat)).flatten();
    if (row_scale) result = result * row_scale->unsqueeze(-1);
    if (bias && bias->scalar_type() != at::kInt) result = result + bias->to(at::kFloat);
    if (quantised) result = (result + unpack_offset(*scale).flatten()).round().clamp(-128, 127);
    out.copy_(result.view(out.sizes()));
  };
}

Plan trans_quant_param(at::Tensor scale, OptionalTensor offset, at::Tensor out) {
  require_dtype(scale, "scale", {at::kFloat});
  require_dtype(out, "out", {at::kLong, at::kUInt64});
  if (offset && offset->numel() == 0) offset.reset();
  if (offset) require_dtype(*offset, "offset", {at::kFloat});
  require(out.numel() == (offset ? std::max(scale.numel(), offset->numel()) : scale.numel()), "out has the shape ",
          out.sizes(), " and scale ", scale.sizes());
  return [=] {
    const OptionalTensor offsets = offset ? OptionalTensor(offset->flatten()) : std::nullopt;
    out.copy_(pack_scale(scale.flatten(), offsets).view(out.sizes()));
  };
}

Plan trans_quant_param_v3(at::Tensor scale, OptionalTensor offset, int64_t round_mode, at::Tensor out) {
  require_one_of(round_mode, "round_mode", {0});
  return trans_quant_param(scale, offset, out);
}

Plan weight_quant_matmul(at::Tensor x, at::Tensor weight, at::Tensor scale, OptionalTensor offset,
                         OptionalTensor quant_scale, OptionalTensor quant_offset, OptionalTensor bias,
                         int32_t group_size, at::Tensor out) {
  require_none(quant_scale, "quant_scale", "quantised outputs are not emulated");
  require_none(quant_offset, "quant_offset", "quantised outputs are not emulated");
  require_dtype(x, "x", {at::kHalf, at::kBFloat16});
  require_dtype(weight, "weight", {at::kChar, at::kInt});
  require_dtype(scale, "antiquant_scale", {x.scalar_type()});
  require_dtype(out, "y", {x.scalar_type()});
  const bool int4 = weight.scalar_type() == at::kInt;
  require(x.dim() == 2 && weight.dim() == 2, "x has the shape ", x.sizes(), " and weight ", weight.sizes(),
          "; [M, K] times [K, N] is emulated");
  const int64_t inner = x.size(1), width = out.size(1);
  const bool by_columns = int4 && is_transposed(weight);
  require(weight.size(0) * (by_columns ? kInt4InInt32 : 1) == inner, "x has the shape ", x.sizes(), " and weight ",
          weight.sizes());
  require(weight.size(1) * (int4 && !by_columns ? kInt4InInt32 : 1) == width, "weight has the shape ", weight.sizes(),
          " and y ", out.sizes());
  require_weight_scale(scale, "antiquant_scale", inner, width, group_size);
  if (offset) {
    require_dtype(*offset, "antiquant_offset", {x.scalar_type()});
    require_shape(*offset, "antiquant_offset", scale.sizes());
  }
  if (bias) {
    require_dtype(*bias, "bias", {x.scalar_type() == at::kHalf ? at::kHalf : at::kFloat});
    require(bias->numel() == width, "bias has the shape ", bias->sizes(), " and y ", width, " columns");
  }
  return [=] {
    const at::Tensor full = dequantised(int4 ? unpack_int4(weight) : weight, scale, offset, group_size, x.scalar_type());
    at::Tensor result = at::matmul(x.to(at::kFloat), full.to(at::kFloat));
    if (bias) result = result + bias->to(at::kFloat).flatten();
    out.copy_(result);
  };
}

Plan weight_quant_matmul_v3(at::Tensor x, at::Tensor weight, at::Tensor scale, OptionalTensor offset,
                            OptionalTensor quant_scale, OptionalTensor quant_offset, OptionalTensor bias,
                            int32_t group_size, int32_t /*inner_precise: speed or precision*/, at::Tensor out) {
  return weight_quant_matmul(x, weight, scale, offset, quant_scale, quant_offset, bias, group_size, out);
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
ACLNN_OP(aclnnTransQuantParamV2, trans_quant_param);
ACLNN_OP(aclnnTransQuantParamV3, trans_quant_param_v3);
ACLNN_OP(aclnnWeightQuantBatchMatmulV2, weight_quant_matmul);
ACLNN_OP(aclnnWeightQuantBatchMatmulV3, weight_quant_matmul_v3);
ACLNN_OP(aclnnTransposeBatchMatMul, transpose_batch_matmul);

}  // namespace vllm_npu::emulator::aclnn
