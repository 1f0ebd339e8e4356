"""FlashInfer (github.com/flashinfer-ai/flashinfer): its all-reduce, with the methods that vLLM's communicator calls.

The size of the workspace of its one-sided all2all is computed here without the library. vLLM ships both all2all managers.
"""

import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from vllm_npu.core.limits import MIB
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.errors import InvalidInputError
from vllm_npu.transport.base import gather_texts
from vllm_npu.transport.gloo import GlooTransport

logger = logging.getLogger("vllm.npu.flashinfer")

ALIGNMENT = 128  # bytes; each part of a workspace starts at a multiple
MAX_TOP_K = 22  # kMaxTopK: entries of a token in the tables, for any top_k
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_REASON_BYTES = 300
PDL_MAX_TOKENS = 16  # up to this size the next kernel may start before the all-reduce ends; vLLM's empirical value

# Bytes of the largest tensor that goes through FlashInfer's all-reduce, by compute capability and number of ranks.
# Source: vLLM's FI_ALLREDUCE_FUSION_MAX_SIZE_MB (0.23).
ALL_REDUCE_MAX_BYTES: dict[int, dict[int, int]] = {
    90: {2: 64 * MIB, 4: 2 * MIB, 8: MIB // 2},
    100: {2: 64 * MIB, 4: 32 * MIB, 8: MIB},
    103: {2: 64 * MIB, 4: 64 * MIB, 8: 2 * MIB},
}


def one_sided_workspace_bytes(
    *,
    ep_size: int,
    max_tokens: int,  # most tokens of one rank
    dispatched_row_bytes: int,  # one row with its scales, ids and weights
    returned_row_bytes: int,
) -> int:
    """Return the bytes of each rank's workspace, as moe_a2a_get_workspace_size_per_rank does.

    Source: calculateOffsets in csrc/trtllm_moe_alltoall.cu (0.6.12).
    """
    counters = _aligned(8 + 8 * ep_size)  # epoch, tokens, rows sent and rows received
    flags = 2 * _aligned(4 * ep_size)  # one table for dispatch, one for combine
    tables = 2 * _aligned(4 * MAX_TOP_K * max_tokens)  # the rank of each choice, and its row on that rank
    slots = ep_size * max_tokens
    return counters + flags + tables + _aligned(slots * dispatched_row_bytes) + _aligned(slots * returned_row_bytes)


def _aligned(num_bytes: int) -> int:
    return ceil_div(num_bytes, ALIGNMENT) * ALIGNMENT


def why_not_all_reduce(x: torch.Tensor, world_size: int, max_bytes: int | None) -> str | None:
    """Return why `x` must not go through FlashInfer's all-reduce, or None where it may.

    FlashInfer does not support `x`, or is slower than vLLM's other all-reduces. LOCAL. All ranks get the same answer where
    shapes and dtypes are the same.
    """
    if world_size < 2:
        return "there is one rank only"
    if max_bytes is None:
        return f"{world_size} ranks on this chip are not in ALL_REDUCE_MAX_BYTES"
    if not x.is_cuda:
        return f"the tensor is on {x.device}"
    if x.dim() != 2 or not x.is_contiguous():
        return f"a contiguous [tokens, hidden_size] is needed, not {tuple(x.shape)} with strides {x.stride()}"
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not one of {DTYPES}"
    if x.numel() == 0:
        return "there are no tokens"
    if x.nbytes > max_bytes:
        return f"{x.nbytes} bytes are more than {max_bytes}"
    return None


class FlashInferAllReduce:
    """FlashInfer's all-reduce over the ranks of one host. vLLM's communicator calls should_use_fi_ar and all_reduce.

    The first tensor of a width and dtype opens a workspace of max_bytes, which later tensors of that width and dtype share. The
    ranks agree on the outcome. Where one rank cannot open its workspace, all ranks stop using FlashInfer and log a warning.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,  # gloo group of the ranks that reduce
        device_group: dist.ProcessGroup,  # CUDA group of the same ranks, over which they share memory
        *,
        max_bytes: Mapping[int, int],  # a row of ALL_REDUCE_MAX_BYTES: bytes by number of ranks
    ) -> None:
        self.group, self.device_group = group, device_group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.max_bytes = max_bytes.get(self.world_size)
        self.disabled = False
        self._workspaces: dict[tuple[int, torch.dtype], Any] = {}

    def should_use_fi_ar(self, input_tensor: torch.Tensor) -> bool:
        """Whether all_reduce takes this tensor. COLLECTIVE for the first tensor of a width and dtype, else LOCAL."""
        if self.disabled or why_not_all_reduce(input_tensor, self.world_size, self.max_bytes) is not None:
            return False
        key = (input_tensor.shape[1], input_tensor.dtype)
        if key not in self._workspaces and not self._open(*key):
            self.disabled = True
        return not self.disabled

    def all_reduce(self, input_tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, in fresh memory. COLLECTIVE: one kernel. Host sync: no. Graph capture: yes, once the
        workspace is open. Raises InvalidInputError where should_use_fi_ar did not return True before."""
        workspace = self._workspaces.get((input_tensor.shape[1], input_tensor.dtype))
        if workspace is None or self.disabled:
            raise InvalidInputError(
                f"FlashInferAllReduce has no workspace for {input_tensor.dtype} {tuple(input_tensor.shape)}; call "
                "should_use_fi_ar first"
            )
        comm = _library()
        reduced: torch.Tensor = comm.allreduce_fusion(
            input=input_tensor,
            workspace=workspace,
            pattern=comm.AllReduceFusionPattern.kAllReduce,
            launch_with_pdl=True,
            trigger_completion_at_end=input_tensor.shape[0] > PDL_MAX_TOKENS,
        )
        return reduced

    def destroy(self) -> None:
        """Release the workspaces. LOCAL. Safe to call twice. No all-reduce may be running."""
        while self._workspaces:
            self._workspaces.popitem()[1].destroy()

    def _open(self, hidden_size: int, dtype: torch.dtype) -> bool:
        workspace, reason = None, ""
        if torch.cuda.is_current_stream_capturing():
            reason = "a workspace cannot be opened while a CUDA graph is captured; run one step before"
        else:
            comm = _library()
            try:
                workspace = comm.create_allreduce_fusion_workspace(
                    backend="trtllm",
                    world_size=self.world_size,
                    rank=self.rank,
                    max_token_num=(self.max_bytes or 0) // (hidden_size * dtype.itemsize),
                    hidden_dim=hidden_size,
                    dtype=dtype,
                    comm_backend=comm.mnnvl.TorchDistBackend(group=self.group),
                    group=self.device_group,
                )
            except (RuntimeError, ValueError) as error:  # raised by CUDA, c10d and FlashInfer
                reason = str(error) or type(error).__name__
        reasons = gather_texts(GlooTransport(self.group, "tp"), reason, MAX_REASON_BYTES)
        failed = {rank: each for rank, each in enumerate(reasons) if each}
        if failed:
            if workspace is not None:
                workspace.destroy()
            logger.warning(
                "FlashInfer's all-reduce is off, and vLLM's other all-reduces run in its place: no workspace on ranks %s",
                failed,
            )
            return False
        self._workspaces[hidden_size, dtype] = workspace
        return True


def _library() -> ModuleType:
    import flashinfer.comm
    import flashinfer.comm.mnnvl

    return flashinfer.comm
