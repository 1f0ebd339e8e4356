// Planning and running, which are the same for every op.
#include "op.h"

#include <memory>

#include "cpu_kernels_only.h"

struct aclOpExecutor {
  vllm_npu::emulator::aclnn::Plan plan;
  vllm_npu::emulator::Addresses memory;  // of the op's tensors
};

namespace vllm_npu::emulator::aclnn {
namespace {

thread_local Addresses noted_memory;

// Converts an exception of `act` to the op's return code, because no exception may leave the C interface.
int guarded(const char* name, const std::function<void()>& act) {
  try {
    const CpuKernelsOnly kernels;
    act();
    return ACL_SUCCESS;
  } catch (const Refusal& refusal) {
    return fail(static_cast<int>(refusal.code), "%s: %s", name, refusal.what());
  } catch (const c10::Error& error) {
    return fail(static_cast<int>(Code::kUnusable), "%s: %s", name, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(static_cast<int>(Code::kUnusable), "%s: %s", name, error.what());
  }
}

}  // namespace

void note_memory(const at::Tensor& tensor) {
  if (tensor.numel() > 0) noted_memory.push_back(tensor.const_data_ptr());
}

int prepare(const char* name, const std::function<Plan()>& make_plan, uint64_t* workspace_size,
            aclOpExecutor** executor) {
  return guarded(name, [&] {
    *workspace_size = 0;
    noted_memory.clear();
    auto plan = make_plan();
    *executor = new aclOpExecutor{std::move(plan), std::move(noted_memory)};
  });
}

int check_only(const char* name, const std::function<Plan()>& make_plan, uint64_t* workspace_size,
               aclOpExecutor** executor) {
  return guarded(name, [&] {
    *workspace_size = 0;
    *executor = nullptr;
    make_plan();
    noted_memory.clear();
  });
}

int run(const char* name, aclOpExecutor* executor, aclrtStream stream) {
  trace(name);
  // Shared, because std::function needs work that can be copied.
  std::shared_ptr<aclOpExecutor> owned(executor);
  return enqueue(stream, name, [name, owned] { return guarded(name, owned->plan); }, std::move(owned->memory));
}

}  // namespace vllm_npu::emulator::aclnn

// Destroys an executor that is not run. GetMaxWorkspaceSize returns null.
extern "C" EMULATOR_API int aclDestroyAclOpExecutor(const aclOpExecutor* executor) {
  delete executor;
  return ACL_SUCCESS;
}

// CANN's workspace pool of the calling thread. The emulated ops need no workspace.
extern "C" {
EMULATOR_API int InitHugeMemThreadLocal(void*, bool) { return 0; }
EMULATOR_API void UnInitHugeMemThreadLocal(void*, bool) {}
EMULATOR_API void ReleaseHugeMem(void*, bool) {}
}
