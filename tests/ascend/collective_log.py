"""Logs every collective of one rank with its bytes: calls of torch.distributed, MC2's ops and our C++ operators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_npu.core.token_layout import RowFormat


@dataclass(frozen=True)
class LoggedCollective:
    """One collective of this rank."""

    operation: str
    sent: int  # bytes to other ranks, counted as RecordingTransport counts them
    way: str = ""  # of MC2's ops: the arguments for the algorithm and the form of rows that are not the defaults


class CollectiveLog(TorchDispatchMode):
    """Logs collectives below the transports, so it counts vllm-ascend's own path and ours in the same way.

    For MC2's ops it counts the active rows whose experts are on another rank. A dispatch mode does not see into opaque custom
    ops. Wrap a function that runs inside such an op with `inside`.
    """

    def __init__(self, ep_rank: int, ep_size: int, num_experts: int) -> None:
        super().__init__()
        self.calls: list[LoggedCollective] = []
        self._ep_rank, self._ep_size, self._per_rank = ep_rank, ep_size, num_experts // ep_size
        self._returned = 0

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that its collectives are logged."""

        def logged(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return logged

    def see_everything(self) -> None:
        """Also log calls that no dispatch mode sees: vLLM's collectives, which are opaque ops, and batches of messages."""
        from vllm.distributed.parallel_state import GroupCoordinator

        for name in ("_all_reduce_out_place", "_all_gather_out_place", "_reduce_scatter_out_place"):
            setattr(GroupCoordinator, name, self.inside(getattr(GroupCoordinator, name)))
        exchange = torch.distributed.batch_isend_irecv

        def logged(operations: list[Any]) -> Any:
            sent = sum(each.tensor.nbytes for each in operations if each.op is torch.distributed.isend)
            if operations[0].tensor.device.type != "cpu":
                self.calls.append(LoggedCollective("send_recv", sent))
            return exchange(operations)

        torch.distributed.batch_isend_irecv = logged

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("vllm_npu::"):
            return self._through_our_operator(name.removeprefix("vllm_npu::"), func, args, kwargs)
        if name.startswith("c10d::"):
            self._note_collective(name.removeprefix("c10d::").strip("_"), func, args, kwargs)
        result = func(*args, **kwargs)
        if name.startswith("npu::npu_moe_distribute_dispatch"):
            self._note_dispatch(args, kwargs)
        elif name.startswith("npu::npu_moe_distribute_combine"):
            self._note_combine(args, kwargs)
        return result

    def _through_our_operator(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Log an operator of csrc_npu/ops, which calls HCCL directly. An exchange of tokens sends its counts first."""
        result = func(*args, **kwargs)
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        if name in ("gather_tokens", "gather_message"):
            size = len(given["sizes"])
            self.calls.append(
                LoggedCollective(
                    "all_gather", RowFormat.of(given["tensors"]).row_bytes * len(given["tensors"][0]) * (size - 1)
                )
            )
        elif name in ("exchange_tokens", "exchange_message"):
            sent = result[1][0].tolist()
            own = self._ep_rank if len(sent) == self._ep_size else 0
            self.calls.append(LoggedCollective("all_to_all (counts)", 8 * (len(sent) - 1)))
            row_bytes = RowFormat.of(given["tensors"]).row_bytes
            self.calls.append(LoggedCollective("all_to_all", row_bytes * (sum(sent) - sent[own])))
        elif name == "exchange_rows":
            sizes = list(given["send_sizes"])
            x, own = given["x"], self._ep_rank if len(sizes) == self._ep_size else 0
            self.calls.append(
                LoggedCollective("all_to_all", x.nbytes // len(x) * (sum(sizes) - sizes[own]) if len(x) else 0)
            )
        elif name == "scatter_reduce_tokens":
            x, sizes = given["x"], list(given["sizes"])
            self.calls.append(
                LoggedCollective(
                    "reduce_scatter", x.nbytes // len(x) * (sum(sizes) - sizes[given["rank"]]) if len(x) else 0
                )
            )
        return result

    def _note_collective(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        group = torch.distributed.distributed_c10d.ProcessGroup.unbox(given["process_group"])
        size = group.size()
        if size == 1 or name in ("barrier", "monitored_barrier"):
            return
        if name.startswith("allreduce"):
            sent = sum(2 * x.nbytes * (size - 1) // size for x in _tensors(given.get("tensors")))
        elif name.startswith("alltoall_base"):
            x, splits = given["input"], list(given["input_split_sizes"])
            rows = x.shape[0]
            own = splits[group.rank()] if splits else rows // size
            sent = x.nbytes // rows * (rows - own) if rows else 0
        elif name.startswith(("reduce_scatter", "_reduce_scatter")):
            tensors = _tensors(given.get("input_tensor", given.get("input_tensors", given.get("inputs"))))
            sent = sum(x.nbytes for x in tensors) * (size - 1) // size
        else:  # a kind of all-gather, or a broadcast
            tensors = _tensors(
                given.get("input_tensor", given.get("input_tensors", given.get("tensors", given.get("inputs"))))
            )
            sent = sum(x.nbytes for x in tensors) * (size - 1)
        device = next((x.device.type for value in given.values() for x in _tensors(value)), "npu")
        if device != "cpu":  # on the CPU, steps exchange votes and counts, which belong to no layer
            self.calls.append(LoggedCollective(name, sent))

    def _note_dispatch(self, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if args else kwargs["x"]
        ids = args[1] if len(args) > 1 else kwargs["expert_ids"]
        mask = kwargs.get("x_active_mask")
        active = ids.cpu() if mask is None else ids.cpu()[mask.cpu()]
        rows = int((active // self._per_rank != self._ep_rank).sum())
        element = 1 if kwargs.get("quant_mode") else x.element_size()
        self.calls.append(LoggedCollective("dispatch", rows * x.shape[1] * element, _way(kwargs)))
        self._returned = rows

    def _note_combine(self, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if args else kwargs["expand_x"]
        row = x.shape[1] * x.element_size()
        if kwargs.get("comm_quant_mode"):  # int8, and a scale for each 8 numbers
            row = x.shape[1] + row // 8
        self.calls.append(LoggedCollective("combine", self._returned * row, _way(kwargs)))


def _way(kwargs: Any) -> str:
    names = ("comm_alg", "quant_mode", "comm_quant_mode")
    return " ".join(f"{name}={kwargs[name]}" for name in names if kwargs.get(name))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for each in value for x in _tensors(each)] if isinstance(value, list | tuple) else []
