"""vllm-ascend's compiled operators of LoRA adapters: each row is multiplied by the matrix of its adapter, or by none.

Source of arguments and results: vllm-ascend, csrc/torch_binding.cpp and csrc/kernels/{bgmv,sgmv}_{shrink,expand}.cpp. The
kernels compute in float32. They skip a row whose index is negative, so its old value stays. No operator reads the device on
the host, so graphs capture all of them.
"""

import torch

RANKS = (8, 16, 32, 64)  # that the expanding kernels take; they check none

SCHEMAS = (
    "bgmv_shrink(Tensor! x, Tensor! weight, Tensor! indices, Tensor! y, float scale) -> ()",
    "sgmv_shrink(Tensor! x, Tensor! weight, Tensor! lora_indices, Tensor! seq_len, Tensor! y, float scale) -> ()",
    # vllm-ascend registers FakeTensor functions for these two.
    "bgmv_expand(Tensor! x, Tensor! weight, Tensor! indices, Tensor! y, int slice_offset, int slice_size) -> Tensor",
    "sgmv_expand(Tensor! x, Tensor! weight, Tensor! lora_indices, Tensor! seq_len, Tensor! y, int slice_offset, "
    "int slice_size) -> Tensor",
)


def bgmv_shrink(
    x: torch.Tensor,  # [rows, hidden] float16 or bfloat16
    weight: torch.Tensor,  # [adapters, rank, hidden] or [adapters, 1, rank, hidden]
    indices: torch.Tensor,  # [rows] int64, the adapter of each row; negative: none
    y: torch.Tensor,  # [rows, rank] float32, written
    scale: float,
) -> None:
    """Write scale * x @ weight[index].T to the rows of y that have an adapter."""
    _check(x.dtype, "x")
    if x.shape[0] != indices.shape[0] or x.shape[0] != y.shape[0] or x.shape[1] <= y.shape[1]:
        raise ValueError(f"bgmv_shrink: x {x.shape}, y {y.shape}, indices {indices.shape} do not fit")
    y.copy_(torch.where(indices.unsqueeze(1) >= 0, _products(x, weight, indices) * scale, y))


def bgmv_expand(
    x: torch.Tensor,  # [rows, rank] float32
    weight: torch.Tensor,  # [adapters, slice_size, rank] or [adapters, 1, slice_size, rank]
    indices: torch.Tensor,  # [rows] int64
    y: torch.Tensor,  # [rows, width] float16 or bfloat16, written
    slice_offset: int,
    slice_size: int,
) -> torch.Tensor:
    """Add x @ weight[index].T to slice_size columns of y, in the rows that have an adapter. Returns y."""
    _check(y.dtype, "y")
    if x.shape[1] not in RANKS:
        raise ValueError(f"bgmv_expand: the kernel has no sum for rank {x.shape[1]}; it has {RANKS}")
    if x.shape[0] != indices.shape[0] or x.shape[0] != y.shape[0] or slice_offset + slice_size > y.shape[1]:
        raise ValueError(
            f"bgmv_expand: x {x.shape}, y {y.shape}, indices {indices.shape}, {slice_offset}+{slice_size} do not fit"
        )
    part = y[:, slice_offset : slice_offset + slice_size]
    part.copy_(torch.where(indices.unsqueeze(1) >= 0, (part.float() + _products(x, weight, indices)).to(y.dtype), part))
    return y


def sgmv_shrink(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_indices: torch.Tensor,  # [sequences] int64
    seq_len: torch.Tensor,  # [sequences] int64, the rows of each sequence, which come one after another
    y: torch.Tensor,
    scale: float,
) -> None:
    """bgmv_shrink for rows that have the adapter of their sequence. Rows after the last sequence have none."""
    bgmv_shrink(x, weight, _indices_of_rows(x, lora_indices, seq_len), y, scale)


def sgmv_expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_indices: torch.Tensor,
    seq_len: torch.Tensor,
    y: torch.Tensor,
    slice_offset: int,
    slice_size: int,
) -> torch.Tensor:
    """bgmv_expand for rows that have the adapter of their sequence."""
    return bgmv_expand(x, weight, _indices_of_rows(x, lora_indices, seq_len), y, slice_offset, slice_size)


def _products(x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x @ weight[index].T in float32. Rows without an adapter get another one's product."""
    matrices = weight.squeeze(1) if weight.dim() == 4 else weight
    return (matrices[indices.clamp(min=0)].float() * x.float().unsqueeze(1)).sum(-1)


def _indices_of_rows(x: torch.Tensor, lora_indices: torch.Tensor, seq_len: torch.Tensor) -> torch.Tensor:
    places = torch.searchsorted(seq_len.cumsum(0), torch.arange(x.shape[0], device=x.device), right=True)
    of_sequence = lora_indices[places.clamp(max=seq_len.shape[0] - 1)]
    return torch.where(places < seq_len.shape[0], of_sequence, -1)


def _check(dtype: torch.dtype, name: str) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is {dtype}; the kernel takes half and bf16")
