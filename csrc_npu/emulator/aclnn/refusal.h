// Refusals: how an op reports arguments and values that it does not support.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace vllm_npu::emulator::aclnn {

// aclnn's return codes.
enum class Code {
  kMissing = 161001,   // ACLNN_ERR_PARAM_NULLPTR
  kInvalid = 161002,   // ACLNN_ERR_PARAM_INVALID: for a dtype, or an argument that must be absent
  kUnusable = 561002,  // ACLNN_ERR_INNER_TILING_ERROR: for a size, an attribute or a value
  kRuntime = 361001,   // ACLNN_ERR_RUNTIME_ERROR: for a fault of another rank or of the communicator
};

// The op's return code, and the text that aclGetRecentErrMsg gives.
class Refusal : public std::runtime_error {
 public:
  Refusal(Code code, const std::string& text) : std::runtime_error(text), code(code) {}
  const Code code;
};

template <class... Parts>
[[noreturn]] void refuse(Code code, const Parts&... parts) {
  throw Refusal(code, c10::str(parts...));
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) refuse(Code::kUnusable, parts...);
}

inline void require_dtype(const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> allowed) {
  for (const at::ScalarType type : allowed) {
    if (tensor.scalar_type() == type) return;
  }
  refuse(Code::kInvalid, name, " is ", tensor.scalar_type(), "; it must be one of ",
         at::ArrayRef<at::ScalarType>(allowed));
}

inline void require_dimensions(const at::Tensor& tensor, const char* name, int64_t dimensions) {
  require(tensor.dim() == dimensions, name, " has the shape ", tensor.sizes(), "; it must have ", dimensions,
          " dimensions");
}

inline void require_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  require(tensor.sizes() == sizes, name, " has the shape ", tensor.sizes(), "; it must be ", sizes);
}

inline void require_one_of(int64_t value, const char* name, std::initializer_list<int64_t> emulated) {
  for (const int64_t known : emulated) {
    if (value == known) return;
  }
  refuse(Code::kUnusable, name, "=", value, " is not emulated; use one of ", at::IntArrayRef(emulated));
}

inline void require_absent(const std::optional<at::Tensor>& tensor, const char* name, const char* reason) {
  if (tensor) refuse(Code::kInvalid, name, " is given, but ", reason);
}

inline void require_absent(const std::vector<at::Tensor>& list, const char* name, const char* reason) {
  if (!list.empty()) refuse(Code::kInvalid, name, " is given, but ", reason);
}

}  // namespace vllm_npu::emulator::aclnn
