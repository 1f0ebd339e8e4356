// Start-up, devices, contexts, versions and settings of the device.
#include "device.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "runtime.h"
#include "settings.h"
#include "soc.h"
#include "stream.h"

namespace vllm_npu::emulator {
namespace {

thread_local int device_of_thread = kNoDevice;
std::atomic<bool> initialized{false};
std::atomic<int> default_device{kNoDevice};  // of threads that set none; the configuration of aclInit names it

// Every context is the primary context of its device. There are no other contexts.
struct Context {
  int device;
};

std::vector<Context>& contexts() {
  static auto* all = [] {
    auto* made = new std::vector<Context>;
    for (int device = 0; device < visible_device_count(); ++device) made->push_back({device});
    return made;
  }();
  return *all;
}

// Devices whose primary context a thread has used since the last reset.
std::mutex active_mutex;
std::set<int>& active_devices() {
  static auto* all = new std::set<int>;
  return *all;
}

int check_device(const char* function, std::int64_t device) {
  if (device >= 0 && device < visible_device_count()) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_INVALID_DEVICEID,
              "%s: there is no emulated device %lld, only 0 to %d; VLLM_NPU_EMULATOR_DEVICES sets their number, "
              "ASCEND_RT_VISIBLE_DEVICES hides some",
              function, static_cast<long long>(device), visible_device_count() - 1);
}

std::mutex parameters_mutex;
std::map<aclSysParamOpt, std::int64_t>& parameters() {
  static auto* all = new std::map<aclSysParamOpt, std::int64_t>;
  return *all;
}

int get_parameter(aclSysParamOpt option, std::int64_t* value) {
  const std::lock_guard<std::mutex> lock(parameters_mutex);
  *value = parameters()[option];  // 0 (off) until it is set
  return ACL_SUCCESS;
}

int set_parameter(aclSysParamOpt option, std::int64_t value) {
  const std::lock_guard<std::mutex> lock(parameters_mutex);
  parameters()[option] = value;
  return ACL_SUCCESS;
}

// The default device in aclInit's configuration: {"defaultDevice": {"default_device": "0"}}. CANN's document of aclInit
// names it; torch_npu's acl_default.json has it.
int configured_default_device(const char* path) {
  std::ifstream file(path == nullptr ? "" : path);
  const std::string text(std::istreambuf_iterator<char>(file), {});
  std::smatch found;
  const std::regex pattern(R"re("default_device"\s*:\s*"([0-9]{1,4})")re");
  return std::regex_search(text, found, pattern) ? std::stoi(found[1]) : kNoDevice;
}

}  // namespace

int current_device() { return device_of_thread; }

void set_current_device(int device) {
  device_of_thread = device;
  if (device == kNoDevice) return;
  const std::lock_guard<std::mutex> lock(active_mutex);
  active_devices().insert(device);
}

int require_device(const char* function) {
  if (device_of_thread == kNoDevice) set_current_device(default_device);
  if (device_of_thread != kNoDevice) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_CONTEXT_NULL, "%s: the thread has no current device; call aclrtSetDevice first", function);
}

}  // namespace vllm_npu::emulator

using namespace vllm_npu::emulator;

// --- Start and end ---

aclError aclInit(const char* configuration) {
  trace(__func__, "soc=%s", current_soc().name.c_str());
  for (const std::string& fault : {soc_fault(), settings_fault()}) {
    if (fault.empty()) continue;
    std::fprintf(stderr, "vllm_npu emulator: %s\n", fault.c_str());  // torch_npu does not show the text of this call
    return fail(ACL_ERROR_INVALID_PARAM, "aclInit: %s", fault.c_str());
  }
  if (initialized.exchange(true)) return ACL_ERROR_REPEAT_INITIALIZE;
  const int device = configured_default_device(configuration);
  if (device != kNoDevice) {
    if (const int code = check_device(__func__, device)) return code;
  }
  default_device = device;
  return ACL_SUCCESS;
}

aclError aclFinalize() {
  trace(__func__);
  if (!initialized.exchange(false)) return ACL_ERROR_REPEAT_FINALIZE;
  synchronize_everything();
  return ACL_SUCCESS;
}

// --- Devices and contexts ---

// torch_npu counts before it starts the device, and a program may hide devices after that count.
aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = static_cast<uint32_t>(initialized ? visible_device_count() : count_devices_now());
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  trace(__func__, "%d", device);
  if (const int code = check_device(__func__, device)) return code;
  set_current_device(device);
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* device) {
  // torch_npu calls this before it sets a device, and expects this code. No error text is recorded.
  if (current_device() == kNoDevice) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current_device();
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t device) {
  trace(__func__, "%d", device);
  if (const int code = check_device(__func__, device)) return code;
  const int code = synchronize_device(device);
  if (current_device() == device) set_current_device(kNoDevice);
  const std::lock_guard<std::mutex> lock(active_mutex);
  active_devices().erase(device);
  return code;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (current_device() == kNoDevice) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = &contexts()[current_device()];
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  for (const Context& known : contexts()) {
    if (&known != context) continue;
    set_current_device(known.device);
    return ACL_SUCCESS;
  }
  return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtSetCurrentContext: %p is no context", context);
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  if (const int code = check_device(__func__, device)) return code;
  if (flags != nullptr) *flags = 0;
  const std::lock_guard<std::mutex> lock(active_mutex);
  if (active != nullptr) *active = static_cast<int32_t>(active_devices().count(device));
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can_access, int32_t device, int32_t peer) {
  if (const int code = check_device(__func__, device)) return code;
  if (const int code = check_device(__func__, peer)) return code;
  *can_access = device != peer;
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) { return check_device(__func__, peer); }

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user_device, int32_t* const logic_device) {
  if (const int code = check_device(__func__, user_device)) return code;
  *logic_device = user_device;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid* uuid) {
  if (const int code = check_device(__func__, device)) return code;
  *uuid = {};
  std::snprintf(uuid->bytes, sizeof uuid->bytes, "emulated-%d", device);
  return ACL_SUCCESS;
}

// --- What the chip is ---

const char* aclrtGetSocName() { return current_soc().name.c_str(); }

aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t* value) {
  if (const int code = check_device(__func__, device)) return code;
  const Soc& soc = current_soc();
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      *value = soc.cube_cores;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      *value = soc.vector_cores;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      *value = static_cast<int64_t>(soc.memory_bytes);
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      *value = static_cast<int64_t>(soc.l2_bytes);
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_PHY_CHIP_ID:
      *value = device;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_IS_VIRTUAL:
      *value = 0;
      return ACL_SUCCESS;
    default:
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtGetDeviceInfo: attribute %d is not emulated", attribute);
  }
}

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo kind, int64_t* value) {
  if (const int code = check_device(__func__, device)) return code;
  switch (kind) {
    case ACL_DEVICE_INFO_AI_CORE_NUM:
      *value = current_soc().cube_cores;
      return ACL_SUCCESS;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
      *value = current_soc().vector_cores;
      return ACL_SUCCESS;
    case ACL_DEVICE_INFO_L2_SIZE:
      *value = static_cast<int64_t>(current_soc().l2_bytes);
      return ACL_SUCCESS;
    default:
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclGetDeviceCapability: %d is not emulated", kind);
  }
}

aclError aclGetCannAttributeList(const aclCannAttr** attributes, size_t* count) {
  static constexpr std::array<aclCannAttr, 2> kAll{ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16};
  *attributes = kAll.data();
  *count = current_soc().family == Family::k310P ? 0 : kAll.size();
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  const bool known = attribute == ACL_CANN_ATTR_INF_NAN || attribute == ACL_CANN_ATTR_BF16;
  *value = known && current_soc().family != Family::k310P;
  return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char* package, char* version) {
  trace(__func__, "%s", package);
  std::snprintf(version, ACL_PKG_VERSION_MAX_SIZE, "%s", cann_version().c_str());
  return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  *version = {};
  std::snprintf(version->version, sizeof version->version, "%s", cann_version().c_str());
  std::sscanf(cann_version().c_str(), "%63[^.].%63[^.].%63[^.].%63s", version->majorVersion, version->minorVersion,
              version->releaseVersion, version->patchVersion);
  return ACL_SUCCESS;
}

// --- Settings that are stored or checked and have no effect: the CPU computes in the same way with all of them ---

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) { return get_parameter(option, value); }
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { return set_parameter(option, value); }
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt option, int64_t* value) { return get_parameter(option, value); }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return set_parameter(option, value); }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }

aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual_timeout) {
  *actual_timeout = timeout;
  return ACL_SUCCESS;
}
