"""A worker extension that notes what happens while experts are balanced.

It counts the router's choices one by one, so that tests can compare the counts with vLLM's numbers.
"""

import hashlib
from collections import deque
from functools import partial
from typing import Any

import torch

from vllm_npu.plugin.cpu.moe_runner import CpuMoERunner
from vllm_npu.plugin.worker_extension import MoECommWorkerExtension

PATH = f"{__name__}.EplbProbe"


class EplbProbe(MoECommWorkerExtension):
    """The router hands it the logical experts of every token."""

    def set_moe_comm(self, name: str) -> None:
        if not hasattr(self, "notes"):
            self._watch()
        super().set_moe_comm(name)

    def moe_comm_counters(self) -> dict[str, Any]:
        notes, self.notes = self.notes, []
        dummies, self.dummy_steps = self.dummy_steps, 0
        probe = {"notes": notes, "dummy_steps": dummies, "experts": self.experts, "initial": self.initial}
        return super().moe_comm_counters() | {"probe": probe}

    def _watch(self) -> None:
        runner = self.model_runner
        [self.state] = runner.eplb_state.model_states.values()
        static = self.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in static.values() if isinstance(layer, CpuMoERunner)]
        self.shape = len(layers), self.state.model.num_logical_experts
        self.experts = self._experts_of_slots()
        self.initial = self.state.physical_to_logical_map.tolist()
        self.notes: list[dict[str, Any]] = []
        self.dummy_steps = 0
        self.step = torch.zeros(self.shape, dtype=torch.int64)
        self.recent: deque[torch.Tensor] = deque(maxlen=runner.parallel_config.eplb_config.window_size)
        for number, layer in enumerate(layers):
            layer.router.set_capture_fn(partial(self._see, number))
        theirs = runner.eplb_step

        def eplb_step(is_dummy: bool = False, is_profile: bool = False) -> None:
            self._before(is_dummy)
            rearrangements = runner.eplb_state.rearrangements
            theirs(is_dummy, is_profile)
            if runner.eplb_state.rearrangements > rearrangements:
                self._note()

        runner.eplb_step = eplb_step

    def _see(self, layer: int, topk_ids: torch.Tensor) -> None:
        for row in topk_ids.tolist():
            for expert in row:
                self.step[layer, expert] += 1

    def _before(self, is_dummy: bool) -> None:
        self.dummy_steps += is_dummy
        if not is_dummy:
            self.recent.append(self.step)
        self.step = torch.zeros(self.shape, dtype=torch.int64)

    def _note(self) -> None:
        self.notes.append(
            {
                "recent": sum(self.recent, torch.zeros(self.shape, dtype=torch.int64)).tolist(),
                "load": self.state.last_expert_load.tolist(),  # of vLLM, over all ranks
                "placement": self.state.physical_to_logical_map.tolist(),
                "experts": self._experts_of_slots(),
            }
        )

    def _experts_of_slots(self) -> list[list[str]]:
        """Digest of the weights in each slot of this rank, by layer."""
        return [
            [_digest([weight[slot] for weight in layer]) for slot in range(layer[0].shape[0])]
            for layer in map(list, self.state.model.expert_weights)
        ]


def _digest(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
