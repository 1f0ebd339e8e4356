// The gradient of the experts' weights, which is added to what is there.
//
// Contract: CANN's document of aclnnGroupedMatmulAdd, and op-plugin's call of it. Products are added up in float32.
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

// y [E, m, n], or with the first two dimensions joined, gets x_e^T weight_e added: x [k, m], weight [k, n]. group_list
// has the end of each expert's rows.
Plan grouped_matmul_add(at::Tensor x, at::Tensor weight, at::Tensor group_list, at::Tensor y, bool transpose_x,
                        bool transpose_weight, int64_t group_type) {
  refuse_on_310p("npu_grouped_matmul_add");
  require(transpose_x && !transpose_weight, "transpose_x must be true and transpose_weight false");
  require_one_of(group_type, "group_type", {2});
  require_dimensions(x, "x", 2);
  require_dimensions(weight, "weight", 2);
  require_dtype(x, "x", {at::kHalf, at::kBFloat16});
  require_dtype(weight, "weight", {x.scalar_type()});
  require_dtype(y, "self", {at::kFloat});
  require_dtype(group_list, "group_list", {at::kLong});
  const int64_t groups = group_list.numel();
  require(x.size(0) == weight.size(0) && y.numel() == groups * x.size(1) * weight.size(1), "x has the shape ",
          x.sizes(), ", weight ", weight.sizes(), ", group_list ", group_list.sizes(), " and self ", y.sizes());
  return [=] {
    const at::Tensor parts = y.view({groups, x.size(1), weight.size(1)});
    int64_t first = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const auto end = group_list[group].item<int64_t>();
      require(first <= end && end <= x.size(0), "group_list has ", end, " behind ", first, " for ", x.size(0), " rows");
      const auto rows = [&](const at::Tensor& all) { return all.narrow(0, first, end - first).to(at::kFloat); };
      parts[group].add_(at::matmul(rows(x).t(), rows(weight)));
      first = end;
    }
  };
}

}  // namespace

ACLNN_OP(aclnnGroupedMatmulAdd, grouped_matmul_add);

}  // namespace vllm_npu::emulator::aclnn
