// What aclnn's opaque handles hold here. torch_npu makes them (aclCreateTensor ...) and an op's plan reads them.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "acl/acl.h"
#include "runtime/runtime.h"

struct aclTensor {
  at::Tensor tensor;  // a CPU tensor over the device memory, which is host memory; it owns nothing
  std::string fault;  // why no op can use it, or ""
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

// The torch type of an ACL type. Bits8, which no op here takes, stands for the types that torch lacks, such as
// HiFloat8.
EMULATOR_API at::ScalarType scalar_type(int acl_type);

}  // namespace vllm_npu::emulator::aclnn
