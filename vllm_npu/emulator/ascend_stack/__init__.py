"""What vllm-ascend finds on an Ascend machine besides CANN's libraries and torch_npu, for processes on the emulated device.

Nothing of an installed package is edited. A finder of imports answers for these modules, when and if they are imported:

| module | on an Ascend machine | here | why |
|---|---|---|---|
| `acl`, `acl.rt` | pyACL, a part of CANN | `acl.rt.memcpy`, over the emulated runtime | vllm-ascend's allocator imports it |
| `torchvision._meta_registrations` | FakeTensor functions of torchvision's compiled operators | nothing | those operators are built for \
CUDA and do not load beside a CPU build of torch; transformers' image processors, which vllm-ascend imports, do without |
| `vllm_ascend._build_info` | written when vllm-ascend is built: for one chip | follows VLLM_NPU_EMULATOR_SOC | one installation passes for every chip |
| `vllm_ascend.vllm_ascend_C` | its compiled operators, for which CANN's compiler is needed | custom_ops.py: a few of them, by torch_npu's operators | experts' routing and norms have no other way |
| `vllm.v1.worker.block_table` | its Triton kernel, compiled by triton-ascend | the same module, with slot_mapping.py for the kernel | Triton finds no device here |

An operator or function that is not among these is absent by name: AttributeError from torch.ops, ImportError from a module.
"""

from vllm_npu.emulator.ascend_stack.finder import install

__all__ = ["install"]
