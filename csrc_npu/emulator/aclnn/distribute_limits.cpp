#include "distribute_limits.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "refusal.h"
#include "runtime/runtime.h"

namespace vllm_npu::emulator::aclnn {
namespace {

struct Range {
  int64_t least;
  int64_t most;
};

struct Limits {
  const char* source;
  std::vector<Range> world_sizes;
  Range tokens;
  Range width;
  int64_t width_multiple;
  int64_t moe_experts;
  int64_t experts_per_rank;
  int64_t experts_per_rank_times_world_size;
  int64_t top_k;
};

constexpr int64_t kUnlimited = INT64_MAX;
constexpr int64_t kVersion1A3Width = 7168;
constexpr int64_t kVersion1A3TopK = 8;

const Limits kA2{"the document of aclnnMoeDistributeDispatchV2 for Atlas A2, CANN 8.5, full mesh",
                 {{2, 8}, {16, 16}, {32, 32}, {64, 64}, {128, 128}, {256, 256}},
                 {1, 256},
                 {32, 7168},
                 32,
                 512,
                 24,
                 kUnlimited,
                 16};
const Limits kA3{"the document of aclnnMoeDistributeDispatchV2 for Atlas A3, CANN 8.5, full mesh",
                 {{2, 768}},
                 {1, 512},
                 {1024, 8192},
                 1,
                 1024,
                 kUnlimited,
                 2048,
                 16};
const std::vector<Range> kVersion1A2WorldSizes{{16, 16}, {32, 32}, {64, 64}};
const std::vector<Range> kVersion1A3WorldSizes{{8, 8},     {16, 16},   {32, 32},   {64, 64},
                                               {128, 128}, {144, 144}, {256, 256}, {288, 288}};

Limits limits_of(Family family, bool version_1) {
  Limits limits = family == Family::kA2 ? kA2 : kA3;  // no document gives A5's; it gets A3's
  if (!version_1) return limits;
  limits.world_sizes = family == Family::kA2 ? kVersion1A2WorldSizes : kVersion1A3WorldSizes;
  if (family != Family::kA2) {
    limits.width = {kVersion1A3Width, kVersion1A3Width};
    limits.top_k = kVersion1A3TopK;
  }
  return limits;
}

bool contains(const std::vector<Range>& ranges, int64_t value) {
  for (const Range& range : ranges) {
    if (range.least <= value && value <= range.most) return true;
  }
  return false;
}

std::string as_text(const std::vector<Range>& ranges) {
  std::string text;
  for (const Range& range : ranges) {
    if (!text.empty()) text += ", ";
    text += std::to_string(range.least);
    if (range.most != range.least) text += ".." + std::to_string(range.most);
  }
  return text;
}

bool limits_are_off() {
  const char* setting = std::getenv("VLLM_NPU_EMULATOR_LIMITS");
  const std::string text = setting == nullptr ? "" : setting;
  require(text.empty() || text == "device" || text == "none", "VLLM_NPU_EMULATOR_LIMITS=", text,
          " is not known; there are device and none");
  return text == "none";
}

}  // namespace

void check_limits(const DistributeSizes& sizes) {
  const Soc& soc = current_soc();
  require(soc.family != Family::k310P, soc.name, " has no MoE dispatch and combine; use all-gather instead");
  if (limits_are_off()) return;
  const Limits limits = limits_of(soc.family, sizes.version_1);
  const auto check = [&](bool fits, const char* name, int64_t value, const std::string& allowed) {
    require(fits, name, "=", value, " is not one that ", soc.name, " takes: ", allowed, " (", limits.source,
            "); VLLM_NPU_EMULATOR_LIMITS=none lets the emulator take it");
  };
  const auto check_most = [&](const char* name, int64_t value, int64_t most) {
    check(value <= most, name, value, "at most " + std::to_string(most));
  };
  check(contains(limits.world_sizes, sizes.world_size), "ep_world_size", sizes.world_size, as_text(limits.world_sizes));
  check(contains({limits.tokens}, sizes.tokens), "tokens of a rank", sizes.tokens, as_text({limits.tokens}));
  check(contains({limits.width}, sizes.width) && sizes.width % limits.width_multiple == 0, "H", sizes.width,
        as_text({limits.width}) + ", multiples of " + std::to_string(limits.width_multiple));
  check_most("moe_expert_num", sizes.moe_experts, limits.moe_experts);
  check_most("experts of a rank", sizes.experts_per_rank, limits.experts_per_rank);
  check_most("experts of a rank times ep_world_size", sizes.experts_per_rank * sizes.world_size,
             limits.experts_per_rank_times_world_size);
  check_most("K", sizes.top_k, limits.top_k);
}

}  // namespace vllm_npu::emulator::aclnn
