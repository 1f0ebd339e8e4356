"""The C++ operators of csrc_npu/ops. They move tokens through HCCL on the current stream, without torch.distributed.

`python -m vllm_npu.transport.hccl_direct.build` builds them. Without their library, why_not() gives the reason.
"""

from functools import cache
from typing import Any

import torch

from vllm_npu import envs
from vllm_npu.core.token_layout import RowFormat
from vllm_npu.errors import NativeBuildError
from vllm_npu.transport.hccl_direct.build import built_library
from vllm_npu.transport.hccl_direct.library import OTHER, REMEDIES


def why_not() -> str | None:
    """Load the operators and return None, or return the reason why this process cannot use them. LOCAL.

    Raises UnsupportedConfigError if VLLM_NPU_HCCL_OPS is malformed.
    """
    return _fault_of_library() if envs.HCCL_OPS.read_flag() else f"{envs.HCCL_OPS.name}=0"


@cache
def _fault_of_library() -> str | None:
    """Load the library once in a process. Returns None, or the reason why it cannot be loaded."""
    try:
        library = built_library()
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
    """One operator as an OpOverload, which costs less to call than its packet. Valid once why_not() is None."""
    return getattr(ops(), name).default


def _register_shapes() -> None:
    """Register the operators' output shapes for FakeTensor and the meta device."""

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
    """An empty message of `rows` rows: a single tensor keeps its dtype, several become [rows, row_bytes] uint8."""
    if len(tensors) == 1:
        return tensors[0].new_empty((rows, *tensors[0].shape[1:]))
    return tensors[0].new_empty((rows, RowFormat.of(tensors).row_bytes), dtype=torch.uint8)
