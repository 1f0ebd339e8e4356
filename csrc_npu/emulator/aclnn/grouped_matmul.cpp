// One matrix product for each group of rows, for the linear layers of experts.
//
// Contracts: op-plugin's document of npu_grouped_matmul, CANN's of aclnnGroupedMatmulV5. Weights have plain formats. Types are
// float16, bfloat16, float32; int8 with a scale for each channel and optionally for each row; int4, packed in int32, with
// packed scales; int8 rows with int4 weights; 16-bit rows with int8 or int4 weights.
#include "int4.h"
#include "op.h"
#include "undefined.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kCumsum = 0;
constexpr int64_t kCount = 1;
constexpr int64_t kKeyValue = 2;
constexpr int64_t kUngrouped = -1;
constexpr int64_t kRows = 0;   // group_type: the rows of x are split between the groups
constexpr int64_t kInner = 2;  // group_type: the inner dimension is split
constexpr size_t kMaxTensors = 128;

struct GroupedMatmul {
  std::vector<at::Tensor> x;
  std::vector<at::Tensor> weight;  // one [E, K, N], or E of [K, N]
  std::vector<at::Tensor> bias;
  std::vector<at::Tensor> scale;
  std::vector<at::Tensor> antiquant_scale;  // of int8 or int4 weights for 16-bit rows
  std::vector<at::Tensor> antiquant_offset;
  std::vector<at::Tensor> per_token_scale;
  OptionalTensor group_list;
  int64_t group_list_type;
  int64_t group_type;
  int64_t activation;
  std::vector<at::Tensor> y;

  bool is_int8() const { return x[0].scalar_type() == at::kChar && weight[0].scalar_type() == at::kChar; }
  bool has_int4_weight() const { return weight[0].scalar_type() == at::kInt; }
  bool has_packed_scale() const { return has_int4_weight() && !x[0].is_floating_point(); }
  bool is_dequantised() const { return x[0].is_floating_point() && !weight[0].is_floating_point(); }
  int64_t inner() const {
    return weight[0].size(-2) * (has_int4_weight() && is_transposed(weight[0]) ? kInt4InInt32 : 1);
  }
  int64_t width() const {
    return weight[0].size(-1) * (has_int4_weight() && !is_transposed(weight[0]) ? kInt4InInt32 : 1);
  }
  bool weight_is_stacked() const { return weight.size() == 1 && weight[0].dim() == 3; }
  int64_t num_groups() const { return weight_is_stacked() ? weight[0].size(0) : static_cast<int64_t>(weight.size()); }
};

// Returns the tensor of group `index`. The list has one tensor for each group, or one stacked tensor for all groups.
at::Tensor of_group(const std::vector<at::Tensor>& list, int64_t index, int64_t num_groups) {
  if (static_cast<int64_t>(list.size()) == num_groups && num_groups > 1) return list[index];
  return list[0].dim() >= 2 ? list[0][index] : list[0];
}

struct Group {
  int64_t index;  // index of its weight
  int64_t start;
  int64_t size;
};

// Returns the groups as ranges of the split dimension. Groups of a key-value list keep the order of the list.
std::vector<Group> read_groups(const at::Tensor& group_list, int64_t type, int64_t num_groups, int64_t length) {
  const at::Tensor values = group_list.contiguous();
  const int64_t* numbers = values.const_data_ptr<int64_t>();
  std::vector<Group> groups;
  int64_t start = 0;
  for (int64_t i = 0; i < values.size(0); ++i) {
    const int64_t index = type == kKeyValue ? numbers[2 * i] : i;
    const int64_t size = type == kKeyValue ? numbers[2 * i + 1] : type == kCount ? numbers[i] : numbers[i] - start;
    if (type == kCumsum) {
      require(size >= 0, "group_list must not fall with group_list_type=0: entry ", i, " is ", numbers[i], " after ",
              start);
    }
    require(size >= 0, "group_list has the negative size ", size, " for group ", i);
    require(index >= 0 && index < num_groups, "group_list names group ", index, " of ", num_groups);
    groups.push_back({index, start, size});
    start += size;
  }
  require(start <= length, "group_list adds up to ", start, " and x has ", length);
  return groups;
}

at::Tensor activate(const at::Tensor& values, int64_t activation) {
  switch (activation) {
    case 0:
      return values;
    case 1:
      return at::relu(values);
    case 2:
      return at::gelu(values, "tanh");
    case 4:
      return values * at::sigmoid(1.702 * values);
    default:
      return at::silu(values);
  }
}

// x int4 or int8, weight int4: sums of products, scaled by the packed scales of each part of the inner dimension.
//
// int8 rows enter the device's product as two int4 halves, which lack 8 in each value. The document's bias, which is
// 8 * weight * scale, brings this back.
at::Tensor product_of_int4(const GroupedMatmul& op, const at::Tensor& rows, const at::Tensor& weight, int64_t group,
                           const OptionalTensor& bias, const OptionalTensor& row_scale) {
  const bool int8_rows = rows.scalar_type() == at::kChar;
  const at::Tensor left = int8_rows ? rows.to(at::kFloat) - 8 : unpack_int4(rows).to(at::kFloat);
  const at::Tensor scale = unpack_scale(of_group(op.scale, group, op.num_groups()));
  at::Tensor result = at::matmul(left, dequantised(unpack_int4(weight), scale, std::nullopt, 0, at::kFloat));
  if (bias) result = result + bias->to(at::kFloat);
  return row_scale ? result * row_scale->unsqueeze(-1) : result;
}

// Returns one group's product before the cast to y's dtype. It is float32, or int32 for int8 without a scale.
at::Tensor product(const GroupedMatmul& op, const at::Tensor& rows, const at::Tensor& weight, int64_t group,
                   const OptionalTensor& row_scale) {
  const int64_t num_groups = op.num_groups();
  const OptionalTensor bias = op.bias.empty() ? std::nullopt : std::optional(of_group(op.bias, group, num_groups));
  if (op.has_packed_scale()) return product_of_int4(op, rows, weight, group, bias, row_scale);
  if (!op.is_int8()) {
    at::Tensor full = weight;
    if (op.is_dequantised()) {
      const OptionalTensor offset = op.antiquant_offset.empty()
                                        ? std::nullopt
                                        : std::optional(of_group(op.antiquant_offset, group, num_groups));
      full = dequantised(op.has_int4_weight() ? unpack_int4(weight) : weight,
                         of_group(op.antiquant_scale, group, num_groups), offset, 0, rows.scalar_type());
    }
    at::Tensor result = at::matmul(rows.to(at::kFloat), full.to(at::kFloat));
    if (bias) result = result + bias->to(at::kFloat);
    return activate(result, op.activation);
  }
  at::Tensor sums = at::matmul(rows.to(at::kInt), weight.to(at::kInt));
  const bool integer_bias = bias && bias->scalar_type() == at::kInt;
  if (integer_bias) sums = sums + *bias;
  if (op.scale.empty()) return sums;
  at::Tensor result = sums.to(at::kFloat) * of_group(op.scale, group, num_groups).to(at::kFloat);
  if (row_scale) result = result * row_scale->unsqueeze(-1);
  if (bias && !integer_bias) result = result + bias->to(at::kFloat);
  return activate(result, op.activation);
}

// group_type 0: each row of x gives a row of y. Rows of y behind the last group are left unwritten.
void split_rows(const GroupedMatmul& op) {
  const at::Tensor x = at::cat(op.x);
  const OptionalTensor row_scale =
      op.per_token_scale.empty() ? std::nullopt : std::optional(at::cat(op.per_token_scale));
  std::vector<Group> groups;
  if (op.group_list) {
    groups = read_groups(*op.group_list, op.group_list_type, op.num_groups(), x.size(0));
  } else {
    int64_t start = 0;
    for (const at::Tensor& part : op.x) {
      groups.push_back({static_cast<int64_t>(groups.size()), start, part.size(0)});
      start += part.size(0);
    }
  }
  if (op.y.size() == 1) fill_undefined(op.y[0]);
  for (const Group& group : groups) {
    if (group.size == 0) continue;
    const auto range = [&](const at::Tensor& tensor) { return tensor.narrow(0, group.start, group.size); };
    const at::Tensor result = product(op, range(x), of_group(op.weight, group.index, op.num_groups()), group.index,
                                      row_scale ? std::optional(range(*row_scale)) : std::nullopt);
    const at::Tensor to = op.y.size() == 1 ? range(op.y[0]) : op.y[group.index];
    require(to.sizes() == result.sizes(), "group ", group.index, " has the result ", result.sizes(),
            " and its output the shape ", to.sizes());
    to.copy_(result);
  }
}

// group_type -1: x, weight and y are lists of one matrix for each group.
void multiply_lists(const GroupedMatmul& op) {
  for (size_t i = 0; i < op.x.size(); ++i) {
    const OptionalTensor row_scale = op.per_token_scale.empty() ? std::nullopt : std::optional(op.per_token_scale[i]);
    op.y[i].copy_(product(op, op.x[i], op.weight[i], static_cast<int64_t>(i), row_scale));
  }
}

// group_type 2: y[e] = x[:, group e] @ weight[group e], as in the gradient of the weights.
void split_inner(const GroupedMatmul& op) {
  const std::vector<Group> groups =
      read_groups(*op.group_list, op.group_list_type, op.group_list->size(0), op.x[0].size(1));
  for (const Group& group : groups) {
    const at::Tensor result = at::matmul(op.x[0].narrow(1, group.start, group.size).to(at::kFloat),
                                         op.weight[0].narrow(0, group.start, group.size).to(at::kFloat));
    (op.y.size() == 1 ? op.y[0][group.index] : op.y[group.index]).copy_(result);
  }
}

void check_lengths(const GroupedMatmul& op) {
  require(!op.x.empty() && !op.weight.empty() && !op.y.empty(), "x, weight and y must not be empty lists");
  require(op.x.size() <= kMaxTensors && op.weight.size() <= kMaxTensors, "x has ", op.x.size(), " tensors and weight ",
          op.weight.size(), "; at most ", kMaxTensors);
  const auto check_list = [&](const std::vector<at::Tensor>& list, const char* name) {
    require(list.empty() || list.size() == op.weight.size(), name, " has ", list.size(), " tensors and weight has ",
            op.weight.size());
  };
  check_list(op.bias, "bias");
  check_list(op.scale, "scale");
  check_list(op.antiquant_scale, "antiquant_scale");
  check_list(op.antiquant_offset, "antiquant_offset");
  require(op.per_token_scale.empty() || op.per_token_scale.size() == op.x.size(), "per_token_scale has ",
          op.per_token_scale.size(), " tensors and x has ", op.x.size());
}

// The types of a product with int4 weights and packed scales.
void check_int4_types(const GroupedMatmul& op) {
  if (op.scale.empty()) refuse(Code::kMissing, "scale is missing: int4 weights need it");
  for (const at::Tensor& scale : op.scale) {
    if (!is_packed_scale(scale)) refuse(Code::kInvalid, "scale is ", scale.scalar_type(), "; it must be int64");
  }
  require_dtype(op.y[0], "output_dtype of a product with int4 weights", {at::kHalf, at::kBFloat16});
  require(op.group_type == kRows && op.activation == 0, "int4 weights need group_type=0 and act_type=0");
  for (const at::Tensor& weight : op.weight) {
    require(!is_transposed(weight), "int4 weights of int8 or int4 rows must not be transposed");
  }
  if (op.x[0].scalar_type() == at::kChar) {
    if (op.bias.empty() || op.per_token_scale.empty()) {
      refuse(Code::kMissing, "int8 rows with int4 weights need bias and per_token_scale");
    }
    for (const at::Tensor& bias : op.bias) require_dtype(bias, "bias", {at::kFloat});
  } else {
    require_absent(op.bias, "bias", "int4 rows take none");
  }
  for (const at::Tensor& scale : op.per_token_scale) require_dtype(scale, "per_token_scale", {at::kFloat});
}

void check_types(const GroupedMatmul& op) {
  for (const at::Tensor& x : op.x) {
    require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat, at::kChar, at::kInt});
  }
  const at::ScalarType rows = op.x[0].scalar_type(), weights = op.weight[0].scalar_type();
  const bool known = weights == rows || (weights == at::kInt && rows == at::kChar) ||
                     ((weights == at::kChar || weights == at::kInt) && (rows == at::kHalf || rows == at::kBFloat16));
  if (!known) refuse(Code::kInvalid, "x is ", rows, " and weight is ", weights, ", which is not emulated");
  for (const at::Tensor& weight : op.weight) require_dtype(weight, "weight", {weights});
  if (op.is_dequantised()) {
    if (op.antiquant_scale.empty()) refuse(Code::kMissing, "antiquant_scale is missing: x is ", rows, ", weight ", weights);
    for (const auto* list : {&op.antiquant_scale, &op.antiquant_offset}) {
      for (const at::Tensor& factors : *list) require_dtype(factors, "antiquant_scale and antiquant_offset", {rows});
    }
    require(op.activation == 0, "act_type=", op.activation, " is not for int8 or int4 weights of 16-bit rows");
  } else {
    require_absent(op.antiquant_scale, "antiquant_scale", "only 16-bit rows with int8 or int4 weights take one");
    require_absent(op.antiquant_offset, "antiquant_offset", "only 16-bit rows with int8 or int4 weights take one");
  }
  const at::ScalarType y = op.y[0].scalar_type();
  if (op.has_packed_scale()) return check_int4_types(op);
  if (!op.is_int8()) {
    require_absent(op.scale, "scale", "only int8 and int4 products take one");
    require_absent(op.per_token_scale, "per_token_scale", "only int8 and int4 products take one");
    if (y != op.x[0].scalar_type())
      refuse(Code::kInvalid, "output_dtype is ", y, "; it must be x's, ", op.x[0].scalar_type());
    return;
  }
  if (op.scale.empty()) {
    require_dtype(op.y[0], "output_dtype of an int8 product without scale", {at::kInt});
    require_absent(op.per_token_scale, "per_token_scale", "scale is missing");
    require(op.activation == 0, "act_type=", op.activation, " needs scale");
  } else {
    require_dtype(op.scale[0], "scale", {at::kFloat, at::kBFloat16});
    require_dtype(op.y[0], "output_dtype of an int8 product", {at::kHalf, at::kBFloat16});
  }
  for (const at::Tensor& scale : op.per_token_scale) require_dtype(scale, "per_token_scale", {at::kFloat});
}

void check_shapes(const GroupedMatmul& op) {
  const int64_t inner = op.inner();
  const int64_t values = op.x[0].scalar_type() == at::kInt ? kInt4InInt32 : 1;  // of an element of x
  if (op.group_type != kInner) {
    for (const at::Tensor& x : op.x) {
      require(op.group_type == kUngrouped || x.size(-1) * values == inner, "x has the shape ", x.sizes(), " and weight ",
              op.weight[0].sizes());
    }
  }
  const int64_t width = op.width();
  for (int64_t group = 0; group < (op.group_type == kRows ? op.num_groups() : 0); ++group) {
    const auto check_factors = [&](const std::vector<at::Tensor>& list, const char* name) {
      if (!list.empty()) require_weight_scale(of_group(list, group, op.num_groups()), name, inner, width, 0);
    };
    if (!op.bias.empty()) require_shape(of_group(op.bias, group, op.num_groups()), "a group's bias", {width});
    check_factors(op.antiquant_scale, "a group's antiquant_scale");
    check_factors(op.antiquant_offset, "a group's antiquant_offset");
    if (op.has_packed_scale()) {
      check_factors(op.scale, "a group's scale");
    } else if (!op.scale.empty()) {
      require_shape(of_group(op.scale, group, op.num_groups()), "a group's scale", {width});
    }
  }
}

void check_groups(const GroupedMatmul& op, int64_t split_item) {
  require_one_of(split_item, "split_item", {0, 1, 2, 3});
  require_one_of(op.group_type, "group_type", {kUngrouped, kRows, kInner});
  require_one_of(op.group_list_type, "group_list_type", {kCumsum, kCount, kKeyValue});
  require_one_of(op.activation, "act_type", {0, 1, 2, 4, 5});
  if (op.group_list) {
    require_dtype(*op.group_list, "group_list", {at::kLong});
    require_dimensions(*op.group_list, "group_list", op.group_list_type == kKeyValue ? 2 : 1);
  }
  switch (op.group_type) {
    case kUngrouped:
      require(!op.group_list, "group_list is given, but group_type=-1 has no groups");
      require(op.x.size() == op.weight.size() && op.x.size() == op.y.size(), "group_type=-1 needs as many x (",
              op.x.size(), ") as weights (", op.weight.size(), ") and outputs (", op.y.size(), ")");
      break;
    case kRows:
      require(op.group_list || op.x.size() > 1, "group_list is missing: group_type=0 with one x needs it");
      require(!op.group_list || op.group_list_type == kKeyValue || op.group_list->size(0) == op.num_groups(),
              "group_list has ", op.group_list ? op.group_list->size(0) : 0, " entries and there are ", op.num_groups(),
              " weights");
      require(op.group_list || static_cast<int64_t>(op.x.size()) == op.num_groups(), "there are ", op.x.size(),
              " tensors in x and ", op.num_groups(), " weights");
      break;
    default:
      require(op.group_list.has_value(), "group_list is missing: group_type=2 needs it");
      require(op.x.size() == 1 && op.weight.size() == 1 && op.weight[0].is_floating_point() && op.bias.empty(),
              "group_type=2 is emulated for one x and one weight, of a floating type, without bias");
  }
}

Plan plan(const GroupedMatmul& op, int64_t split_item) {
  check_lengths(op);
  check_types(op);
  check_groups(op, split_item);
  check_shapes(op);
  return [op] {
    if (op.group_type == kUngrouped)
      multiply_lists(op);
    else if (op.group_type == kInner)
      split_inner(op);
    else
      split_rows(op);
  };
}

using Tensors = std::vector<at::Tensor>;

Plan grouped_matmul_v5(Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset, Tensors antiquant_scale,
                       Tensors antiquant_offset, Tensors per_token_scale, OptionalTensor group_list,
                       Tensors activation_input, Tensors activation_quant_scale, Tensors activation_quant_offset,
                       int64_t split_item, int64_t group_type, int64_t group_list_type, int64_t activation,
                       std::vector<int64_t> /*tuning_config: for the speed only*/, Tensors y, Tensors activation_out,
                       Tensors dynamic_quant_scale_out) {
  const char* reason = "it is not emulated";
  require_absent(offset, "offset", reason);
  require_absent(activation_input, "activation_input", reason);
  require_absent(activation_quant_scale, "activation_quant_scale", reason);
  require_absent(activation_quant_offset, "activation_quant_offset", reason);
  require_absent(activation_out, "activationFeatureOut", reason);
  require_absent(dynamic_quant_scale_out, "dynQuantScaleOut", reason);
  return plan({x, weight, bias, scale, antiquant_scale, antiquant_offset, per_token_scale, group_list, group_list_type,
               group_type, activation, y},
              split_item);
}

Plan grouped_matmul_v4(Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset, Tensors antiquant_scale,
                       Tensors antiquant_offset, Tensors per_token_scale, OptionalTensor group_list,
                       Tensors activation_input, Tensors activation_quant_scale, Tensors activation_quant_offset,
                       int64_t split_item, int64_t group_type, int64_t group_list_type, int64_t activation, Tensors y,
                       Tensors activation_out, Tensors dynamic_quant_scale_out) {
  return grouped_matmul_v5(x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale,
                           group_list, activation_input, activation_quant_scale, activation_quant_offset, split_item,
                           group_type, group_list_type, activation, {}, y, activation_out, dynamic_quant_scale_out);
}

}  // namespace

ACLNN_OP(aclnnGroupedMatmulV4, grouped_matmul_v4);
ACLNN_OP(aclnnGroupedMatmulV5, grouped_matmul_v5);

}  // namespace vllm_npu::emulator::aclnn
