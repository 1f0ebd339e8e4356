// The emulator's definition of aclnn's opaque handles. torch_npu creates handles (aclCreateTensor ...), and an op's
// plan reads them.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "acl/acl.h"
#include "runtime/runtime.h"

struct aclTensor {
  at::Tensor tensor;  // a CPU tensor on the device memory, which it does not own
  std::string fault;  // the reason why no op can use the tensor, or ""
};

struct aclScalar {
  at::Scalar value;
};

struct aclIntArray {
  std::vector<int64_t> values;
};

struct aclFloatArray {
  std::vector<float> values;
};

struct aclBoolArray {
  std::vector<bool> values;
};

struct aclTensorList {
  std::vector<const aclTensor*> tensors;  // owned, as with CANN
};

struct aclScalarList {
  std::vector<const aclScalar*> scalars;  // owned
};

namespace vllm_npu::emulator::aclnn {

// Returns the torch type of an ACL type. For types that torch lacks, such as HiFloat8, it returns Bits8, which no op
// takes.
EMULATOR_API at::ScalarType scalar_type(int acl_type);

}  // namespace vllm_npu::emulator::aclnn
