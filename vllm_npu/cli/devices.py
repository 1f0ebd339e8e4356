"""What the ranks of verify and bench run on."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_npu.emulator import cann, launcher
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.launch import RANK_POOLS, RankPool

SYMMETRIC = "symmetric"  # not a transport of its own: NCCL's ranks, whose tokens go through symmetric memory
TRANSPORT_CHOICES = (*RANK_POOLS, SYMMETRIC)


def split_symmetric(transport: str, strategy: str | None) -> tuple[str, str | None]:
    """(transport, strategy) of the command line, with `symmetric` as what it stands for: nccl, that strategy alone."""
    if transport != SYMMETRIC:
        return transport, strategy
    if strategy not in (None, SYMMETRIC):
        raise UnsupportedConfigError(f"--transport symmetric is for strategy symmetric; use nccl for {strategy}")
    print("--transport symmetric: ranks meet over nccl, tokens travel by strategy symmetric alone", file=sys.stderr)
    return "nccl", SYMMETRIC


def conditions_of(transport: str, ranks: int, device: str) -> dict[str, Any]:
    """What times that ranks took were taken under; `device` is rank_pool's."""
    return {
        "device": torch.cuda.get_device_name() if device == "GPU" else device,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transport": transport,
        "ranks": ranks,
    }


def as_title(conditions: dict[str, Any]) -> str:
    """Of a table or a chart."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


@contextmanager
def rank_pool(transport: str, ranks: int) -> Iterator[tuple[RankPool, str]]:
    """Ranks over this transport, and the name of their device. hccl without CANN: the emulated Ascend device."""
    if transport not in RANK_POOLS:
        raise UnsupportedConfigError(f"unknown transport {transport!r}; there are: {', '.join(TRANSPORT_CHOICES)}")
    if transport == "hccl" and cann.find() is None:
        with launcher.emulated_devices(ranks) as chip, RANK_POOLS[transport](ranks) as pool:
            yield pool, f"emulated {chip}"
    else:
        with RANK_POOLS[transport](ranks) as pool:
            yield pool, {"hccl": "NPU", "nccl": "GPU"}.get(transport, "CPU")
