"""A trace: one file for each rank with its last collectives. The file outlives the rank. trace_comparison.py compares traces.

Standard library only, so that `vllm-npu doctor --trace` can read traces on machines without torch.
"""

import json
import mmap
import os
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vllm_npu.errors import InvalidInputError

VERSION = 2
LINE_BYTES = 512
TIME_BYTES = 17  # at the end of a line: when the call returned, and a line break
RING_CALLS = 4096  # 2 MiB for each rank; a decode step of 60 MoE layers makes about 200 calls
MAX_RANKS = 1 << 16  # of a group; a larger one in a file is refused
OPEN, DONE = "o", "d"  # first letter of a line: the call is running, or it has returned
PEER_TO_PEER = frozenset(
    {"send_recv"}
)  # calls that some ranks of the group do not make; traces are not compared by them


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group of ranks in one epoch. `members` are numbers of ranks in the whole run."""

    name: str
    members: tuple[int, ...]
    epoch: int = 0  # of the failures that all ranks have survived (trust/watchdog.py)

    def __str__(self) -> str:
        """Text such as 'ep:0-3', 'dp:1-7/2' (every second rank of 1 to 7), 'tp:0,3,4', or 'ep#1:0-3' in epoch 1."""
        name = f"{self.name}#{self.epoch}" if self.epoch else self.name
        first, last, count = self.members[0], self.members[-1], len(self.members)
        stride = (last - first) // max(count - 1, 1) or 1
        if self.members != tuple(range(first, last + 1, stride)):
            return f"{name}:{','.join(map(str, self.members))}"
        return f"{name}:{first}-{last}{f'/{stride}' if stride > 1 else ''}"

    @classmethod
    def parse(cls, text: str) -> "Group":
        """Make a group from a text of str(). Raises ValueError for other texts."""
        name, _, ranks = text.rpartition(":")
        name, _, epoch = name.partition("#")
        if "-" not in ranks:
            return cls(name=name, members=tuple(map(int, ranks.split(","))), epoch=int(epoch or 0))
        span, _, stride = ranks.partition("/")
        first, last = map(int, span.split("-"))
        members = range(first, last + 1, int(stride or 1))
        if not members or last - first >= MAX_RANKS:
            raise ValueError(f"{text} is no group of 1 to {MAX_RANKS} ranks")
        return cls(name=name, members=tuple(members), epoch=int(epoch or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One collective of one rank. Counts that do not fit a line are replaced by (-number of counts, their sum, checksum)."""

    group: Group
    number: int  # counts the rank's calls on this group; calls of one number belong to one collective
    operation: str
    row: str = ""  # dtype and shape of a row of each tensor: "bfloat16[4096]+int32[8]"
    sizes: tuple[int, ...] = ()  # rows of each rank; equal on all ranks
    sent: tuple[int, ...] = ()  # rows to each rank, in an all_to_all
    received: tuple[int, ...] = ()  # rows from each rank, in an all_to_all
    stream: int = 0  # numbered by first use on the group
    layer: str = ""
    step: int = 0
    strategy: str = ""
    index: int = 0  # counts the rank's calls on all groups
    began: int = field(default=0, compare=False)  # microseconds of the host's clock since 1970
    ended: int = field(default=0, compare=False)  # 0: not ended
    done: bool = True

    @property
    def meeting(self) -> tuple[Group, int]:
        """Group and number: equal for the calls of all ranks in one collective."""
        return self.group, self.number

    @property
    def must_be_equal(self) -> tuple[object, ...]:
        """Values that must be equal on all ranks of the group."""
        return self.operation, self.row, self.sizes, self.layer, self.step, self.strategy

    def __str__(self) -> str:
        parts = [f"{self.operation} {self.row}".rstrip()]
        parts += [f"sizes {list(self.sizes)}"] if self.sizes else []
        parts += [f"sends {list(self.sent)} receives {list(self.received)}"] if self.sent else []
        parts += [f"step {self.step}", f"layer {self.layer or '-'}", f"strategy {self.strategy or '-'}"]
        return ", ".join([*parts, f"stream {self.stream}"]) + ("" if self.done else " (not ended)")


FIELDS: dict[str, Any] = {each.name: each.type for each in fields(Call) if each.name not in ("group", "ended", "done")}
"""Names and types of the values of a line after its group: int, str, or tuple of ints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrace:
    """The last calls of one rank, in order."""

    rank: int
    calls: tuple[Call, ...]
    process: int = 0
    host: str = ""
    world_size: int = 0


@dataclass(frozen=True, slots=True)
class _Shared:
    """Layer, step and strategy of a rank's next calls."""

    layer: str = ""
    step: int = 0
    strategy: str = ""


@dataclass(slots=True)
class TraceRing:
    """Writes the last RING_CALLS calls of this rank to FOLDER/rankN.trace. LOCAL; about 10 microseconds for each call.

    The file is mapped memory. It keeps all calls when the rank is killed, and can be read while the rank runs. Each line has
    LINE_BYTES; the first line describes the rank. A file of an earlier run is replaced. Only its owner may read it.
    """

    path: Path
    _map: mmap.mmap
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _calls: int = 0
    _numbers: Counter[Group] = field(default_factory=Counter)
    _shared: _Shared = field(default_factory=_Shared)
    _layers: int = 0

    @classmethod
    def create(cls, folder: Path, rank: int, world_size: int) -> "TraceRing":
        """Open the trace of a rank. Raises InvalidInputError if the folder cannot be written."""
        path = folder / f"rank{rank}.trace"
        header = {
            "trace": VERSION,
            "rank": rank,
            "world_size": world_size,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "began": round(time.time(), 3),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            owner_only = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(owner_only, "r+b") as file:
                file.write(_line(json.dumps(header)))
                file.truncate(LINE_BYTES * (1 + RING_CALLS))
                return cls(path, mmap.mmap(file.fileno(), 0))
        except OSError as error:
            raise InvalidInputError(
                f"cannot record collectives in {folder}: {error}; name a folder that can be written"
            ) from error

    def enter_step(self, step: int, strategy: str) -> None:
        """Set the step and the strategy of the calls that follow."""
        self._shared, self._layers = _Shared("", step, strategy), 0

    def enter_layer(self, name: str = "") -> None:
        """Set the layer of the calls that follow. Without a name, it is numbered in the step."""
        self._layers += 1
        self._shared = replace(self._shared, layer=name or f"layer {self._layers} of the step")

    def begin(
        self,
        group: Group,
        operation: str,
        *,
        row: str = "",
        sizes: Sequence[int] = (),
        sent: Sequence[int] = (),
        received: Sequence[int] = (),
        stream: int = 0,
    ) -> Call:
        """Write a call that the rank is about to make, and return it for end()."""
        shared = self._shared
        numbered = replace(group, name=f"{group.name} {operation}") if operation in PEER_TO_PEER else group
        with self._lock:
            call = Call(
                group=group,
                number=self._numbers[numbered],
                operation=operation,
                row=row,
                sizes=tuple(sizes),
                sent=tuple(sent),
                received=tuple(received),
                stream=stream,
                layer=shared.layer,
                step=shared.step,
                strategy=shared.strategy,
                index=self._calls,
                began=_now(),
                done=False,
            )
            self._numbers[numbered] += 1
            self._calls += 1
            self._write(call)
        return call

    def end(self, call: Call, *, sent: Sequence[int] = (), received: Sequence[int] = ()) -> None:
        """Mark the call as returned. `sent` and `received`: rows, if begin() did not know them."""
        if self._calls - call.index > RING_CALLS:
            return  # later calls have overwritten its line
        offset = self._offset(call)
        if sent:
            self._write(replace(call, sent=tuple(sent), received=tuple(received)))
        self._map[offset + LINE_BYTES - TIME_BYTES : offset + LINE_BYTES - 1] = b"%16d" % _now()
        self._map[offset] = ord(DONE)

    def _offset(self, call: Call) -> int:
        return LINE_BYTES * (1 + call.index % RING_CALLS)

    def _write(self, call: Call) -> None:
        offset = self._offset(call)
        self._map[offset : offset + LINE_BYTES] = _line_of(call)


def _now() -> int:
    return time.time_ns() // 1000


def _line(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > LINE_BYTES - TIME_BYTES:
        raise InvalidInputError(f"a line of a trace has {len(encoded)} bytes; it may have {LINE_BYTES - TIME_BYTES}")
    return encoded.ljust(LINE_BYTES - 1) + b"\n"


def _line_of(call: Call) -> bytes:
    try:
        return _line(_text_of(call))
    except InvalidInputError:
        short = replace(
            call,
            sizes=_checksum(call.sizes),
            sent=_checksum(call.sent),
            received=_checksum(call.received),
            row=call.row[-60:],
            layer=call.layer[-60:],
        )
        return _line(_text_of(short))


def _text_of(call: Call) -> str:
    values = [str(call.group), *(getattr(call, name) for name in FIELDS)]
    return (DONE if call.done else OPEN) + json.dumps(values, separators=(",", ":"))


def _checksum(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (-len(sizes), sum(sizes), zlib.crc32(repr(sizes).encode())) if sizes else ()


def read_trace(path: Path) -> RankTrace:
    """Read a trace, which a running rank may be writing. Raises InvalidInputError for a file that is no trace."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read the trace {path}: {error}") from error
    try:
        header = json.loads(content[:LINE_BYTES])
        if header["trace"] != VERSION:
            raise InvalidInputError(
                f"{path} is a trace of version {header['trace']}, not {VERSION}; read it with its own release"
            )
        calls = [
            call
            for offset in range(LINE_BYTES, len(content), LINE_BYTES)
            if (call := _read_call(content[offset : offset + LINE_BYTES])) is not None
        ]
        return RankTrace(
            rank=int(header["rank"]),
            calls=tuple(sorted(calls, key=lambda call: call.index)),
            process=int(header["process"]),
            host=str(header["host"]),
            world_size=int(header["world_size"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            f"{path} is no trace of collectives ({error}); VLLM_NPU_RECORD writes rank*.trace"
        ) from error


def _read_call(line: bytes) -> Call | None:
    """Read one line. Returns None for a line that is empty, half written, or no call, since files may come from anywhere."""
    if line[:1] not in (OPEN.encode(), DONE.encode()):
        return None
    try:
        group, *values = json.loads(line[1:-TIME_BYTES])
        found = {name: _checked(value, kind) for (name, kind), value in zip(FIELDS.items(), values, strict=True)}
        done = line[:1] == DONE.encode()
        return Call(
            group=Group.parse(_checked(group, str)), ended=int(line[-TIME_BYTES:]) if done else 0, done=done, **found
        )
    except (ValueError, TypeError, RecursionError):
        return None


def _checked(value: Any, kind: Any) -> Any:
    """Return a value of a line with the type of its field. Raises TypeError for another type."""
    if kind in (int, str):
        if type(value) is not kind:
            raise TypeError(f"{value!r} is no {kind}")
        return value
    return tuple(_checked(count, int) for count in value)


def read_traces(paths: Iterable[Path]) -> list[RankTrace]:
    """Read the traces in these files and folders. Raises InvalidInputError if they cannot belong to one run."""
    files = [file for path in paths for file in (sorted(path.glob("rank*.trace")) if path.is_dir() else [path])]
    traces = [read_trace(file) for file in files]
    worlds = {trace.world_size for trace in traces}
    if len(worlds) > 1:
        raise InvalidInputError(
            f"traces of runs of {sorted(worlds)} ranks; clear the folder between runs, or name files of one"
        )
    return traces
