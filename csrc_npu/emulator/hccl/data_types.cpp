#include "data_types.h"

#include <algorithm>
#include <cstring>

namespace vllm_npu::emulator {
namespace {

struct TypeRow {
  HcclDataType type;
  const char* name;
  std::size_t size;
};

constexpr TypeRow kTypes[] = {
    {HCCL_DATA_TYPE_INT8, "int8", 1},       {HCCL_DATA_TYPE_INT16, "int16", 2},
    {HCCL_DATA_TYPE_INT32, "int32", 4},     {HCCL_DATA_TYPE_FP16, "fp16", 2},
    {HCCL_DATA_TYPE_FP32, "fp32", 4},       {HCCL_DATA_TYPE_INT64, "int64", 8},
    {HCCL_DATA_TYPE_UINT64, "uint64", 8},   {HCCL_DATA_TYPE_UINT8, "uint8", 1},
    {HCCL_DATA_TYPE_UINT16, "uint16", 2},   {HCCL_DATA_TYPE_UINT32, "uint32", 4},
    {HCCL_DATA_TYPE_FP64, "fp64", 8},       {HCCL_DATA_TYPE_BFP16, "bf16", 2},
    {HCCL_DATA_TYPE_INT128, "int128", 16},  {HCCL_DATA_TYPE_HIF8, "hif8", 1},
    {HCCL_DATA_TYPE_FP8E4M3, "fp8e4m3", 1}, {HCCL_DATA_TYPE_FP8E5M2, "fp8e5m2", 1},
    {HCCL_DATA_TYPE_FP8E8M0, "fp8e8m0", 1},
};

const TypeRow* find_type(HcclDataType type) {
  const auto* row = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& r) { return r.type == type; });
  return row == std::end(kTypes) ? nullptr : row;
}

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are reinterpreted, not converted");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// One class for each type of element. It defines the stored type and the type of the computation.
template <typename T>
struct Plain {
  using Stored = T;
  using Computed = T;
  static T load(T value) { return value; }
  static T store(T value) { return value; }
};

struct BrainFloat {
  using Stored = std::uint16_t;
  using Computed = float;
  static float load(std::uint16_t bits) { return same_bits<float>(static_cast<std::uint32_t>(bits) << 16); }
  static std::uint16_t store(float value) {
    if (value != value) return 0x7FC0;  // rounding could turn a NaN into an infinity
    const auto bits = same_bits<std::uint32_t>(value);
    return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
  }
};

struct HalfFloat {
  using Stored = std::uint16_t;
  using Computed = float;
  static constexpr float kSmallestSubnormal = 5.9604644775390625e-8F;  // 2^-24

  static float load(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits >> 15) << 31;
    const std::uint32_t exponent = (bits >> 10) & 0x1F;
    const std::uint32_t fraction = bits & 0x3FF;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * kSmallestSubnormal;
      return sign != 0 ? -magnitude : magnitude;
    }
    const std::uint32_t wide_exponent = exponent == 0x1F ? 0xFF : exponent + 112;
    return same_bits<float>(sign | wide_exponent << 23 | fraction << 13);
  }

  static std::uint16_t store(float value) {
    const auto bits = same_bits<std::uint32_t>(value);
    const std::uint32_t sign = bits >> 16 & 0x8000;
    const std::uint32_t magnitude = bits & 0x7FFFFFFF;
    std::uint32_t half = 0;
    if (magnitude > 0x7F800000) {
      half = 0x7E00;  // NaN
    } else if (magnitude >= 0x47800000) {
      half = 0x7C00;  // 65536 and more: infinity
    } else if (magnitude < 0x38800000) {
      // Below 2^-14 the result is subnormal. Adding 0.5 leaves its bits, rounded to nearest even, at the low end.
      half = same_bits<std::uint32_t>(same_bits<float>(magnitude) + 0.5F) - same_bits<std::uint32_t>(0.5F);
    } else {
      const std::uint32_t rebased = magnitude - (112U << 23);
      half = (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13;  // to nearest, ties to even
    }
    return static_cast<std::uint16_t>(sign | half);
  }
};

template <typename T>
T combine(T left, T right, HcclReduceOp reduction) {
  switch (reduction) {
    case HCCL_REDUCE_SUM:
      return static_cast<T>(left + right);
    case HCCL_REDUCE_PROD:
      return static_cast<T>(left * right);
    case HCCL_REDUCE_MAX:
      return left != left || left > right ? left : right;  // a NaN operand gives NaN
    default:
      return left != left || left < right ? left : right;
  }
}

template <typename Element>
void reduce_elements(void* destination, const Chunk& chunk, std::uint64_t first, std::uint64_t count,
                     HcclReduceOp reduction) {
  using Stored = typename Element::Stored;
  auto* out = static_cast<Stored*>(destination);
  for (std::uint64_t i = 0; i < count; ++i) {
    auto total = Element::load(reinterpret_cast<const Stored*>(chunk.parts[0].data)[first + i]);
    for (std::size_t rank = 1; rank < chunk.parts.size(); ++rank) {
      const auto next = Element::load(reinterpret_cast<const Stored*>(chunk.parts[rank].data)[first + i]);
      total = combine(total, next, reduction);
    }
    out[i] = Element::store(total);
  }
}

using Reducer = void (*)(void*, const Chunk&, std::uint64_t, std::uint64_t, HcclReduceOp);

Reducer reducer_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return reduce_elements<Plain<std::int8_t>>;
    case HCCL_DATA_TYPE_INT16:
      return reduce_elements<Plain<std::int16_t>>;
    case HCCL_DATA_TYPE_INT32:
      return reduce_elements<Plain<std::int32_t>>;
    case HCCL_DATA_TYPE_INT64:
      return reduce_elements<Plain<std::int64_t>>;
    case HCCL_DATA_TYPE_UINT8:
      return reduce_elements<Plain<std::uint8_t>>;
    case HCCL_DATA_TYPE_UINT16:
      return reduce_elements<Plain<std::uint16_t>>;
    case HCCL_DATA_TYPE_UINT32:
      return reduce_elements<Plain<std::uint32_t>>;
    case HCCL_DATA_TYPE_UINT64:
      return reduce_elements<Plain<std::uint64_t>>;
    case HCCL_DATA_TYPE_FP16:
      return reduce_elements<HalfFloat>;
    case HCCL_DATA_TYPE_BFP16:
      return reduce_elements<BrainFloat>;
    case HCCL_DATA_TYPE_FP32:
      return reduce_elements<Plain<float>>;
    case HCCL_DATA_TYPE_FP64:
      return reduce_elements<Plain<double>>;
    default:
      return nullptr;
  }
}

}  // namespace

std::size_t size_of(HcclDataType type) {
  const TypeRow* row = find_type(type);
  return row == nullptr ? 0 : row->size;
}

const char* name_of(HcclDataType type) {
  const TypeRow* row = find_type(type);
  return row == nullptr ? "unknown" : row->name;
}

const char* name_of(HcclReduceOp reduction) {
  switch (reduction) {
    case HCCL_REDUCE_SUM:
      return "sum";
    case HCCL_REDUCE_PROD:
      return "prod";
    case HCCL_REDUCE_MAX:
      return "max";
    case HCCL_REDUCE_MIN:
      return "min";
    default:
      return "unknown";
  }
}

bool can_reduce(HcclDataType type, HcclReduceOp reduction) {
  return reducer_of(type) != nullptr && reduction <= HCCL_REDUCE_MIN;
}

void reduce(void* destination, const Chunk& chunk, std::uint64_t first, std::uint64_t count, HcclDataType type,
            HcclReduceOp reduction) {
  reducer_of(type)(destination, chunk, first, count, reduction);
}

}  // namespace vllm_npu::emulator
