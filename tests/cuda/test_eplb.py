"""The EPLB communicators on GPUs: messages of NCCL, messages staged through pinned memory, and vLLM's PyNccl."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks.test_eplb_contract import PROMISES, STAGING, keeps
from vllm_npu.eplb.communicator import EplbCommunicator
from vllm_npu.eplb.gloo_staged import GlooStagedEplbCommunicator
from vllm_npu.eplb.pynccl import PyNcclEplbCommunicator
from vllm_npu.eplb.torch_dist import TorchDistEplbCommunicator
from vllm_npu.tools.launch import Rank
from vllm_npu.transport.gloo import GlooTransport

pytestmark = pytest.mark.cuda

OPENED: dict[str, Any] = {}  # the groups that this rank's process has opened


def communicator(rank: Rank, kind: str) -> EplbCommunicator:
    if kind == "torch_dist":
        ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
        if "nccl" not in OPENED:
            ep.barrier()  # NCCL's first operation must involve all ranks
            OPENED["nccl"] = ep
        return TorchDistEplbCommunicator(ep)
    if "gloo" not in OPENED:
        OPENED["gloo"] = dist.new_group(backend="gloo")
    if kind == "gloo_staged":
        return GlooStagedEplbCommunicator(GlooTransport(OPENED["gloo"], "ep"), STAGING)
    if "pynccl" not in OPENED:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        OPENED["pynccl"] = PyNcclCommunicator(OPENED["gloo"], rank.device)
    return PyNcclEplbCommunicator(OPENED["pynccl"])


def on_a_stream(rank: Rank, kind: str) -> None:
    with rank.device:
        stream, c = torch.cuda.Stream(), communicator(rank, kind)
        c.set_stream(stream)
        sent, filled = torch.zeros(1 << 20), torch.zeros(1 << 20)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            sent += 1
        c.add_send(sent, (c.rank + 1) % c.size)
        c.add_recv(filled, (c.rank - 1) % c.size)
        c.execute()
        stream.synchronize()
        assert bool((filled == 1).all())


@pytest.mark.parametrize("kind", ["torch_dist", "gloo_staged", "pynccl"])
def test_contract(gpus, kind):
    if kind == "pynccl":
        pytest.importorskip("vllm", reason="needs vLLM: PyNcclCommunicator")
    gpus.run(keeps, communicator, kind, list(PROMISES))
    gpus.run(on_a_stream, kind)
