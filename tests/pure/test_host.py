"""host_identity: which processes share a host, by boot id and network namespace, also where /proc is absent."""

import re
import socket
import subprocess
import sys
import uuid

import pytest
import torch

from vllm_npu.transport import host
from vllm_npu.transport.host import host_identity, host_number

OTHER_PROCESS = "from vllm_npu.transport.host import host_identity; print(host_identity())"


@pytest.fixture
def without_proc(monkeypatch, tmp_path):
    """A system without /proc, as macOS is."""
    monkeypatch.setattr(host, "BOOT_ID", tmp_path / "boot_id")
    monkeypatch.setattr(host, "NETWORK_NAMESPACE", tmp_path / "net")


def boot(monkeypatch, tmp_path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    monkeypatch.setattr(host, "BOOT_ID", path)


def network(monkeypatch, tmp_path, number: int) -> None:
    path = tmp_path / f"net{number}"
    if not path.is_symlink():
        path.symlink_to(f"net:[{number}]")
    monkeypatch.setattr(host, "NETWORK_NAMESPACE", path)


def test_two_processes_of_this_machine_have_one_identity():
    printed = subprocess.run([sys.executable, "-c", OTHER_PROCESS], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == host_identity()


def test_equal_names_are_different_hosts_after_another_boot_or_in_another_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "gethostname", lambda: "worker")
    seen = {}
    for name in ("a", "b"):
        boot(monkeypatch, tmp_path, name, f"{name}0000000-0000\n")
        for number in (1, 2):
            network(monkeypatch, tmp_path, number)
            seen[name, number] = host_identity(), host_number()
    assert len({identity for identity, _ in seen.values()}) == 4
    assert len({number for _, number in seen.values()}) == 4
    assert seen["a", 1][0] == "a0000000-0000/net:[1]"


def test_the_name_does_not_count_where_there_is_a_boot_id(monkeypatch, tmp_path):
    boot(monkeypatch, tmp_path, "boot", "b00t")
    identities = set()
    for name in ("one", "two"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        identities.add(host_identity())
    assert len(identities) == 1


def test_without_proc_the_network_card_and_the_name_decide(monkeypatch, without_proc):
    identities = set()
    for address, name in ((0x0242AC110002, "mac"), (0x0242AC110003, "mac"), (0x0242AC110002, "other")):
        monkeypatch.setattr(uuid, "getnode", lambda address=address: address)
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert host_identity() == host_identity()
        identities.add(host_identity())
    assert len(identities) == 3
    assert all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{8}/net", identity) for identity in identities)


def test_an_empty_boot_id_identifies_no_machine(monkeypatch, tmp_path, without_proc):
    monkeypatch.setattr(uuid, "getnode", lambda: 0x0242AC110002)
    absent = host_identity()
    boot(monkeypatch, tmp_path, "empty", "\n")
    assert host_identity() == absent


def test_the_number_fits_in_int64_and_is_that_of_the_identity(monkeypatch, tmp_path):
    boot(monkeypatch, tmp_path, "boot", "b00t")
    first = host_number()
    assert torch.tensor([first]).tolist() == [first] == [host_number()]
    boot(monkeypatch, tmp_path, "another", "b002")
    assert host_number() != first
