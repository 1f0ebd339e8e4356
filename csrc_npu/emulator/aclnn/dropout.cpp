// Dropout with a mask of bits, which attention of training and npu_dropout take.
//
// Contract: CANN's documents of aclnnDropoutGenMask, aclnnDropoutGenMaskV2, aclnnDropoutGenMaskV2Tensor and
// aclnnDropoutDoMask, and op-plugin's calls of them. A bit of 1 keeps a value. Bit i of the mask is bit i % 8, from the
// lowest one, of byte i / 8.
#include "dropout.h"

#include <algorithm>

#include "aten/cpu_generator.h"
#include "op.h"

namespace vllm_npu::emulator::aclnn {
namespace {

constexpr int64_t kAlignedBits = 128;      // a mask has a multiple of them
constexpr int64_t kBytesAtOnce = 1 << 20;  // so that a long mask takes little memory

int64_t numel_of(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return numel;
}

void check_mask(const std::vector<int64_t>& shape, double p, const at::Tensor& mask) {
  require(p >= 0 && p <= 1, "prob=", p, " is not between 0 and 1");
  require_dtype(mask, "out", {at::kByte});
  const int64_t bits = (numel_of(shape) + kAlignedBits - 1) / kAlignedBits * kAlignedBits;
  require(mask.numel() * 8 >= bits, "out has ", mask.numel(), " bytes; a mask of the shape ", shape, " needs ",
          bits / 8);
}

// Draws each bit: 0 with the probability p, as a number of `type`.
void draw(const at::Tensor& mask, double p, at::ScalarType type, uint64_t seed, uint64_t offset) {
  const double drops = at::scalar_tensor(p, at::kDouble).to(type).to(at::kDouble).item<double>();
  const at::Tensor weights = at::pow(2, at::arange(8)).to(at::kByte);
  const at::Tensor bytes = mask.view(-1);
  const at::Generator generator = cpu_generator(seed, offset);
  for (int64_t first = 0; first < bytes.numel(); first += kBytesAtOnce) {
    const at::Tensor part = bytes.narrow(0, first, std::min(kBytesAtOnce, bytes.numel() - first));
    const at::Tensor uniform = at::rand({part.numel(), 8}, generator, at::TensorOptions().dtype(at::kDouble));
    part.copy_(((uniform >= drops).to(at::kByte) * weights).sum(-1, /*keepdim=*/false, at::kByte));
  }
}

Plan gen_mask_v2(std::vector<int64_t> shape, double p, int64_t seed, int64_t offset, int32_t p_type, at::Tensor mask) {
  check_mask(shape, p, mask);
  const at::ScalarType type = scalar_type(p_type);
  return [=] { draw(mask, p, type, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)); };
}

Plan gen_mask(std::vector<int64_t> shape, double p, int64_t seed, int64_t offset, at::Tensor mask) {
  check_mask(shape, p, mask);
  return [=] { draw(mask, p, at::kFloat, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)); };
}

// The seed and the first part of the offset are read on the stream: a graph's replays change them.
Plan gen_mask_v2_tensor(std::vector<int64_t> shape, double p, at::Tensor seed, at::Tensor offset, int64_t more_offset,
                        int32_t p_type, at::Tensor mask) {
  check_mask(shape, p, mask);
  require_dtype(seed, "seed", {at::kLong});
  require_dtype(offset, "offset", {at::kLong});
  const at::ScalarType type = scalar_type(p_type);
  return [=] {
    draw(mask, p, type, static_cast<uint64_t>(seed.item<int64_t>()),
         static_cast<uint64_t>(offset.item<int64_t>() + more_offset));
  };
}

Plan do_mask(at::Tensor x, at::Tensor mask, double p, at::Tensor out) {
  require_dtype(x, "self", {at::kHalf, at::kBFloat16, at::kFloat});
  require(p >= 0 && p <= 1, "prob=", p, " is not between 0 and 1");
  require_dtype(mask, "mask", {at::kByte});
  require(mask.numel() * 8 >= x.numel(), "mask has ", mask.numel(), " bytes for ", x.numel(), " values");
  return [=] {
    const at::Tensor kept = kept_by(mask, x.numel()).view(x.sizes());
    const double scale = p == 1 ? 0 : 1 / (1 - p);
    out.copy_(at::where(kept, x.to(at::kFloat) * scale, 0));
  };
}

}  // namespace

at::Tensor kept_by(const at::Tensor& mask, int64_t numel) {
  const at::Tensor bits = at::bitwise_right_shift(mask.flatten().unsqueeze(1), at::arange(8, at::kByte)).bitwise_and(1);
  return bits.flatten().narrow(0, 0, numel).to(at::kBool);
}

ACLNN_OP(aclnnDropoutGenMask, gen_mask);
ACLNN_OP(aclnnDropoutGenMaskV2, gen_mask_v2);
ACLNN_OP(aclnnDropoutGenMaskV2Tensor, gen_mask_v2_tensor);
ACLNN_OP(aclnnDropoutDoMask, do_mask);

}  // namespace vllm_npu::emulator::aclnn
