#pragma once

#include <string>

namespace vllm_npu::emulator {

// What is wrong with VLLM_NPU_EMULATOR_SOC, or "".
const std::string& soc_fault();

}  // namespace vllm_npu::emulator
