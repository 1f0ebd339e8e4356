// Functions that the stubs of generate_stubs.py call.
#include <cstdio>
#include <cstdlib>

#include "runtime.h"

extern "C" {

int emulator_refuse(const char* function, int code) {
  std::fprintf(stderr, "vllm_npu emulator: %s is not emulated\n", function);
  return vllm_npu::emulator::fail(code, "%s is not emulated", function);
}

// For functions that cannot return an error.
void emulator_abort(const char* function) {
  std::fprintf(stderr, "vllm_npu emulator: %s is not emulated and cannot return an error; ending the process\n",
               function);
  std::abort();
}
}
