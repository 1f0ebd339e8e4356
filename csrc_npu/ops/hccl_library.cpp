#include "hccl_library.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include "acl/acl.h"

namespace vllm_npu {
namespace {

struct Remedy {
  HcclResult code;
  const char* name;
  const char* what_to_do;
};

// Codes: hccl_types.h. What is not here gets the last row.
constexpr Remedy kRemedies[] = {
    {HCCL_E_PARA, "parameter error", "compare what each rank passed: counts and types must match between them"},
    {HCCL_E_MEMORY, "memory error", "lower HCCL_BUFFSIZE or the memory that the engine may use"},
    {HCCL_E_OOM, "out of memory", "lower HCCL_BUFFSIZE or the memory that the engine may use"},
    {HCCL_E_NOT_SUPPORT, "not supported", "set VLLM_NPU_HCCL_OPS=0 to go through torch.distributed"},
    {HCCL_E_TIMEOUT, "time-out", "look for the rank that is late or lost, or raise HCCL_EXEC_TIMEOUT"},
    {HCCL_E_TCP_CONNECT, "connection failed", "check the network between the ranks' hosts and HCCL_IF_IP"},
    {HCCL_E_ROCE_CONNECT, "connection failed", "check the devices' network (hccn_tool)"},
    {HCCL_E_NETWORK, "network error", "check the devices' network (hccn_tool)"},
    {HCCL_E_REMOTE, "another rank failed", "look at the other ranks' logs"},
    {HCCL_E_SUSPENDING, "the communicator is suspended", "restart the group's ranks"},
    {HCCL_E_RESERVED, "see hccl_types.h", "look at the first error in the ranks' logs; restart the group's ranks"},
};

const Remedy& remedy_of(HcclResult code) {
  const Remedy* row = kRemedies;
  while (row->code != code && row->code != HCCL_E_RESERVED) ++row;
  return *row;
}

template <typename Function>
Function find(void* library, const char* name, bool needed) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found != nullptr || !needed, "libhccl.so has no ", name, "; install the CANN that this torch_npu needs");
  return reinterpret_cast<Function>(found);
}

HcclLibrary load() {
  void* library = dlopen("libhccl.so", RTLD_LAZY | RTLD_NOLOAD);
  TORCH_CHECK(library != nullptr, "libhccl.so is not loaded: ", dlerror(), "; import torch_npu first");
  return {
      find<decltype(&::HcclAllGather)>(library, "HcclAllGather", true),
      find<decltype(&::HcclAllGatherV)>(library, "HcclAllGatherV", false),
      find<decltype(&::HcclReduceScatter)>(library, "HcclReduceScatter", true),
      find<decltype(&::HcclReduceScatterV)>(library, "HcclReduceScatterV", false),
      find<decltype(&::HcclAlltoAll)>(library, "HcclAlltoAll", true),
      find<decltype(&::HcclAlltoAllV)>(library, "HcclAlltoAllV", true),
  };
}

}  // namespace

const HcclLibrary& hccl() {
  static const HcclLibrary library = load();
  return library;
}

void check(HcclResult result, const char* function) {
  if (result == HCCL_SUCCESS) return;
  const Remedy& remedy = remedy_of(result);
  const char* text = aclGetRecentErrMsg();
  TORCH_CHECK(false, function, " returned ", static_cast<int>(result), " (", remedy.name, "); ", remedy.what_to_do,
              text == nullptr ? "" : ". HCCL says: ", text == nullptr ? "" : text);
}

}  // namespace vllm_npu
