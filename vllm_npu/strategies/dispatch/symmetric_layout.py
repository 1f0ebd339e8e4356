"""Where the slots of the symmetric strategy lie in a window of shared GPU memory. Pure arithmetic, equal on all ranks.

Slot `rank * num_tokens + t` holds token t of that rank. A window holds the slots in four parts: rows, scales, weights, ids.
"""

from dataclasses import dataclass

import torch

from vllm_npu.core.limits import SYMMETRIC, SymmetricLimits
from vllm_npu.transport.symmetric_memory import SymmetricFacts, align

FP8_GROUP = 128
"""Columns of a scale where dispatch casts rows to fp8: those of DeepSeek-V3's blocks, and what DeepEP's use_fp8 and the
block-quantised experts of vLLM and DeepGEMM take."""
WORD_BYTES = 4  # the size of a scale, a weight and an id; the kernels also move rows in such words


def why_not_symmetric(
    facts: SymmetricFacts, *, tokens_per_rank: int, limits: SymmetricLimits = SYMMETRIC
) -> str | None:
    """The reason why symmetric memory cannot carry a step of tokens_per_rank rows on each rank. None: it can carry the step."""
    if not facts.cuda:
        return "not every rank has a CUDA device of its own"
    if not facts.triton:
        return "Triton is not installed on every rank"
    if facts.num_ranks < 2:
        return "there is one rank only"
    if facts.num_ranks > limits.max_ep_size:
        return f"{facts.num_ranks} ranks are more than {limits.max_ep_size}"
    if facts.num_hosts > 1:
        return f"the ranks are on {facts.num_hosts} hosts"
    if not facts.peer_access:
        return "not every GPU can write every other GPU's memory"
    if tokens_per_rank > limits.max_tokens_per_rank:
        return f"{tokens_per_rank} tokens a rank are more than {limits.max_tokens_per_rank}"
    return None


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Sizes of the slots of one dispatch, and the byte offset of each part in a window. Offsets are aligned."""

    num_slots: int  # ep_size * num_tokens
    row_bytes: int  # of a row of hidden_states
    scale_width: int  # float32 scales of a row; 0: rows have no scales
    top_k: int

    @property
    def scales_offset(self) -> int:
        """Start of the scales. The rows start at 0."""
        return align(self.num_slots * self.row_bytes)

    @property
    def weights_offset(self) -> int:
        """Start of the weights."""
        return self.scales_offset + align(self.num_slots * self.scale_width * WORD_BYTES)

    @property
    def ids_offset(self) -> int:
        """Start of the local expert ids."""
        return self.weights_offset + align(self.num_slots * self.top_k * WORD_BYTES)

    @property
    def num_bytes(self) -> int:
        """Bytes of the four parts together."""
        return self.ids_offset + align(self.num_slots * self.top_k * WORD_BYTES)

    def views(self, window: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The rows (of `dtype`), scales, weights and ids in `window` [bytes] uint8. Each is a view with a row for each slot."""
        parts = (
            (0, self.row_bytes, dtype),
            (self.scales_offset, self.scale_width * WORD_BYTES, torch.float32),
            (self.weights_offset, self.top_k * WORD_BYTES, torch.float32),
            (self.ids_offset, self.top_k * WORD_BYTES, torch.int32),
        )
        return tuple(
            window[offset : offset + self.num_slots * row_bytes]
            .view(part_dtype)
            .view(self.num_slots, row_bytes // part_dtype.itemsize)
            for offset, row_bytes, part_dtype in parts
        )
