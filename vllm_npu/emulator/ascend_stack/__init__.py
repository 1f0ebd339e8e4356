"""Modules that vllm-ascend needs besides CANN's libraries and torch_npu, for processes on the emulated device.

No installed file is edited. A finder provides these modules when a process imports them:

acl, acl.rt
    pyACL, a part of CANN. Here: memcpy of the emulated runtime, which vllm-ascend's allocator imports.
fla_npu.ops.ascendc
    CANN's operators of linear attention, which vllm-ascend 0.30 imports when it starts. Here: functions that refuse.
vllm_ascend._build_info
    The build of vllm-ascend writes it for one chip. Here it names the chip of VLLM_NPU_EMULATOR_SOC.
vllm_ascend.vllm_ascend_C
    Its compiled operators, which need CANN's compiler. Here: some of them, made of torch_npu's operators (custom_ops.py), and
    one that libopapi.so has here (aclnn.py).
    vllm-ascend routes experts and computes norms by these operators only.
vllm.v1.worker.block_table, vllm_ascend.ops.triton.compute_slot_mapping
    The modules of vLLM 0.23 and of vllm-ascend 0.30 with a Triton kernel of the same name. Triton finds no device here, so
    slot_mapping.py replaces the kernel.
vllm_ascend.utils
    Unchanged. After its import, torch_npu's cast of weights to the format NZ keeps the plain format.
mooncake.engine
    Unchanged but for TransferEngine.initialize: the protocol "ascend" of vllm-ascend's KV connectors needs CANN. Here the same
    engine moves the same bytes by its protocol "tcp", because emulated memory is memory of the process.
torchvision._meta_registrations
    FakeTensor functions of torchvision's compiled operators. These operators are built for CUDA and do not load with a CPU
    build of torch. transformers' image processors, which vllm-ascend imports, do not need them. Here the module is empty.

Other operators and modules are absent: torch.ops raises AttributeError with the name, an import raises ImportError.
"""

from vllm_npu.emulator.ascend_stack.finder import install

__all__ = ["install"]
