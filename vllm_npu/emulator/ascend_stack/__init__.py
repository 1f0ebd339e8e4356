"""What vllm-ascend finds on an Ascend machine besides CANN's libraries and torch_npu, for processes on the emulated device.

No installed file is edited. A finder of imports answers for these modules, when and if they are imported:

acl, acl.rt
    pyACL, a part of CANN. Here: memcpy over the emulated runtime, which is what vllm-ascend's allocator imports.
vllm_ascend._build_info
    Written when vllm-ascend is built, for one chip. Here it follows VLLM_NPU_EMULATOR_SOC: one installation, every chip.
vllm_ascend.vllm_ascend_C
    Its compiled operators, which need CANN's compiler. Here: some of them, by torch_npu's operators (custom_ops.py);
    routing of experts and norms have no other way.
vllm.v1.worker.block_table
    vLLM's module with a kernel for Triton, which finds no device here. The kernel is replaced by slot_mapping.py.
vllm_ascend.utils
    Unchanged; once it is imported, torch_npu's cast of weights to the format NZ leaves them plain.
torchvision._meta_registrations
    FakeTensor functions of torchvision's compiled operators. Those are built for CUDA and do not load beside a CPU build
    of torch; transformers' image processors, which vllm-ascend imports, do without. Here the module is empty.

What is not among these is absent by name: AttributeError from torch.ops, ImportError from a module.
"""

from vllm_npu.emulator.ascend_stack.finder import install

__all__ = ["install"]
