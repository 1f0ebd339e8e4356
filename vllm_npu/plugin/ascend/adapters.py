"""LoRA adapters on routed experts: the adapter of a row travels in the id of its expert.

An expert with n adapters counts as n + 1 experts, of which the first one has no adapter. The rows of a token are then sorted by
expert and adapter, whatever moves them, and the counts of these experts say which rows have which adapter. Nothing else has to
travel. vllm-ascend computes the experts and what the adapters add.
"""

from dataclasses import dataclass
from typing import Any

import torch

NONE = -1  # vllm-ascend's number of no adapter


@dataclass(frozen=True, slots=True)
class ExpertAdapters:
    """The adapters of one MoE layer. Equal on all ranks: they are the tensor-parallel ranks of one engine."""

    context: Any  # vllm-ascend's MoELoRAContext of the layer

    @property
    def places(self) -> int:
        """The number of ids that an expert has."""
        return places_of(self.context)

    def ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens, top_k] ids of experts to the ids of experts with their adapters. LOCAL. Host sync: no.

        Rows after the step's tokens are padding, and have no adapter.
        """
        adapters = self.context.punica_wrapper.token_lora_indices[: topk_ids.shape[0]]
        adapters = torch.nn.functional.pad(adapters, (0, topk_ids.shape[0] - adapters.shape[0]), value=NONE)
        return topk_ids * self.places + (adapters - NONE).to(topk_ids.dtype).unsqueeze(1)

    def take(self, counts: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Tell vllm-ascend's experts the adapter of each row. LOCAL. Host sync: yes.

        counts: [num_local_experts * places], the rows of each. Returns the rows of each expert, and their sum.
        """
        of_experts = counts.view(-1, self.places)
        adapters = torch.arange(NONE, self.places + NONE, device=counts.device).repeat(of_experts.shape[0])
        self.context.exchanged_lora_indices = adapters.repeat_interleave(counts)
        return of_experts.sum(1), self.context.exchanged_lora_indices.shape[0]


def places_of(context: Any) -> int:
    """The ids that an expert has with vllm-ascend's context of its layer. Without one (None): 1."""
    return 1 if context is None else int(context.w13_lora_a_stacked[0].shape[0]) - NONE
