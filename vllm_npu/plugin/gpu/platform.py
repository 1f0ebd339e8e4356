"""vLLM's platform on a machine with GPUs and VLLM_NPU_CUDA_PLATFORM=1: vLLM's CudaPlatform with our communicator."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms.cuda import CudaPlatform

from vllm_npu.plugin.gpu.config_check import required_backend, set_worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.npu.plugin.gpu.platform")


class CudaMoEPlatform(CudaPlatform):
    """CudaPlatform with our communicator. Models, experts and attention are vLLM's.

    The exchange and the worker are vLLM's too, unless an option names another exchange.
    """

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Check the options, and set vLLM's all2all_backend to the one that the named manager needs, and our worker. Raises
        UnsupportedConfigError."""
        backend = required_backend(vllm_config)
        parallel_config = vllm_config.parallel_config
        if backend is not None and parallel_config.all2all_backend != backend:
            logger.info("all2all_backend is %s, which the options need", backend)
            parallel_config.all2all_backend = backend
        set_worker(vllm_config)
        super().check_and_update_config(vllm_config)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Return the name of our communicator."""
        return "vllm_npu.plugin.gpu.communicator.CudaMoECommunicator"
