#include "soc.h"

#include <array>

#include "runtime.h"
#include "settings.h"

namespace vllm_npu::emulator {
namespace {

constexpr char kDefaultSoc[] = "Ascend910B1";
constexpr std::size_t kGb = std::size_t{1} << 30;
constexpr std::size_t kMb = std::size_t{1} << 20;

struct KnownSoc {
  const char* prefix;  // of the name
  Family family;
  int cube_cores;
  int vector_cores;
  std::size_t memory_bytes;
  std::size_t l2_bytes;
};

// The prefixes are those of vllm_npu/emulator/soc.py, and a test compares them. Core counts and sizes are nominal, and
// nothing in the emulator depends on the core counts.
constexpr std::array<KnownSoc, 7> kKnown{{
    {"Ascend910B1", Family::kA2, 24, 48, 64 * kGb, 192 * kMb},
    {"Ascend910B2", Family::kA2, 24, 48, 64 * kGb, 192 * kMb},
    {"Ascend910B3", Family::kA2, 20, 40, 64 * kGb, 192 * kMb},
    {"Ascend910B4", Family::kA2, 20, 40, 32 * kGb, 96 * kMb},
    {"Ascend910_93", Family::kA3, 24, 48, 64 * kGb, 192 * kMb},
    {"Ascend310P", Family::k310P, 8, 7, 24 * kGb, 16 * kMb},
    {"Ascend950", Family::kA5, 32, 64, 128 * kGb, 128 * kMb},
}};

struct Lookup {
  Soc soc;
  std::string fault;
};

Lookup look_up(const std::string& name) {
  for (const KnownSoc& known : kKnown) {
    if (name.rfind(known.prefix, 0) != 0) continue;
    const std::size_t configured = configured_memory_bytes();
    return {{name, known.family, known.cube_cores, known.vector_cores,
             configured != 0 ? configured : known.memory_bytes, known.l2_bytes},
            ""};
  }
  std::string prefixes;
  for (const KnownSoc& known : kKnown) prefixes += std::string(prefixes.empty() ? "" : ", ") + known.prefix;
  return {{name, Family::kA2, 0, 0, 0, 0},
          "VLLM_NPU_EMULATOR_SOC=" + name + " is not emulated; use a name that starts with one of " + prefixes};
}

const Lookup& lookup() {
  static const Lookup found = look_up(environment("VLLM_NPU_EMULATOR_SOC", kDefaultSoc));
  return found;
}

}  // namespace

const Soc& current_soc() { return lookup().soc; }
const std::string& soc_fault() { return lookup().fault; }

}  // namespace vllm_npu::emulator
