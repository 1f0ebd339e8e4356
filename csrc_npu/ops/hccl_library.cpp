#include "hccl_library.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <map>
#include <utility>

#include "acl/acl.h"

namespace vllm_npu {
namespace {

// What to do about each result code. Set before the first call of HCCL, then only read.
std::map<std::int64_t, std::string>& remedies() {
  static auto* by_code = new std::map<std::int64_t, std::string>;
  return *by_code;
}

std::string& other_remedy() {
  static auto* text = new std::string;
  return *text;
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

void set_remedies(c10::IntArrayRef codes, const std::vector<std::string>& texts, std::string other) {
  for (std::size_t i = 0; i < codes.size(); ++i) remedies()[codes[i]] = texts.at(i);
  other_remedy() = std::move(other);
}

void check(HcclResult result, const char* function) {
  if (result == HCCL_SUCCESS) return;
  const auto known = remedies().find(result);
  const char* text = aclGetRecentErrMsg();
  TORCH_CHECK(false, function, " returned ", static_cast<int>(result), " ",
              known == remedies().end() ? other_remedy() : known->second,
              text == nullptr ? "" : ". HCCL says: ", text == nullptr ? "" : text);
}

}  // namespace vllm_npu
