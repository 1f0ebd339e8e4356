"""The kernel of vLLM 0.23 and vllm-ascend 0.30 that computes the slot of each token in the paged cache, without Triton."""

from typing import Any

import torch


class SlotMappingKernel:
    """A function with the call syntax of Triton, `kernel[grid](arguments)`, for the kernel _compute_slot_mapping_kernel."""

    def __getitem__(self, grid: tuple[int]) -> "SlotMappingKernel":
        return self

    def __call__(
        self,
        num_tokens: int,
        max_num_tokens: int,
        query_start_loc: torch.Tensor,  # [num_requests + 1] int32
        positions: torch.Tensor,  # [num_tokens] int64
        block_table: torch.Tensor,  # [requests, blocks] int32
        block_table_stride: int,
        block_size: int,
        slot_mapping: torch.Tensor,  # [max_num_tokens]
        *,
        TOTAL_CP_WORLD_SIZE: int,
        PAD_ID: int,
        IS_CIRCULAR: bool = False,
        **other_constants: Any,
    ) -> None:
        """Write block * block_size + offset of each token to `slot_mapping`, and PAD_ID after the last token. LOCAL; host sync.

        Raises NotImplementedError for context parallelism, which spreads the blocks over ranks, and for a circular cache.
        """
        if IS_CIRCULAR:
            raise NotImplementedError("a circular cache: the emulated device's slot mapping is for paged caches")
        if TOTAL_CP_WORLD_SIZE != 1:
            raise NotImplementedError(
                f"context parallelism over {TOTAL_CP_WORLD_SIZE} ranks: the emulated device's slot mapping is for one"
            )
        starts = query_start_loc.cpu().long()
        lengths = starts.diff()
        end = int(starts[-1])
        requests = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        where = positions[:end].cpu().long()
        blocks = block_table.cpu()[requests, where // block_size].long()
        slot_mapping[num_tokens:max_num_tokens].fill_(PAD_ID)
        slot_mapping[:end].copy_(blocks * block_size + where % block_size)
