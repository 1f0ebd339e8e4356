"""vLLM's CPU worker with what has to happen between the loading of a model and its first step."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_npu.plugin import compat


class CpuMoEWorker(CPUWorker):
    """vLLM starts this worker with EPLB, sequence parallelism and pipeline stages, and its own worker otherwise."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, keep rows whole where a layer would guess, make room for rows of another pipeline stage, and start
        EPLB if it is on.

        Raises UnsupportedConfigError if EPLB is on and the model's experts cannot be balanced.
        """
        release = compat.current()
        with release.unmovable_experts_explained():
            super().load_model(load_dummy_weights=load_dummy_weights)
        release.keep_rows_whole(self.model_runner)
        release.make_room_for_earlier_stage(self.model_runner)
        if self.parallel_config.enable_eplb:
            release.start_eplb(self.model_runner)
