"""Handles of stages whose inverse takes one row for each row that the stage returned: prepare and dispatch."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from vllm_npu.core.handles import Handle, check_handle
from vllm_npu.core.token_layout import check_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RowHandle(Handle):
    """A handle whose inverse must be given a tensor of `rows` rows."""

    rows: int


RowHandleT = TypeVar("RowHandleT", bound=RowHandle)


def consume(
    handle: RowHandle,
    expected: type[RowHandleT],
    x: torch.Tensor,  # [handle.rows, width]
    *,
    stage: str,  # the inverse, for errors
    name: str,  # of x, for errors
    meaning: str,  # of a row of x, for errors
) -> RowHandleT:
    """Return the handle as the type that the inverse needs, check `x` by it, and mark the handle as used.

    Raises HandleMismatchError for a handle of another type or a used one, and InvalidInputError for the wrong number of rows.
    A handle is not marked where this raises InvalidInputError, or HandleMismatchError for its type.
    """
    checked = check_handle(handle, expected, stage)
    check_rows(x, checked.rows, name=name, stage=stage, meaning=meaning)
    checked.spend(stage)
    return checked
