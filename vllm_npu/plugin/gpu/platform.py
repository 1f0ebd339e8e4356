"""vLLM's platform on a machine with GPUs, where VLLM_NPU_CUDA_PLATFORM=1 asks for it: vLLM's own, with our managers."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms.cuda import CudaPlatform

from vllm_npu.plugin.gpu.config_check import required_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.cuda_platform")


class CudaMoEPlatform(CudaPlatform):
    """CudaPlatform with our communicator. Models, experts and attention are vLLM's; without options, so is the exchange."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Our checks, and vLLM's backend that goes with the manager asked for. Raises UnsupportedConfigError."""
        backend = required_backend(vllm_config)
        parallel_config = vllm_config.parallel_config
        if backend is not None and parallel_config.all2all_backend != backend:
            logger.info("all2all_backend is %s: the experts' side of what was asked for", backend)
            parallel_config.all2all_backend = backend
        super().check_and_update_config(vllm_config)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Our communicator."""
        return "vllm_npu.plugin.gpu.communicator.CudaMoECommunicator"
