// Planning and running, which are the same for every op.
#include "op.h"

#include <memory>

#include "cpu_kernels_only.h"

struct aclOpExecutor {
  vllm_npu::emulator::aclnn::Plan plan;
};

namespace vllm_npu::emulator::aclnn {
namespace {

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

int prepare(const char* name, const std::function<Plan()>& make_plan, uint64_t* workspace_size,
            aclOpExecutor** executor) {
  return guarded(name, [&] {
    *workspace_size = 0;
    *executor = new aclOpExecutor{make_plan()};
  });
}

int run(const char* name, aclOpExecutor* executor, aclrtStream stream) {
  trace(name);
  // Shared, because std::function needs work that can be copied.
  std::shared_ptr<aclOpExecutor> owned(executor);
  return enqueue(stream, name, [name, owned] { return guarded(name, owned->plan); });
}

}  // namespace vllm_npu::emulator::aclnn

// CANN's workspace pool of the calling thread. The emulated ops need no workspace.
extern "C" {
EMULATOR_API int InitHugeMemThreadLocal(void*, bool) { return 0; }
EMULATOR_API void UnInitHugeMemThreadLocal(void*, bool) {}
EMULATOR_API void ReleaseHugeMem(void*, bool) {}
}
