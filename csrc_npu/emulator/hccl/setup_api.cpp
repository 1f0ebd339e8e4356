// HCCL's calls that create, describe and destroy communicators.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <regex>
#include <thread>
#include <vector>

#include "communicator.h"
#include "group.h"
#include "runtime/device.h"
#include "runtime/settings.h"

namespace vllm_npu::emulator {
namespace {

// HCCL's defaults, in seconds.
constexpr int kDefaultConnectTimeout = 120;
constexpr int kDefaultExecutionTimeout = 1836;

// Handles are the addresses of the communicators.
struct Registry {
  std::mutex mutex;
  std::map<HcclComm, std::shared_ptr<Communicator>> by_handle;
};

Registry& registry() {
  static auto* all = new Registry;  // outlives the streams' threads
  return *all;
}

std::chrono::seconds seconds_from(const char* variable, int fallback) {
  const int seconds = std::atoi(environment(variable, "").c_str());
  return std::chrono::seconds(seconds > 0 ? seconds : fallback);
}

// The buffer size that HCCL uses: the group's setting, else HCCL_BUFFSIZE, else 200.
std::uint32_t buffer_mb(const HcclCommConfig* config) {
  if (config != nullptr && config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET) return config->hcclBufferSize;
  const int mb = std::atoi(environment("HCCL_BUFFSIZE", "").c_str());
  return mb > 0 ? static_cast<std::uint32_t>(mb) : HCCL_COMM_DEFAULT_BUFFSIZE;
}

// Whether HCCL takes the text of algorithms, of HCCL_ALGO or of a group: levels of all operations, or of each named
// one. Contract: HCCL's alg_env_config.cc. The algorithms themselves have no effect here.
bool names_algorithms(std::string text) {
  text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
  const std::string level = "level[0-3]:(null|ring|pipeline|fullmesh|H-D_R|pairwise|NHR|NHR_V1|AHC|AHC_BROKE|NB|NA)";
  const std::string levels = level + "(;" + level + "){0,3}";
  const std::string operation =
      "(broadcast|allreduce|reduce|send|receive|allgather|reducescatter|alltoall|gather|scatter|sendrecv|others)=" +
      levels;
  return std::regex_match(text, std::regex(levels + "|" + operation + "(/" + operation + ")*"));
}

int open_communicator(const char* function, const std::string& segment_name, std::uint32_t rank, std::uint32_t size,
                      const HcclCommConfig* config, HcclComm* handle) {
  if (handle == nullptr) return fail(HCCL_E_PTR, "%s: the place for the communicator is null", function);
  if (const int code = refuse_in_group(function)) return code;
  if (require_device(function) != ACL_SUCCESS) return HCCL_E_RUNTIME;
  std::string name = segment_name.substr(1);  // without the slash of shared memory's names
  auto timeout = seconds_from("HCCL_EXEC_TIMEOUT", kDefaultExecutionTimeout);
  if (config != nullptr) {
    if (config->hcclCommName[0] != '\0')
      name.assign(config->hcclCommName, strnlen(config->hcclCommName, COMM_NAME_MAX_LENGTH));
    if (config->hcclExecTimeOut > 0) timeout = std::chrono::seconds(config->hcclExecTimeOut);
  }
  std::string algorithms = environment("HCCL_ALGO", "");
  if (config != nullptr && config->hcclAlgo[0] != '\0') {
    algorithms.assign(config->hcclAlgo, strnlen(config->hcclAlgo, HCCL_COMM_ALGO_MAX_LENGTH));
  }
  if (!algorithms.empty() && !names_algorithms(algorithms)) {
    return fail(HCCL_E_PARA,
                "%s: HCCL has no algorithms %.100s; write level0:NA;level1:ring, or "
                "allreduce=level0:NA;level1:ring/allgather=...",
                function, algorithms.c_str());
  }
  trace(function, "group=%s rank=%u size=%u", name.c_str(), rank, size);
  std::shared_ptr<Communicator> communicator;
  const auto connect_timeout = seconds_from("HCCL_CONNECT_TIMEOUT", kDefaultConnectTimeout);
  const int code = Communicator::open(segment_name, static_cast<int>(rank), static_cast<int>(size), name,
                                      connect_timeout, timeout, communicator);
  if (code != HCCL_SUCCESS) return code;
  communicator->set_buffer_mb(buffer_mb(config));
  const std::lock_guard<std::mutex> lock(registry().mutex);
  *handle = communicator.get();
  registry().by_handle[*handle] = communicator;
  return HCCL_SUCCESS;
}

std::string segment_of(const HcclRootInfo& root) {
  return std::string(root.internal, strnlen(root.internal, HCCL_ROOT_INFO_BYTES));
}

}  // namespace

std::shared_ptr<Communicator> find_communicator(HcclComm handle) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().by_handle.find(handle);
  if (found != registry().by_handle.end()) return found->second;
  fail(HCCL_E_PARA, "%p is no HCCL communicator, or one that has been destroyed", handle);
  return nullptr;
}

std::shared_ptr<Communicator> find_communicator_by_name(const std::string& name) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  for (const auto& entry : registry().by_handle) {
    if (entry.second->name() == name) return entry.second;
  }
  return nullptr;
}

}  // namespace vllm_npu::emulator

using namespace vllm_npu::emulator;

HcclResult HcclGetRootInfo(HcclRootInfo* root) {
  static std::atomic<unsigned> count{0};
  trace(__func__);
  *root = {};
  // With VLLM_NPU_EMULATOR_RUN in the name, the launcher finds the shared memory of killed processes.
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  std::snprintf(root->internal, sizeof root->internal, "/vllm_npu_emulator.%s.%d.%u.%lx",
                environment("VLLM_NPU_EMULATOR_RUN", "0").substr(0, 64).c_str(), getpid(), count++,
                static_cast<unsigned long>(now));
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* root, uint32_t rank, HcclComm* communicator) {
  if (root == nullptr) return HcclResult(fail(HCCL_E_PTR, "%s: the root info is null", __func__));
  return HcclResult(open_communicator(__func__, segment_of(*root), rank, size, nullptr, communicator));
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* root, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* communicator) {
  if (root == nullptr) return HcclResult(fail(HCCL_E_PTR, "%s: the root info is null", __func__));
  return HcclResult(open_communicator(__func__, segment_of(*root), rank, size, config, communicator));
}

// Creates a group of this process's devices, with a communicator for each. A thread for each device connects it, as a
// thread for each device must make each later call: with synchronous streams, a collective waits for the other devices'
// calls.
HcclResult HcclCommInitAll(uint32_t count, int32_t* devices, HcclComm* communicators) {
  if (devices == nullptr || communicators == nullptr || count == 0) {
    return HcclResult(fail(HCCL_E_PTR, "%s: %u devices, or a null pointer", __func__, count));
  }
  HcclRootInfo root;
  HcclGetRootInfo(&root);
  struct Outcome {
    int code;
    std::string text;
  };
  std::vector<Outcome> outcomes(count);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < count; ++rank) {
    threads.emplace_back([&, rank, function = __func__] {
      int code = aclrtSetDevice(devices[rank]);
      if (code == ACL_SUCCESS) {
        code = open_communicator(function, segment_of(root), rank, count, nullptr, &communicators[rank]);
      }
      outcomes[rank] = {code, code == HCCL_SUCCESS ? "" : last_error_text()};
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Outcome& outcome : outcomes) {
    if (outcome.code != HCCL_SUCCESS) return HcclResult(fail(outcome.code, "%s", outcome.text.c_str()));
  }
  return HCCL_SUCCESS;
}

// Creates a group of some ranks of the parent. All of these ranks make the call, with the same `ranks` and `id`.
HcclResult HcclCreateSubCommConfig(HcclComm* parent_handle, uint32_t size, uint32_t* ranks, uint64_t id, uint32_t rank,
                                   HcclCommConfig* config, HcclComm* communicator) {
  if (communicator == nullptr || parent_handle == nullptr) {
    return HcclResult(fail(HCCL_E_PTR, "%s: a communicator is null", __func__));
  }
  const auto parent = find_communicator(*parent_handle);
  if (parent == nullptr) return HCCL_E_PARA;
  *communicator = nullptr;
  if (ranks == nullptr) return HCCL_SUCCESS;  // this rank is not one of them
  std::string segment_name = parent->segment_name() + ".";
  char id_text[24];
  std::snprintf(id_text, sizeof id_text, "%lx", static_cast<unsigned long>(id));
  segment_name += id_text;
  return HcclResult(open_communicator(__func__, segment_name, rank, size, config, communicator));
}

HcclResult HcclCommDestroy(HcclComm handle) {
  trace(__func__);
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().by_handle.erase(handle);  // work that is still on a stream keeps it alive
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char* name) {
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", communicator->name().c_str());
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm handle, uint32_t* size) {
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  *size = static_cast<uint32_t>(communicator->size());
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm handle, uint32_t* rank) {
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  *rank = static_cast<uint32_t>(communicator->rank());
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult* error) {
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  *error = HcclResult(communicator->failure());
  return HCCL_SUCCESS;
}

// The name, the time-out and the buffer size of HcclCommConfig have an effect. Determinism, expansion mode, rank ids
// and job ids are accepted without effect, because they do not change the results of a real communicator.
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_ALGO; }

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }  // reductions are always deterministic

HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue* value) {
  value->value = config == HCCL_DETERMINISTIC;
  return HCCL_SUCCESS;
}

const char* HcclGetErrorString(HcclResult code) {
  switch (code) {
    case HCCL_SUCCESS:
      return "no error";
    case HCCL_E_PARA:
      return "parameter error";
    case HCCL_E_PTR:
      return "empty pointer";
    case HCCL_E_MEMORY:
      return "memory error";
    case HCCL_E_INTERNAL:
      return "internal error";
    case HCCL_E_NOT_SUPPORT:
      return "feature not supported";
    case HCCL_E_NOT_FOUND:
      return "resource not found";
    case HCCL_E_UNAVAIL:
      return "resource unavailable";
    case HCCL_E_SYSCALL:
      return "system call error";
    case HCCL_E_TIMEOUT:
      return "time-out";
    case HCCL_E_RUNTIME:
      return "runtime call error";
    default:
      return "unknown HCCL error";
  }
}
