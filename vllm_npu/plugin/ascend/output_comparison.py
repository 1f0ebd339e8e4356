"""moe_comm=compare: every MoE layer runs twice on the same input, with vllm-ascend's communication and with ours."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_ep_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger

from vllm_npu.core.tolerances import TOLERANCES
from vllm_npu.plugin import compat
from vllm_npu.plugin.ascend.comm_method import PipelineCommMethod
from vllm_npu.plugin.forward_context import current_step

logger = init_logger("vllm.npu.plugin.ascend.output_comparison")


class OutputComparison:
    """Compares the outputs of the two paths on each rank. Counts and logs the differences.

    Each layer runs twice and is COLLECTIVE twice. Host sync: yes.
    """

    def __init__(self) -> None:
        self.layer_calls = 0
        self.differing = 0  # layer calls whose outputs differ by more than the tolerance
        self.largest = 0.0  # largest difference, relative to the largest element of its row

    def attach(self, vllm_config: Any) -> None:
        """Make every MoE layer run both paths. The layer's output stays vllm-ascend's. LOCAL."""
        methods = {key: PipelineCommMethod(theirs) for key, theirs in compat.current().comm_methods().items()}
        for name, layer in compat.current().layers_to_compare(vllm_config):
            layer.forward_impl = self._both(name, layer, methods)

    def take(self) -> dict[str, float]:
        """Return the counts since the last call. LOCAL."""
        counts = {"layer_calls": self.layer_calls, "differing": self.differing, "largest_difference": self.largest}
        self.layer_calls = self.differing = 0
        self.largest = 0.0
        return counts

    def _both(self, name: str, layer: Any, methods: dict[Any, PipelineCommMethod]) -> Callable[..., Any]:
        forward = layer.forward_impl

        def forward_impl(hidden_states: torch.Tensor, router_logits: torch.Tensor, **others: Any) -> Any:
            release = compat.current()
            if release.in_profile_run():  # the routing is random, and differs between two calls
                return forward(hidden_states=hidden_states, router_logits=router_logits, **others)
            our_input = {"hidden_states": hidden_states.clone(), "router_logits": router_logits.clone()}
            theirs = forward(hidden_states=hidden_states, router_logits=router_logits, **others)
            expected = _complete(_routed(theirs), release.is_complete(release.current_comm_type(), layer))
            comm_type = release.COMM_TYPES[current_step().strategy]
            with release.using(comm_type, methods, layer):
                got = _complete(_routed(forward(**our_input, **others)), release.is_complete(comm_type, layer))
            self._compare(name, got, expected)
            return theirs

        return forward_impl

    def _compare(self, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        self.layer_calls += 1
        rank = get_ep_group().rank_in_group
        if got.shape != expected.shape:
            self.differing += 1
            logger.error(
                "%s, rank %d: shape %s, vllm-ascend's is %s", name, rank, tuple(got.shape), tuple(expected.shape)
            )
            return
        if got.numel() == 0:
            return
        scale = expected.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(expected.dtype).tiny)
        largest = float(((got.float() - expected.float()).abs() / scale).max())
        self.largest = max(self.largest, largest)
        if not largest <= TOLERANCES[expected.dtype]:
            self.differing += 1
            logger.error(
                "%s, rank %d, %s: differs from vllm-ascend by %.3g of the row's largest element (tolerance of %s: %.3g)",
                name,
                rank,
                current_step().strategy,
                largest,
                str(expected.dtype).removeprefix("torch."),
                TOLERANCES[expected.dtype],
            )


def _routed(result: Any) -> torch.Tensor:
    """The routed experts' output of a layer, which may return it alone, inside a FusedMoEResult, or before its events."""
    routed: torch.Tensor = result[0] if isinstance(result, tuple) else getattr(result, "routed_out", result)
    return routed


def _complete(routed: torch.Tensor, is_complete: bool) -> torch.Tensor:
    """A copy of the output if it is complete. Otherwise its sum: COLLECTIVE, one all-reduce over tp."""
    return routed.clone() if is_complete else tensor_model_parallel_all_reduce(routed.clone())
