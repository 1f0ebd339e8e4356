#include "settings.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

namespace vllm_npu::emulator {
namespace {

constexpr int kDefaultDevices = 16;  // devices of an A3 node
constexpr char kDefaultCannVersion[] = "8.5.0";
constexpr std::uint64_t kMaxDevices = 1024;
constexpr std::uint64_t kMaxMemoryGb = 1024;
constexpr std::uint64_t kMaxLogLevel = 3;  // errors

struct Settings {
  int devices = 0;
  std::size_t memory_bytes = 0;
  std::optional<std::uint64_t> seed;
  std::optional<std::uint64_t> log_level;
  bool limits_are_off = false;
  bool undefined_is_zero = false;
  std::string fault;
};

// Returns the variable as a whole number. If it is something else, `fault` receives an error text.
std::optional<std::uint64_t> read_number(const char* name, std::uint64_t largest, std::string& fault) {
  const std::string text = environment(name, "");
  if (text.empty()) return std::nullopt;
  errno = 0;
  char* end = nullptr;
  const std::uint64_t value = std::strtoull(text.c_str(), &end, 10);
  const bool is_number = std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!is_number || errno != 0 || *end != '\0' || value > largest) {
    fault = std::string(name) + "=" + text + ": set it to a whole number from 0 to " + std::to_string(largest);
    return std::nullopt;
  }
  return value;
}

// Whether the variable is `other`. If it is neither `other` nor `usual`, `fault` receives an error text.
bool read_switch(const char* name, const std::string& usual, const std::string& other, std::string& fault) {
  const std::string text = environment(name, usual.c_str());
  if (text != usual && text != other) fault = std::string(name) + "=" + text + ": set it to " + usual + " or " + other;
  return text == other;
}

// The number of devices that ASCEND_RT_VISIBLE_DEVICES makes visible. They are the listed devices before the first one
// that does not exist.
int count_visible(const std::string& list, int existing) {
  int count = 0;
  std::size_t position = 0;
  while (position <= list.size()) {
    const std::size_t comma = std::min(list.find(',', position), list.size());
    const std::string item = list.substr(position, comma - position);
    char* end = nullptr;
    const long device = std::strtol(item.c_str(), &end, 10);
    if (end == item.c_str() || device < 0 || device >= existing) break;
    ++count;
    position = comma + 1;
  }
  return count;
}

int read_devices(std::string& fault) {
  // A launcher may start more ranks than that. The node then has a device for each rank.
  const auto local_ranks = read_number("LOCAL_WORLD_SIZE", kMaxDevices, fault);
  int count = std::max(kDefaultDevices, static_cast<int>(local_ranks.value_or(0)));
  if (const auto devices = read_number("VLLM_NPU_EMULATOR_DEVICES", kMaxDevices, fault)) {
    count = static_cast<int>(*devices);
  }
  const std::string visible = environment("ASCEND_RT_VISIBLE_DEVICES", "");
  return visible.empty() ? count : count_visible(visible, count);
}

Settings read_settings() {
  Settings settings;
  settings.devices = read_devices(settings.fault);
  settings.memory_bytes = read_number("VLLM_NPU_EMULATOR_MEMORY_GB", kMaxMemoryGb, settings.fault).value_or(0) << 30;
  settings.seed = read_number("VLLM_NPU_EMULATOR_ASYNC", UINT64_MAX, settings.fault);
  settings.log_level = read_number("VLLM_NPU_EMULATOR_LOG", kMaxLogLevel, settings.fault);
  settings.limits_are_off = read_switch("VLLM_NPU_EMULATOR_LIMITS", "device", "none", settings.fault);
  settings.undefined_is_zero = read_switch("VLLM_NPU_EMULATOR_UNDEFINED", "nan", "zero", settings.fault);
  return settings;
}

const Settings& settings() {
  static const Settings read = read_settings();
  return read;
}

}  // namespace

std::string environment(const char* name, const char* fallback) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? text : fallback;
}

int visible_device_count() { return settings().devices; }

int count_devices_now() {
  std::string fault;  // aclInit reports it
  return read_devices(fault);
}

std::size_t configured_memory_bytes() { return settings().memory_bytes; }
std::optional<std::uint64_t> asynchronous_seed() { return settings().seed; }
std::optional<std::uint64_t> least_log_level() { return settings().log_level; }
// The version is read apart from the other settings, because torch_npu asks for it during its import. A process may
// import torch_npu and then fork ranks with other settings.
const std::string& cann_version() {
  static const std::string read = environment("VLLM_NPU_EMULATOR_CANN", kDefaultCannVersion);
  return read;
}

bool limits_are_off() { return settings().limits_are_off; }
bool undefined_is_zero() { return settings().undefined_is_zero; }
const std::string& settings_fault() { return settings().fault; }

}  // namespace vllm_npu::emulator
