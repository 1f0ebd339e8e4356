// int4 values, eight in an int32: the first value has the lowest bits. And scales of channels, packed into 64 bits.
#pragma once

#include <ATen/ATen.h>

#include "refusal.h"

namespace vllm_npu::emulator::aclnn {

constexpr int64_t kInt4InInt32 = 8;

// Packs int8 or float values from -8 to 7. The last dimension becomes an eighth.
at::Tensor pack_int4(const at::Tensor& values);

// Returns the int8 values of a packed matrix, or of a batch of matrices. The dimension that is contiguous in memory becomes
// eight times as long: the last one, or the one before it for a transposed matrix.
at::Tensor unpack_int4(const at::Tensor& packed);

// Whether the last two dimensions are those of a transposed matrix, by the rule of op-plugin, which computes the outputs' shapes.
bool is_transposed(const at::Tensor& matrix);

// Whether the type is one of those in which a 64-bit scale travels.
inline bool is_packed_scale(const at::Tensor& scale) {
  return scale.scalar_type() == at::kLong || scale.scalar_type() == at::kUInt64;
}

// Returns the float32 scales that lie in the low 32 bits of 64-bit values.
at::Tensor unpack_scale(const at::Tensor& scale);

// Returns the offsets of 64-bit scales as float32: bits 37 to 45, a signed number.
at::Tensor unpack_offset(const at::Tensor& scale);

// Packs float32 scales, and offsets if there are any, by the formula of CANN's document of aclnnTransQuantParamV2: the 19
// highest bits of the scale, bit 46, and nine bits of the offset.
at::Tensor pack_scale(const at::Tensor& scale, const std::optional<at::Tensor>& offset);

// Returns (weight + offset) * scale in float32, rounded once to `type`. weight [K, N] holds integers. scale and offset have one
// value, one for each column, or [G, N]: one for each column of each of G parts of K. A part has group_size rows, the last part
// perhaps fewer; 0: K / G rows.
at::Tensor dequantised(const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& offset,
                       int64_t group_size, at::ScalarType type);

// Refuses a scale of another shape than dequantised() takes.
void require_weight_scale(const at::Tensor& scale, const char* name, int64_t inner, int64_t width, int64_t group_size);

}  // namespace vllm_npu::emulator::aclnn
