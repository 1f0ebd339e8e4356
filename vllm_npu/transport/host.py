"""Identity of a host: decides whether two ranks can use loopback, shared memory and the calls of one HCCL server.

A host's name does not decide: two machines or containers may have the same one.
"""

import hashlib
import os
import socket
import uuid
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NETWORK_NAMESPACE = Path("/proc/self/ns/net")
NUMBER_BYTES = 7  # the number fits in int64


def host_identity() -> str:
    """Text without spaces. Two processes with the same text run on one boot of one machine, in one network namespace. LOCAL.

    Linux: the boot id and the number of the network namespace. Without a boot id in /proc (macOS, Windows): the address of
    a network card and the host's name. A machine without a card gives each process a random address: its ranks count as
    ranks of different hosts, and use sockets. Without /proc/self/ns/net, a machine has one network.
    """
    return f"{_machine()}/{_network()}"


def host_number() -> int:
    """host_identity() as a number from 0 to 2**56 - 1, for ranks that exchange tensors only. LOCAL."""
    return int.from_bytes(hashlib.sha256(host_identity().encode()).digest()[:NUMBER_BYTES], "big")


def _machine() -> str:
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        boot = ""
    if boot:
        return boot
    name = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{uuid.getnode():012x}-{name}"


def _network() -> str:
    try:
        return os.readlink(NETWORK_NAMESPACE)
    except OSError:
        return "net"
