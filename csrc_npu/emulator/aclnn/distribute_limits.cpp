#include "distribute_limits.h"

#include <algorithm>
#include <string>
#include <vector>

#include "hccl/communicator.h"
#include "runtime/settings.h"

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
constexpr int64_t kVersion1Experts = 512;
constexpr int64_t kFullmeshV2TopK = 12;

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
const Limits kA2Hierarchy{"the document of aclnnMoeDistributeDispatchV2 for Atlas A2, CANN 8.5, hierarchy",
                          {{16, 16}, {32, 32}, {64, 64}},
                          {1, 512},
                          {32, 10240},
                          32,
                          512,
                          kUnlimited,
                          kUnlimited,
                          16};
const std::vector<Range> kA3HierarchyWorldSizes{{16, 16},   {32, 32},   {48, 48},   {64, 64},   {80, 80},   {96, 96},
                                                {112, 112}, {128, 128}, {144, 144}, {160, 160}, {176, 176}, {192, 192},
                                                {208, 208}, {224, 224}, {240, 240}, {256, 256}};
const Limits kA3Hierarchy{"the document of aclnnMoeDistributeDispatchV2 for Atlas A3, CANN 8.5, hierarchy",
                          kA3HierarchyWorldSizes,
                          {1, 256},
                          {1024, 8192},
                          1,
                          512,
                          kUnlimited,
                          kUnlimited,
                          16};
const std::vector<Range> kVersion1A2WorldSizes{{16, 16}, {32, 32}, {64, 64}};
const std::vector<Range> kVersion1A3WorldSizes{{8, 8},     {16, 16},   {32, 32},   {64, 64},
                                               {128, 128}, {144, 144}, {256, 256}, {288, 288}};

Limits limits_of(Family family, bool version_1, bool hierarchical) {
  if (hierarchical) return family == Family::kA2 ? kA2Hierarchy : kA3Hierarchy;
  Limits limits = family == Family::kA2 ? kA2 : kA3;  // A5 has those of A3: aclnnMoeDistributeDispatchV4
  if (!version_1) return limits;
  limits.world_sizes = family == Family::kA2 ? kVersion1A2WorldSizes : kVersion1A3WorldSizes;
  if (family != Family::kA2) {
    limits.width = {kVersion1A3Width, kVersion1A3Width};
    limits.top_k = kVersion1A3TopK;
    limits.moe_experts = kVersion1Experts;
    limits.experts_per_rank_times_world_size = kUnlimited;
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

int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The MB of the group's buffer that one dispatch and its combine need, and the formula as source.
struct BufferNeed {
  int64_t mb;
  const char* source;
};

BufferNeed buffer_need(Family family, const Placement& place, bool version_1, int64_t tokens, int64_t width,
                       int64_t top_k) {
  constexpr int64_t kMb = 1 << 20;
  constexpr int64_t kWindows = 2;         // calls use them in turn
  constexpr int64_t kBytes = 2;           // bytes of a 16-bit value
  constexpr int64_t kBlock = 512;         // bytes of a block of a window
  constexpr int64_t kBlockPayload = 480;  // bytes of a block that fullmesh_v2 uses for rows; the rest are flags
  constexpr int64_t kRowFacts = 64;       // bytes that travel with each row to its expert
  const auto mb = [](int64_t bytes) { return rounded_up(bytes, kMb) / kMb; };
  const int64_t row = kBytes * width;
  if (place.is_hierarchical()) {
    constexpr int64_t kRanksOfGroup = 4;
    const int64_t row_and_facts = row + 4 * 4 * rounded_up(top_k, 8);
    if (family == Family::kA2) {
      return {
          mb((place.moe_experts + place.world_size / kRanksOfGroup) * rounded_up(tokens * row_and_facts, kBlock)) + 8,
          "(E + W / 4) * al512(B * (2H + 16 * al8(K))) + 8 MB, the hierarchy on A2"};
    }
    return {mb(place.moe_experts * tokens * row_and_facts) + 404,
            "E * B * (2H + 16 * al8(K)) + 404 MB, the hierarchy on A3"};
  }
  if (family == Family::kA2) {
    const int64_t copies = std::min(place.experts_per_rank(), top_k);
    return {mb(kWindows * (tokens * place.world_size * copies * row + 2 * kMb)),
            "2 * (B * W * min(L, K) * 2H + 2 MB), the full mesh on A2"};
  }
  const int64_t slots = place.experts_per_rank() * place.world_size;
  if (version_1) {
    return {mb(kWindows * tokens * kBytes * (width + 128) * (slots + top_k + 1)) + 2,
            "2 + 2 * B * 2(H + 128) * (L * W + K + 1) / MB, version 1 on A3"};
  }
  const bool is_fullmesh_v2 = place.comm_alg == "fullmesh_v2";
  const auto blocks = [&](int64_t bytes) {
    return rounded_up(bytes, is_fullmesh_v2 ? kBlockPayload : kBlock) / (is_fullmesh_v2 ? kBlockPayload : kBlock) *
           kBlock;
  };
  const int64_t bytes = kWindows * (slots * tokens * blocks(rounded_up(row, 32) + kRowFacts) +
                                    (top_k + place.shared_experts) * tokens * blocks(row));
  return {mb(bytes), is_fullmesh_v2 ? "2 * (L * B * W * b(al32(2H) + 64) + (K + S) * B * b(2H)), b(x) = ceil(x / 480) "
                                      "* 512, fullmesh_v2 on A3"
                                    : "2 * (L * B * W * al512(al32(2H) + 64) + (K + S) * B * al512(2H)), the full mesh "
                                      "on A3"};
}

void check_buffer(const Placement& place, bool version_1, int64_t tokens, int64_t width, int64_t top_k) {
  const std::shared_ptr<Communicator> group = find_communicator_by_name(place.group);
  if (group == nullptr) return;  // exchange() refuses it
  const BufferNeed need = buffer_need(current_soc().family, place, version_1, tokens, width, top_k);
  require(need.mb <= group->buffer_mb(), "HCCL_BUFFSIZE of group_ep ", place.group, " is ", group->buffer_mb(),
          " MB, and these sizes need ", need.mb, " (", need.source, "); set HCCL_BUFFSIZE=", need.mb,
          ", or hccl_buffer_size in the group's options; VLLM_NPU_EMULATOR_LIMITS=none lets the emulator take it");
}

}  // namespace

void check_limits(const Placement& place, bool version_1, int64_t own_tokens, int64_t width, int64_t top_k) {
  const int64_t tokens = std::max(own_tokens, place.max_tokens());
  const Soc& soc = current_soc();
  require(soc.family != Family::k310P, soc.name, " has no MoE dispatch and combine; use all-gather instead");
  if (limits_are_off()) return;
  Limits limits = limits_of(soc.family, version_1, place.is_hierarchical());
  if (place.comm_alg == "fullmesh_v2") limits.top_k = kFullmeshV2TopK;
  const auto check = [&](bool fits, const char* name, int64_t value, const std::string& allowed) {
    require(fits, name, "=", value, " is refused: ", soc.name, " takes ", allowed, " (", limits.source,
            "); VLLM_NPU_EMULATOR_LIMITS=none lets the emulator take it");
  };
  const auto check_most = [&](const char* name, int64_t value, int64_t most) {
    check(value <= most, name, value, "at most " + std::to_string(most));
  };
  check(contains(limits.world_sizes, place.world_size), "ep_world_size", place.world_size, as_text(limits.world_sizes));
  check(contains({limits.tokens}, tokens), "tokens of a rank", tokens, as_text({limits.tokens}));
  check(contains({limits.width}, width) && width % limits.width_multiple == 0, "H", width,
        as_text({limits.width}) + ", multiples of " + std::to_string(limits.width_multiple));
  check_most("moe_expert_num", place.moe_experts, limits.moe_experts);
  check_most("experts of a rank", place.experts_per_rank(), limits.experts_per_rank);
  check_most("experts of a rank times ep_world_size", place.experts_per_rank() * place.world_size,
             limits.experts_per_rank_times_world_size);
  check_most("K", top_k, limits.top_k);
  check_buffer(place, version_1, tokens, width, top_k);
}

}  // namespace vllm_npu::emulator::aclnn
