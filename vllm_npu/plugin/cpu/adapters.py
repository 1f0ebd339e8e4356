"""LoRA adapters on a CPU: rows without an adapter stay as they are.

vLLM gives such rows the number -1. Its operators for CPUs take the number as an index, which then means the last adapter (vLLM
pull request 48421, not in 0.32). So a request without an adapter gets another request's adapter as soon as both share a step.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class CpuAdapters(PunicaWrapperCPU):
    """vLLM's operators of adapters, which are linear: a row of zeros adds nothing."""

    def add_shrink(self, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """The first product of an adapter, of x [num_tokens, input_size]. LOCAL. Host sync: no, the device is the host."""
        rows = x.view(-1, x.shape[-1])
        super().add_shrink(y, _with_adapter(rows, self.token_lora_indices), *args, **kwargs)

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """The second product of an adapter of embeddings, of x [num_tokens, rank]. LOCAL. Host sync: no."""
        super().add_lora_embedding(y, _with_adapter(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Both products of an adapter of logits, of x [num_samples, hidden_size]. LOCAL. Host sync: no."""
        rows = x.view(-1, x.shape[-1])
        super().add_lora_logits(y, _with_adapter(rows, self.sampler_indices), *args, **kwargs)


def _with_adapter(rows: torch.Tensor, adapters: torch.Tensor) -> torch.Tensor:
    """`rows`, with zeros where a row has no adapter."""
    return rows.masked_fill((adapters < 0).unsqueeze(1), 0)
