#pragma once

#include <string>

namespace vllm_npu::emulator {

// An error text if VLLM_NPU_EMULATOR_SOC has a wrong value, else "".
const std::string& soc_fault();

}  // namespace vllm_npu::emulator
