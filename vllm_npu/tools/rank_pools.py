"""Pools of ranks by the name of their transport, for `vllm-npu verify` and `vllm-npu bench`."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_npu import envs
from vllm_npu.emulator import cann, launcher
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.launch import RANK_POOLS, RankPool

SYMMETRIC = "symmetric"  # not a transport: ranks meet over NCCL, and the strategy symmetric moves the tokens
TRANSPORT_CHOICES = (*RANK_POOLS, SYMMETRIC)


def split_symmetric(transport: str, strategy: str | None) -> tuple[str, str | None]:
    """The transport and the strategy that the user's two choices mean: `symmetric` means nccl and that strategy alone.

    Raises UnsupportedConfigError for `symmetric` with another strategy.
    """
    if transport != SYMMETRIC:
        return transport, strategy
    if strategy not in (None, SYMMETRIC):
        raise UnsupportedConfigError(f"--transport symmetric is for strategy symmetric; use nccl for {strategy}")
    return "nccl", SYMMETRIC


def measuring_conditions(transport: str, ranks: int, device: str) -> dict[str, Any]:
    """Facts about this machine that a measured time depends on. `device` is the name that open_rank_pool gives."""
    return {
        "device": torch.cuda.get_device_name() if device == "GPU" else device,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transport": transport,
        "ranks": ranks,
    }


@contextmanager
def open_rank_pool(transport: str, ranks: int) -> Iterator[tuple[RankPool, str]]:
    """Ranks over this transport, and the name of their device. hccl without CANN runs on the emulated Ascend device.

    Raises UnsupportedConfigError for an unknown transport, and for a malformed environment variable.
    """
    envs.check_variables()
    if transport not in RANK_POOLS:
        raise UnsupportedConfigError(f"unknown transport {transport!r}; there are: {', '.join(TRANSPORT_CHOICES)}")
    if transport == "hccl" and cann.find() is None:
        with launcher.emulated_devices(ranks) as chip, RANK_POOLS[transport](ranks) as pool:
            yield pool, f"emulated {chip}"
    else:
        with RANK_POOLS[transport](ranks) as pool:
            yield pool, {"hccl": "NPU", "nccl": "GPU"}.get(transport, "CPU")
