"""vLLM's CPU worker, with experts that are balanced while serving."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import compat


class NPUCPUWorker(CPUWorker):
    """Taken where EPLB is on."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model and start EPLB. Raises UnsupportedConfigError where its experts cannot be balanced."""
        try:
            super().load_model(load_dummy_weights=load_dummy_weights)
        except NotImplementedError as error:
            if "EPLB" not in str(error):
                raise
            raise UnsupportedConfigError(
                f"{error} Weights in that format cannot move from rank to rank; serve an unquantised checkpoint, or leave out "
                "--enable-eplb and --eplb-config"
            ) from error
        compat.current().start_eplb(self.model_runner)
