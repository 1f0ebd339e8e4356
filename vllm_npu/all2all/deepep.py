"""Sizes of the buffers of DeepEP (github.com/deepseek-ai/DeepEP, legacy API), computed without the library.

vLLM ships both managers of DeepEP. This file tells beforehand how much memory they ask for.
"""

from dataclasses import dataclass

from vllm_npu.core.token_layout import ceil_div
from vllm_npu.errors import UnsupportedConfigError

NUM_SMS = 20  # default of DeepEP and of vLLM
ALIGNMENT = 128  # bytes: NUM_BUFFER_ALIGNMENT_BYTES of csrc/kernels/configs.cuh
SCALE_GROUP = 128  # channels that share an fp8 scale
INT4_BYTES = 16  # size of CUDA's int4, the header of a message


@dataclass(frozen=True, slots=True)
class DeepEPBuffer:
    """The arguments of deep_ep.Buffer."""

    num_nvl_bytes: int
    num_rdma_bytes: int
    num_qps_per_rank: int
    low_latency_mode: bool


def high_throughput_buffer(*, buffer_mb: int, internode: bool, num_sms: int = NUM_SMS) -> DeepEPBuffer:
    """Return the buffer of the high-throughput kernels: buffer_mb MiB for NVLink, and as much for RDMA between hosts.

    Source: the arguments of vLLM 0.23's DeepEPHTAll2AllManager. Two multiprocessors make one channel.
    """
    num_bytes = buffer_mb << 20
    return DeepEPBuffer(
        num_nvl_bytes=num_bytes,
        num_rdma_bytes=num_bytes if internode else 0,
        num_qps_per_rank=num_sms // 2 if internode else 1,
        low_latency_mode=False,
    )


def low_latency_buffer(
    *, buffer_mb: int, max_tokens_per_rank: int, hidden_size: int, ep_size: int, num_experts: int
) -> DeepEPBuffer:
    """Return the buffer of the low-latency kernels: buffer_mb MiB for NVLink, and slots for the tokens of every expert.

    Raises UnsupportedConfigError where the kernels have no layout for these sizes.
    """
    if num_experts % ep_size:
        raise UnsupportedConfigError(f"{num_experts} experts do not divide over ep_size={ep_size}")
    if hidden_size % SCALE_GROUP:
        raise UnsupportedConfigError(
            f"DeepEP's low-latency kernels take hidden_size in multiples of {SCALE_GROUP}, not {hidden_size}"
        )
    return DeepEPBuffer(
        num_nvl_bytes=buffer_mb << 20,
        num_rdma_bytes=low_latency_bytes(max_tokens_per_rank, hidden_size, num_experts),
        num_qps_per_rank=num_experts // ep_size,
        low_latency_mode=True,
    )


def low_latency_bytes(max_tokens_per_rank: int, hidden_size: int, num_experts: int) -> int:
    """Return the bytes of symmetric memory on each rank, as Buffer.get_low_latency_rdma_size_hint does.

    A send buffer, a receive buffer and counters exist twice, for odd and even steps. The receive buffer has a slot for each
    expert and token. A dispatched row has a header and is bf16, or fp8 with scales. A returned row is bf16 with the minimum and
    maximum of each group. Source: LowLatencyLayout in csrc/config.hpp.
    """
    groups = hidden_size // SCALE_GROUP
    dispatched_row = INT4_BYTES + max(2 * hidden_size, hidden_size + 4 * groups)
    returned_row = 2 * hidden_size + 4 * groups
    slots = num_experts * max_tokens_per_rank
    send = max(max_tokens_per_rank * dispatched_row, slots * returned_row)
    receive = slots * max(dispatched_row, returned_row)
    counters = ceil_div(4 * num_experts, ALIGNMENT) * ALIGNMENT
    total = 2 * (send + receive + counters)
    return (total + ALIGNMENT) // ALIGNMENT * ALIGNMENT
