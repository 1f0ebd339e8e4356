"""Transport over HCCL: NPU tensors, by C++ operators on the group's communicator, or by torch_npu's ProcessGroupHCCL if a
rank of the group lacks the operators."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from vllm_npu.errors import InvalidInputError, UnknownGroupError, UnsupportedConfigError
from vllm_npu.transport.base import Exchanged, SendRecv, gather_texts
from vllm_npu.transport.hccl_direct import token_ops
from vllm_npu.transport.hccl_direct.chip import limits_of_this_chip  # imports torch_npu, which makes c10d know hccl
from vllm_npu.transport.host import host_number
from vllm_npu.transport.torch_dist import TorchDistTransport

logger = logging.getLogger("vllm.npu.hccl")

MAX_TEXT_BYTES = 512


@dataclass(frozen=True, slots=True)
class _Group:
    """State that all transports of one process group share."""

    has_ops: bool  # whether all ranks have the operators; the first gather, scatter or all-to-all finds out
    in_flight: list[dist.Work]  # on ProcessGroupHCCL's stream, for which the operators must wait


_GROUPS: "WeakKeyDictionary[dist.ProcessGroup, _Group]" = WeakKeyDictionary()


class HcclTransport(TorchDistTransport):
    """Gathers, scatters and all-to-alls of any sizes, without padding, one HCCL call each.

    Uneven rows go by HcclAllGatherV and HcclReduceScatterV if the chip has them and all ranks are on one server (limits.py).
    Otherwise they go by HcclAlltoAllV, which takes any sizes on every chip, and are added in float32 in rank order.
    Without the operators, torch_npu's collectives move equal rows, and its all-to-all and batched send/receive move uneven
    rows, since torch_npu's V collectives refuse empty ranks.
    """

    backend = "hccl"
    device_type = "npu"

    def __init__(self, process_group: dist.ProcessGroup, group: str) -> None:
        super().__init__(process_group, group)
        self._name = str(process_group.group_name)
        self._shared: _Group | None = None
        self._name_for_ops = ""

    @property
    def name_for_ops(self) -> str:
        """HCCL's name of the communicator, which is asked for once. Raises UnknownGroupError if HCCL has none."""
        if not self._name_for_ops:
            self._name_for_ops = self._ask_name()
        return self._name_for_ops

    def _ask_name(self) -> str:
        try:
            name = str(self._backend.get_hccl_comm_name(_number_of_this_device()))
        except (RuntimeError, AttributeError) as error:
            raise UnknownGroupError(self._unknown(str(error))) from error
        if not name:
            raise UnknownGroupError(self._unknown("its name is empty"))
        return name

    def _unknown(self, detail: str) -> str:
        return (
            f"HCCL does not know the group '{self.group}' of rank {self.rank}, over which mc2 has to communicate ({detail}); "
            "create the group with the hccl backend, or choose all2all or allgather"
        )

    @property
    def _backend(self) -> Any:
        return self.process_group._get_backend(torch.device("npu"))

    def _all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        if self._has_ops():
            gathered: torch.Tensor = self._call("all_gather", "gather_message", [x], sizes)
            return gathered
        return super()._all_gather(x, sizes) if len(set(sizes)) == 1 else self._all_gather_from_peers(x, sizes)

    def _gather_tokens(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        if not self._has_ops():
            return super()._gather_tokens(tensors, sizes)
        gathered: list[torch.Tensor] = self._call("all_gather", "gather_tokens", tensors, sizes)
        return gathered

    def _reduce_scatter(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        if self._has_ops():
            own: torch.Tensor = self._call("reduce_scatter", "scatter_reduce_tokens", x, sizes, self.rank)
            return own
        even = len(set(sizes)) == 1
        return super()._reduce_scatter(x, sizes) if even else self._reduce_scatter_by_exchange(x, sizes)

    def _all_to_all(self, x: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> torch.Tensor:
        if not self._has_ops():
            return super()._all_to_all(x, send_sizes, recv_sizes)
        received: torch.Tensor = self._call("all_to_all", "exchange_rows", x, send_sizes, recv_sizes)
        return received

    def _exchange_tokens(self, tensors: Sequence[torch.Tensor], rows_per_rank: torch.Tensor) -> Exchanged:
        if not self._has_ops():
            return super()._exchange_tokens(tensors, rows_per_rank)
        received, rows = self._call("all_to_all", "exchange_tokens", tensors, rows_per_rank)
        sent_rows, received_rows = rows.tolist()
        return received, sent_rows, received_rows

    def _send_recv(self, operations: Sequence[SendRecv]) -> None:
        for batch in batches_for_hccl(operations):
            super()._send_recv(batch)

    def _call(self, operation: str, op: str, *arguments: Any) -> Any:
        try:
            return token_ops.overload(op)(*arguments, self._name)
        except ValueError as error:
            raise InvalidInputError(f"{op} on group '{self.group}': {error}") from error
        except RuntimeError as error:
            raise self._failure(operation, str(error)) from error

    def _has_ops(self) -> bool:
        """Whether to call the operators. COLLECTIVE over the group at the first call.

        The current stream first waits for work in flight on ProcessGroupHCCL's stream, since HCCL runs the calls on one
        communicator one after another. The host does not wait.
        """
        shared = self._shared or self._of_all_ranks()
        while shared.in_flight:
            shared.in_flight.pop().wait()
        return shared.has_ops

    def _note_in_flight(self, work: dist.Work) -> None:
        shared = self._of_all_ranks()
        if shared.has_ops:
            shared.in_flight.append(work)

    def _of_all_ranks(self) -> _Group:
        if self._shared is None:
            if self.process_group not in _GROUPS:
                _GROUPS[self.process_group] = _Group(self._open_ops(), [])
            self._shared = _GROUPS[self.process_group]
        return self._shared

    def _open_ops(self) -> bool:
        """Register the group with the operators, unless a rank lacks them. COLLECTIVE over the group.

        Raises UnsupportedConfigError on every rank if one rank cannot read its settings, or has an unknown chip.
        """
        reason, refusal, has_v = None, "", False
        try:
            reason = token_ops.why_not()
            has_v = reason is None and limits_of_this_chip().uneven_collectives and token_ops.ops().has_v_collectives()
        except UnsupportedConfigError as error:
            refusal = str(error)
        facts = torch.tensor([[not refusal, reason is None, has_v, host_number()]], device="npu")
        all_facts = TorchDistTransport._all_gather(self, facts, [1] * self.size).tolist()
        if not all(can for can, *_ in all_facts):
            without_ops = TorchDistTransport(self.process_group, self.group)
            texts = gather_texts(without_ops, refusal, MAX_TEXT_BYTES, self.device_type)
            raise UnsupportedConfigError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text))
        ranks = [each[1:] for each in all_facts]
        without = [rank for rank, (has_ops, _, _) in enumerate(ranks) if not has_ops]
        if without:
            why = f"here: {reason}" if reason else "see their logs"
            logger.warning("group '%s' goes through torch.distributed: ranks %s cannot use the C++ operators (%s)",
                           self.group, without, why)  # fmt: skip
            return False
        one_server = len({host for _, _, host in ranks}) == 1
        use_v = one_server and all(has_v for _, has_v, _ in ranks)
        token_ops.ops().register_group(
            self._name, self._backend.get_hccl_comm(_number_of_this_device()), self.rank, self.size, use_v
        )
        logger.debug("group '%s' uses the C++ operators, uneven rows by %s", self.group,
                     "HCCL's V collectives" if use_v else "HcclAlltoAllV")  # fmt: skip
        return True


def batches_for_hccl(operations: Sequence[SendRecv]) -> list[list[SendRecv]]:
    """Split into batches: batch k has the k-th message to and from each rank. HcclBatchSendRecv takes one message to and from
    each rank (CANN 8.0 and 8.5).

    The other half of a message is in batch k of the peer, so ranks that run batches in order never wait in a circle.
    """
    batches: list[list[SendRecv]] = []
    placed: dict[tuple[int, bool], int] = {}  # by peer and direction
    for each in operations:
        place = placed.get((each.peer, each.is_send), 0)
        placed[each.peer, each.is_send] = place + 1
        if place == len(batches):
            batches.append([])
        batches[place].append(each)
    return batches


def _number_of_this_device() -> int:
    """The number of this device. ProcessGroupHCCL calls it rank, and finds communicators by it."""
    return torch.accelerator.current_device_index()
