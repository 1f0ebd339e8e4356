// Profiling never starts on the emulated device. Callbacks can be registered and are never called.
#include <cstdint>

#include "runtime.h"

extern "C" {

EMULATOR_API int32_t MsprofRegisterCallback(uint32_t /*module*/, int32_t (* /*handle*/)(uint32_t, void*, uint32_t)) {
  return 0;
}

EMULATOR_API uint64_t MsprofSysCycleTime() { return 0; }

EMULATOR_API int32_t MsprofReportApi(uint32_t, const void*) {
  return vllm_npu::emulator::fail(ACL_ERROR_PROFILING_FAILURE, "MsprofReportApi: profiling is not emulated");
}
}
