"""The sequence-parallel ops of the original design: torch.ops.vllm.maybe_all_gather_and_maybe_unpad and maybe_pad_and_reduce.

The ops are opaque to torch.compile. They follow the plan of the running step, not of the traced one.
"""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_npu.core.step_plan import TokenSharding
from vllm_npu.plugin.forward_context import current_step
from vllm_npu.strategies.sequence_parallel import gather_and_unpad, reduce_scatter_and_pad
from vllm_npu.transport.base import Transport


def _real_rows(is_ep_comm: bool) -> tuple[list[int], Transport]:
    """Rows of each rank of ep (or tp) that are tokens, and the group's transport."""
    step = current_step()
    groups, tp_size = step.groups, step.groups.topology.tp_size
    per_rank = step.plan.sliced_tokens_across_ep(tp_size)
    if is_ep_comm:
        return per_rank, groups.ep
    first = groups.topology.dp_rank * tp_size
    return per_rank[first : first + tp_size], groups.tp


def _is_sliced() -> bool:
    return current_step().plan.sharding is TokenSharding.SLICED_OVER_TP


def maybe_all_gather_and_maybe_unpad(x: torch.Tensor, label: bool, is_ep_comm: bool = False) -> torch.Tensor:
    """Gather slices [rows, ...] over ep (or tp) without their padding: [sum of real rows, ...]. COLLECTIVE: one all-gather.

    Returns a copy of `x` if `label` is False or the step is not sliced; then LOCAL.
    """
    if not label or not _is_sliced():
        return x.clone()
    real_rows, transport = _real_rows(is_ep_comm)
    return gather_and_unpad(x, real_rows, transport)


def _maybe_all_gather_and_maybe_unpad_fake(x: torch.Tensor, label: bool, is_ep_comm: bool = False) -> torch.Tensor:
    return _fresh_rows_like(x) if label and _is_sliced() else torch.empty_like(x)


def maybe_pad_and_reduce(x: torch.Tensor, is_ep_comm: bool = False) -> torch.Tensor:
    """Undo maybe_all_gather_and_maybe_unpad: add the ranks' [sum of real rows, ...] up, and return this rank's slice, padded.

    COLLECTIVE: one reduce-scatter over ep (or tp). If the step is not sliced: one all-reduce over tp.
    """
    if not _is_sliced():
        return current_step().groups.tp.all_reduce(x)
    real_rows, transport = _real_rows(is_ep_comm)
    rows = current_step().plan.input_rows(current_step().groups.topology)
    return reduce_scatter_and_pad(x, real_rows, rows, transport)


def _maybe_pad_and_reduce_fake(x: torch.Tensor, is_ep_comm: bool = False) -> torch.Tensor:
    return _fresh_rows_like(x) if _is_sliced() else torch.empty_like(x)


def _fresh_rows_like(x: torch.Tensor) -> torch.Tensor:
    """A fake output whose number of rows is unknown to the trace: it depends on the step."""
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:]))


def register() -> None:
    """Register both ops. An op of the same name that another plugin registered stays: vllm-ascend has such ops."""
    for op, fake in (
        (maybe_all_gather_and_maybe_unpad, _maybe_all_gather_and_maybe_unpad_fake),
        (maybe_pad_and_reduce, _maybe_pad_and_reduce_fake),
    ):
        if not hasattr(torch.ops.vllm, op.__name__):
            direct_register_custom_op(op_name=op.__name__, op_func=op, fake_impl=fake)
