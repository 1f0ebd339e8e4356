"""The C++ operators of csrc_npu/ops: tokens travel straight through HCCL, on the current stream.

Where nobody has run `python -m vllm_npu.transport.hccl_direct.build`, the first group builds them.
"""

from functools import cache
from typing import Any

import torch

from vllm_npu import envs
from vllm_npu.core.token_layout import RowFormat
from vllm_npu.errors import NativeBuildError
from vllm_npu.transport.hccl_direct.build import TOKEN_OPS
from vllm_npu.transport.hccl_direct.library import OTHER, REMEDIES


@cache
def why_not() -> str | None:
    """Why this process cannot use the operators, or None once they are loaded. LOCAL. Builds them where they are not built
    yet: about 40 seconds."""
    if not envs.HCCL_OPS.read_flag():
        return f"{envs.HCCL_OPS.name}=0"
    try:
        library = TOKEN_OPS.build() / TOKEN_OPS.product
        import torch_npu  # noqa: F401  # the library needs its symbols

        torch.ops.load_library(str(library))
        ops().set_remedies(list(REMEDIES), list(REMEDIES.values()), OTHER)
    except (NativeBuildError, ImportError, OSError) as error:
        return str(error)
    _register_shapes()
    return None


def ops() -> Any:
    """torch.ops.vllm_npu. Valid once why_not() is None."""
    return torch.ops.vllm_npu


@cache
def overload(name: str) -> Any:
    """An operator, as cheap to call as there is a way. Valid once why_not() is None."""
    return getattr(ops(), name).default


def _register_shapes() -> None:
    """What FakeTensor and the meta device see: the operators' shapes, nothing moved."""

    @torch.library.register_fake("vllm_npu::gather_message")
    def _(tensors: list[torch.Tensor], sizes: list[int], group: str) -> torch.Tensor:
        return _message(tensors, sum(sizes))

    @torch.library.register_fake("vllm_npu::exchange_message")
    def _(tensors: list[torch.Tensor], rows_per_rank: torch.Tensor, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.library.get_ctx().new_dynamic_size()
        return _message(tensors, rows), torch.empty((2, rows_per_rank.shape[0]), dtype=torch.int64, device="cpu")

    @torch.library.register_fake("vllm_npu::exchange_rows")
    def _(x: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], group: str) -> torch.Tensor:
        return x.new_empty((sum(receive_sizes), *x.shape[1:]))

    @torch.library.register_fake("vllm_npu::scatter_reduce_tokens")
    def _(x: torch.Tensor, sizes: list[int], rank: int, group: str) -> torch.Tensor:
        return x.new_empty((sizes[rank], *x.shape[1:]))


def _message(tensors: list[torch.Tensor], rows: "int | torch.SymInt") -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0].new_empty((rows, *tensors[0].shape[1:]))
    return tensors[0].new_empty((rows, RowFormat.of(tensors).row_bytes), dtype=torch.uint8)
