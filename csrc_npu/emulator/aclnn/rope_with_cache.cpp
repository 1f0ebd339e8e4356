// Rotary position embeddings of query and key, with one table of cosines and sines: npu_mrope.
// Source: CANN's document of aclnnRopeWithSinCosCache.
#include "op.h"
#include "rotary.h"
#include "runtime/settings.h"

namespace vllm_npu::emulator::aclnn {
namespace {

void check_heads(const at::Tensor& rows, const char* name, const at::Tensor& table, int64_t tokens, int64_t head_size) {
  require_dimensions(rows, name, 2);
  require_dtype(rows, name, {table.scalar_type()});
  require(rows.size(0) == tokens && rows.size(1) % head_size == 0, name, " has the shape ", rows.sizes(),
          "; it must have ", tokens, " rows of whole heads of ", head_size);
}

void check_sizes(const at::Tensor& table, int64_t head_size) {
  const int64_t unit = table.scalar_type() == at::kFloat ? 16 : 32;
  const int64_t rotary = table.size(1);
  require(head_size > 0 && rotary <= head_size && rotary % 2 == 0, "cosSinCache has ", rotary,
          " columns; it must have an even number of them, and at most headSize=", head_size);
  require(limits_are_off() || (head_size % unit == 0 && rotary % unit == 0), "headSize=", head_size, " and ", rotary,
          " columns of cosSinCache must be multiples of ", unit, " for ", table.scalar_type());
}

// Rotates the first elements of each head, and keeps the others.
at::Tensor rotated(const at::Tensor& rows, const at::Tensor& cos, const at::Tensor& sin, int64_t head_size,
                   bool halves) {
  const int64_t rotary = cos.size(-1);
  const at::Tensor heads = rows.to(at::kFloat).unflatten(1, {rows.size(1) / head_size, head_size});
  const at::Tensor turning = heads.narrow(-1, 0, rotary);
  const at::Tensor turned = halves ? turned_halves(turning) : turned_neighbours(turning);
  return at::cat({turning * cos + turned * sin, heads.narrow(-1, rotary, head_size - rotary)}, -1).flatten(1);
}

// One position a token is the rope mode, in which mrope_section has no meaning: op-plugin passes undefined numbers then.
Plan rope_with_cache(at::Tensor positions, at::Tensor query, at::Tensor key, at::Tensor table,
                     std::vector<int64_t> /*mrope_section*/, int64_t head_size, bool halves, at::Tensor query_out,
                     at::Tensor key_out) {
  refuse_on_310p("npu_mrope");
  require(positions.dim() == 1, "positions has the shape ", positions.sizes(),
          ": the mrope mode, with three positions a token, is not emulated");
  require_dtype(positions, "positions", {at::kInt, at::kLong});
  require_dtype(table, "cosSinCache", {at::kHalf, at::kBFloat16, at::kFloat});
  require_dimensions(table, "cosSinCache", 2);
  check_sizes(table, head_size);
  check_heads(query, "queryIn", table, positions.size(0), head_size);
  check_heads(key, "keyIn", table, positions.size(0), head_size);
  require_shape(query_out, "queryOut", query.sizes());
  require_shape(key_out, "keyOut", key.sizes());
  return [=] {
    const at::Tensor rows = positions.to(at::kLong);
    require(rows.numel() == 0 || (rows.min().item<int64_t>() >= 0 && rows.max().item<int64_t>() < table.size(0)),
            "positions must lie in 0 to ", table.size(0) - 1, ", the rows of cosSinCache");
    const std::vector<at::Tensor> parts = table.index_select(0, rows).to(at::kFloat).unsqueeze(1).chunk(2, -1);
    const auto twice = [halves](const at::Tensor& x) {
      return halves ? at::cat({x, x}, -1) : x.repeat_interleave(2, -1);
    };
    const at::Tensor cos = twice(parts[0]), sin = twice(parts[1]);
    query_out.copy_(rotated(query, cos, sin, head_size, halves));
    key_out.copy_(rotated(key, cos, sin, head_size, halves));
  };
}

}  // namespace

ACLNN_OP(aclnnRopeWithSinCosCache, rope_with_cache);

}  // namespace vllm_npu::emulator::aclnn
