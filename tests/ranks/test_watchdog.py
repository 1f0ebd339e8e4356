"""Ranks that end or are late: every other one says so, by name and in time; nothing is left, and a restart serves the same."""

import json
import os
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving_ranks import DEADLINE, NUM_RANKS, kill_and_restart, stop_this_process
from tests.time_limits import PATIENCE_SECONDS, wait_until
from vllm_npu.errors import RankFailureError
from vllm_npu.tools.launch import ProcessRankPool, Rank
from vllm_npu.transport import host
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.host import host_identity
from vllm_npu.trust.mailboxes import EPOCH, LARGEST_LETTER, LOOPBACK, TAKEN, Mailbox
from vllm_npu.trust.step_lookout import StepLookout
from vllm_npu.trust.watchdog import LETTER_SECONDS, REPORT_CHARACTERS, Watchdog

KILLS = int(os.environ.get("KILLS", "2"))  # 50 in the long form


def test_survivors_of_a_kill_name_the_dead_rank_and_a_restart_serves_the_same(tmp_path, nothing_left_behind):
    pool = partial(ProcessRankPool, NUM_RANKS, DEADLINE, start_method="forkserver")
    assert kill_and_restart(pool, KILLS, tmp_path) == []


def be_late(rank: Rank, seconds: float) -> tuple[RankFailureError | None, float]:
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    ep.barrier()
    started = time.monotonic()
    if rank.rank == 1:
        time.sleep(seconds)
    try:
        ep.all_gather(torch.zeros(rank.rank, 3), [0, 1, 2])
    except RankFailureError as error:
        return error, time.monotonic() - started
    return None, 0.0


def test_a_late_rank_is_named_at_the_deadline_also_to_itself():
    """By an uneven gather: sends and receives, which gloo lets wait for ever."""
    deadline = 2.0
    with ProcessRankPool(3, timeout=deadline, start_method="forkserver") as pool:
        outcomes = pool.run(be_late, 9.0)
    for rank in (0, 2):
        error, seconds = outcomes[rank]
        assert error.ranks == (1,)
        assert "rank 1 is late (process " in str(error)
        assert deadline <= seconds < deadline + 9
    error, _ = outcomes[1]
    assert "rank 0 reports: send_recv on group 'ep'" in str(error)


def is_stopped(pid: str) -> bool:
    return bool(pid) and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def look_for_culprits(rank: Rank, folder: Path, stopped_for: float) -> RankFailureError | None:
    """Rank 1 is late. Rank 2 stands for a while, and then is late. Neither reports a failure."""
    rank.groups(tp_size=1, dp_size=rank.num_ranks).ep.barrier()
    number, done = folder / "pid", folder / "done"
    if rank.rank == 2:
        number.write_text(str(os.getpid()))
        stop_this_process(stopped_for)
    if rank.rank > 0:
        wait_until(done.exists, "rank 0 names the culprits")
        return None
    wait_until(lambda: number.exists() and is_stopped(number.read_text()), "rank 2 is stopped")
    assert rank.watchdog is not None
    error = rank.watchdog.failure("all_gather", "ep", 0, "Timed out")
    done.touch()
    return error


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see that a process is stopped: Linux")
def test_a_rank_that_takes_a_letter_late_is_no_more_stopped_than_the_late_rank(tmp_path):
    """As on a host that has no time for a rank: it must not be blamed alone, in place of the rank that did not come."""
    with ProcessRankPool(3, timeout=PATIENCE_SECONDS, start_method="forkserver") as pool:
        error, _, _ = pool.outcomes(look_for_culprits, tmp_path, LETTER_SECONDS + 2)
    assert error.ranks == (1, 2)
    assert all(f"rank {rank} is late (process " in str(error) for rank in (1, 2))


class WaitsForADevice(GlooTransport):
    """A group whose ranks wait until its abort, as a rank waits for kernels of NCCL."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


def wait_as_for_a_device(rank: Rank, ends: bool) -> RankFailureError | None:
    """A step waits for a device, as after a collective of NCCL. Rank 1 ends meanwhile, or works on (a wait of 4 s)."""
    ep = rank.groups(tp_size=1, dp_size=rank.num_ranks).ep
    ep.all_reduce(torch.zeros(3))
    if rank.rank == 1 and ends:
        os._exit(1)
    assert rank.watchdog is not None
    group = WaitsForADevice(ep.innermost.process_group, "ep")
    lookout = StepLookout(rank.watchdog, look_seconds=0.5, groups=(group,))
    try:
        with lookout.waiting():
            assert group.aborted.wait(PATIENCE_SECONDS if ends else 4) == ends
        if not ends:
            ep.barrier()  # a rank that ended its look first would be gone for the others
        lookout.check()
    except RankFailureError as error:
        return error
    finally:
        lookout.close()
    return None


@pytest.mark.parametrize("ends", [True, False])
def test_a_step_that_waits_for_a_device_names_the_ended_rank_and_the_collective(ends):
    with ProcessRankPool(3, timeout=PATIENCE_SECONDS, start_method="forkserver") as pool:
        outcomes = pool.outcomes(wait_as_for_a_device, ends)
    if not ends:
        assert outcomes == [None] * 3, "a long step of ranks that are all there is no failure"
        return
    for error in (outcomes[0], outcomes[2]):
        assert error.ranks == (1,)
        assert (error.group, error.operation) == ("ep", "all_reduce")
        assert "rank 1 has ended" in str(error)
        assert "has waited" in str(error)


@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8 on the loopback interface: Linux")
def test_a_living_rank_of_another_host_with_the_same_name_is_there():
    """Its port is open at its own address, and closed on this host's loopback."""
    with socket.create_server(("127.0.0.2", 0)) as served:
        port = served.getsockname()[1]
        same, other = (
            Mailbox("127.0.0.2", port, socket.gethostname(), identity, os.getpid())
            for identity in (host_identity(), "another boot/net:[1]")
        )
        assert (same.reachable_address, other.reachable_address) == (LOOPBACK, "127.0.0.2")
        assert other.is_there()
        assert not same.is_there(), "loopback is for the same identity, and there nobody listens"


def test_a_mailbox_has_the_identity_of_its_host(monkeypatch, tmp_path):
    elsewhere = tmp_path / "net"
    elsewhere.symlink_to("net:[1]")
    opened = []

    def two_ranks(text: str) -> list[str]:
        opened.append(Mailbox(**json.loads(text)))
        return [text, text]

    Watchdog.open(0, two_ranks, address="10.0.0.1", deadline=1.0)
    monkeypatch.setattr(host, "NETWORK_NAMESPACE", elsewhere)
    Watchdog.open(1, two_ranks, address="10.0.0.1", deadline=1.0)
    first, second = opened
    assert first.host == second.host
    assert (first.reachable_address, second.reachable_address) == ("10.0.0.1", LOOPBACK)


def watchdog_of_two_ranks() -> tuple[Watchdog, int]:
    """The watchdog of rank 0, and the port of its mailbox, which is that of rank 1 too."""
    ports = []

    def exchange(text: str) -> list[str]:
        ports.append(json.loads(text)["port"])
        return [text, text]

    return Watchdog.open(0, exchange, address=LOOPBACK, deadline=1.0), ports[0]


def hand_in(port: int, sent: bytes) -> bytes:
    """Send bytes to a mailbox, and return its answer."""
    with socket.create_connection((LOOPBACK, port), PATIENCE_SECONDS) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(1)


NO_LETTERS = (
    b"",
    b"half a letter",
    b"\n",
    b"\xff\n",
    b"[1, 2]\n",
    b"[[], {}, 3]\n",
    b'[1, "epoch", "x"]\n',
    b"[" * 60_000 + b"\n",
    b"x" * (LARGEST_LETTER - 1) + b"\n",
)


def test_whatever_lies_in_a_mailbox_the_error_is_short_and_readable():
    watchdog, port = watchdog_of_two_ranks()
    for sent in NO_LETTERS:
        assert hand_in(port, sent) == b"", sent[:40]
    assert not watchdog.is_left()
    letter = json.dumps([1, "failed in epoch 0", "\x1b\n" + "\N{REPLACEMENT CHARACTER}" * 9_000])
    assert hand_in(port, letter.encode() + b"\n") == TAKEN
    error = watchdog.failure("all_gather", "ep", 0, "cut")
    assert str(error).endswith("rank 1 reports:   " + "\N{REPLACEMENT CHARACTER}" * (REPORT_CHARACTERS - 2))


def test_of_announcements_that_overtake_one_another_the_highest_stays():
    watchdog, port = watchdog_of_two_ranks()
    for epoch in (2, 3, 1):
        assert hand_in(port, json.dumps([1, EPOCH, epoch]).encode() + b"\n") == TAKEN
    assert watchdog.is_left()
    assert watchdog.next_epoch().epoch == 3
