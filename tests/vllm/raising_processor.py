"""A logits processor for servers under test: it raises an exception in the middle of a request that asks for it."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

PATH = f"{__name__}:RaisingProcessor"
RAISE_AFTER = "raise_after"  # in the request's vllm_xargs: tokens


class RaisingProcessor(LogitsProcessor):
    """Raises ValueError in the step of a request that has as many tokens as its vllm_xargs say."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._watched: dict[int, tuple[int, list[int]]] = {}  # by place in the batch: the limit, and the tokens so far

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._watched.pop(place, None)
        for place, params, _, tokens in batch_update.added:
            self._watched.pop(place, None)
            if (limit := (params.extra_args or {}).get(RAISE_AFTER)) is not None:
                self._watched[place] = int(limit), tokens
        for source, target, direction in batch_update.moved:
            moved, replaced = self._watched.pop(source, None), self._watched.pop(target, None)
            if moved is not None:
                self._watched[target] = moved
            if replaced is not None and direction is MoveDirectionality.SWAP:
                self._watched[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for limit, tokens in self._watched.values():
            if len(tokens) >= limit:
                raise ValueError("this request asked for an exception")
        return logits
