"""Large messages over gloo between ranks of one host: the values that sockets give, errors where sizes differ."""

import gc
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.cases import seeded
from vllm_npu.errors import TransportError, UnsupportedConfigError
from vllm_npu.tools.launch import Rank
from vllm_npu.transport import gloo, host, shared_window
from vllm_npu.transport.base import Transport
from vllm_npu.transport.host import host_identity
from vllm_npu.transport.shared_window import SharedWindow

MAPS = Path("/proc/self/maps")
WIDTH = 64
ROUNDS = 12
SIZES = [(1500, 1500, 1500), (3000, 0, 7), (0, 0, 2500), (2100, 1, 2048)]  # of rows of WIDTH float64: over 256 KiB each


def values(rank: int, rows: int, dtype: torch.dtype, round_: int) -> torch.Tensor:
    return torch.randint(0, 16, (rows, WIDTH), generator=seeded(100 * round_ + rank)).to(dtype)


@contextmanager
def group_of(rank: Rank, *, window: str) -> Iterator[Transport]:
    """All ranks' group, with that VLLM_NPU_SHARED_WINDOW meanwhile: other tests use the rank's process as well."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_NPU_SHARED_WINDOW", window)
        yield rank.groups(tp_size=1, dp_size=rank.num_ranks).ep


def exchange(rank: Rank, window: str) -> bool:
    with group_of(rank, window=window) as ep:
        ranks = range(rank.num_ranks)
        for round_, (sizes, dtype) in enumerate(product(SIZES, (torch.float64, torch.int64, torch.bfloat16))):
            sizes = [size * 8 // dtype.itemsize for size in sizes]
            rows = [values(other, sizes[other], dtype, round_) for other in ranks]
            own = rows[rank.rank].clone()
            assert torch.equal(ep.all_gather(own, sizes), torch.cat(rows))
            assert torch.equal(own, rows[rank.rank])
            whole = [values(10 + other, sum(sizes), dtype, round_) for other in ranks]
            expected = torch.stack(whole).sum(0, dtype=torch.float64 if dtype.is_floating_point else dtype).to(dtype)
            assert torch.equal(ep.reduce_scatter(whole[rank.rank], sizes), expected.split(sizes)[rank.rank])
        shared = "_window" in vars(ep) and ep._window is not None
        ep.close()
        assert "vllm_npu_window" not in MAPS.read_text(), "memory stays after close"
        return shared


@pytest.mark.parametrize("window", ["1", "0"])
def test_large_messages_have_the_same_values_with_and_without_a_window(pools, window):
    assert pools("gloo", 3).run(exchange, window) == [window == "1"] * 3


def exchange_where_one_rank_is_unwilling(rank: Rank) -> bool:
    with group_of(rank, window="1" if rank.rank else "0") as ep:
        gathered = ep.all_gather(torch.full((2048, WIDTH), float(rank.rank), dtype=torch.float64))
        assert gathered[::2048, 0].tolist() == list(range(rank.num_ranks))
        return ep._window is None


def test_one_rank_that_does_not_want_it_is_enough(pools):
    assert pools("gloo", 3).run(exchange_where_one_rank_is_unwilling) == [True] * 3


def gather_in_a_hurry(rank: Rank) -> None:
    """No rank waits for others between its calls: a message must not be written over while others read the last."""
    with group_of(rank, window="1") as ep:
        gathered = []
        for round_ in range(ROUNDS):
            gathered.append(
                ep.all_gather(torch.full((2048, WIDTH), float(10 * round_ + rank.rank), dtype=torch.float64))
            )
            torch.rand(1 << (10 + 2 * (rank.rank + round_) % 8)).sort()  # another rank is late in each round
        assert ep._window is not None
        for round_, rows in enumerate(gathered):
            expected = torch.arange(rank.num_ranks, dtype=torch.float64).repeat_interleave(2048) + 10 * round_
            assert torch.equal(rows, expected[:, None].expand(-1, WIDTH))


def test_messages_in_a_row_do_not_overwrite_each_other(pools):
    pools("gloo", 4).run(gather_in_a_hurry)


def bring_other_rows(rank: Rank) -> None:
    with group_of(rank, window="1") as ep:
        own = 3000 if rank.rank == 1 else 2048  # which only it believes
        ep.all_gather(torch.zeros(own, WIDTH, dtype=torch.float64), [own if r == rank.rank else 2048 for r in range(3)])


def test_a_rank_that_brings_other_rows_than_agreed_is_named(pools):
    first, second, third = pools("gloo", 3).outcomes(bring_other_rows)
    assert second is None, "what it was brought is as it believes"
    for error in (first, third):
        assert isinstance(error, TransportError)
        assert "rank 1 brings 1536000 bytes, sizes say 1048576" in str(error)


def about_as_large_as_the_window(rank: Rank, num_rows: int) -> bool:
    """Two messages of this many rows, one in each half; whether there is a window then."""
    with group_of(rank, window="1") as ep:
        before, gloo.CAPACITY, shared_window.CAPACITY = gloo.CAPACITY, 1 << 20, 1 << 20
        try:
            for first in (0.0, 10.0):
                gathered = ep.all_gather(torch.full((num_rows, WIDTH), first + rank.rank, dtype=torch.float64))
                expected = torch.arange(first, first + rank.num_ranks, dtype=torch.float64).repeat_interleave(num_rows)
                assert torch.equal(gathered, expected[:, None].expand(-1, WIDTH))
        finally:
            gloo.CAPACITY = shared_window.CAPACITY = before
        return "_window" in vars(ep)


@pytest.mark.parametrize(("num_rows", "fits"), [(2048, True), (2049, False)])
def test_what_does_not_fit_goes_over_sockets(pools, num_rows, fits):
    assert pools("gloo", 2).run(about_as_large_as_the_window, num_rows) == [fits] * 2


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"host": "another"}, "it runs on another host"),
        ({"mark": "0" * 16}, "is something else; it runs in another container"),
        ({"path": "/proc/self/fd/no"}, "No such file"),
        ({"path": __file__}, "mmap length is greater than file size"),
    ],
)
def test_a_rank_whose_memory_cannot_be_read_is_named(changed, expected):
    def exchange_with_another(text: str) -> list[str]:
        if not text.startswith("{"):
            return [text, text]
        place = json.loads(text)
        assert place["host"] == host_identity()
        return [text, json.dumps(place | changed)]

    with pytest.raises(UnsupportedConfigError, match="rank 0 cannot read the memory of rank 1") as error:
        SharedWindow.open(0, exchange_with_another)
    assert expected in str(error.value)


def reason_for_sockets(ep: Transport, patched: pytest.MonkeyPatch) -> str:
    """Gather a large message, which must arrive without a shared window. Returns what the log says of that."""
    told: list[str] = []
    patched.setattr(gloo.logger, "info", lambda text, *values: told.append(text % values))
    gathered = ep.all_gather(torch.full((2048, WIDTH), float(ep.rank), dtype=torch.float64))
    assert gathered[::2048, 0].tolist() == list(range(ep.size))
    assert ep._window is None
    return told[0]


def exchange_where_one_system_lacks_memfd(rank: Rank) -> str:
    with pytest.MonkeyPatch.context() as patched, group_of(rank, window="1") as ep:
        if rank.rank == 1:
            patched.delattr(os, "memfd_create")
        return reason_for_sockets(ep, patched)


def test_a_system_without_memfd_uses_sockets_and_says_why(pools):
    expected = (
        "Group 'ep' exchanges tokens over gloo alone, without shared memory: rank 1: no memory to share: this system has no "
        "memfd_create"
    )
    assert pools("gloo", 3).run(exchange_where_one_system_lacks_memfd) == [expected] * 3


def exchange_between_hosts(rank: Rank, folder: str) -> str:
    """Rank 1 has another network namespace; the hosts' names are equal."""
    with pytest.MonkeyPatch.context() as patched, group_of(rank, window="1") as ep:
        if rank.rank == 1:
            elsewhere = Path(folder, "net")
            elsewhere.symlink_to("net:[1]")
            patched.setattr(host, "NETWORK_NAMESPACE", elsewhere)
        return reason_for_sockets(ep, patched)


def test_ranks_in_different_network_namespaces_use_sockets(pools, tmp_path):
    for told in pools("gloo", 2).run(exchange_between_hosts, str(tmp_path)):
        assert told.endswith("rank 0 cannot read the memory of rank 1: it runs on another host")


def test_a_rank_without_memory_to_share_is_named_and_this_ranks_is_released():
    with pytest.raises(UnsupportedConfigError, match=r"^rank 1: no memory to share: \[Errno 24\]"):
        SharedWindow.open(0, lambda text: [text, "no memory to share: [Errno 24] Too many open files"])
    gc.collect()  # the error's frames
    assert "vllm_npu_window" not in MAPS.read_text()


def test_a_rank_that_can_open_no_file_says_so():
    told = []

    def exchange_with_another(text: str) -> list[str]:
        told.append(text)
        return [text, '{"host": "", "path": "", "mark": ""}']

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(UnsupportedConfigError, match="rank 0: no memory to share"):
            SharedWindow.open(0, exchange_with_another)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert told == ["no memory to share: [Errno 24] Too many open files"]
