"""Report of the functions of CANN that the installed torch_npu needs. The built libraries show which ones are emulated.

    python -m vllm_npu.emulator report [--json PATH]

It answers three questions:

- Which symbols do the wheel's libraries need to load? Symbol tables give a certain answer. The code of a function shows whether
  it is emulated. For aclnn functions, only their presence is read.
- Which functions of CANN do they look up by name while they run? Names are texts in the wheel, so a few may be no functions.
- Which operators of torch_npu can run? Only their names tell: npu_moe_re_routing needs aclnnMoeReRouting, for example.
"""

import contextlib
import ctypes
import functools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from vllm_npu.emulator.build import DEVICE, build
from vllm_npu.errors import EmulatorBuildError

IMPORT_SECONDS = 120.0
SHOWN_CHARACTERS = 240  # longest list of names in the text; --json has all names


class State(StrEnum):
    """State of a function of CANN on the emulated device."""

    EMULATED = "emulated"
    NO_EFFECT = "no effect"  # it returns a constant: profiling, options without an effect here
    REFUSED = "refused"  # it fails with its name when it is called
    ABSENT = "absent"  # a look-up finds nothing, and torch_npu regards the feature as missing


class Inferred(StrEnum):
    """Whether an operator can run, inferred from its name."""

    PROVIDED = "provided"  # all functions with its name are emulated
    IN_PART = "in part"  # some of these functions are emulated
    ABSENT = "absent"  # none of these functions is emulated
    UNKNOWN = "not known from its name"  # it may consist of other operators, need no function, or need a graph operator


@dataclass(frozen=True, slots=True)
class Operator:
    """One schema of torch_npu, and the functions with the same name."""

    state: Inferred
    functions: dict[str, State]


@dataclass(slots=True)
class Report:
    torch_npu: str
    torch: str
    libraries: str
    needed: dict[str, dict[str, State]]  # to load, for each library of torch_npu
    looked_up: dict[str, State]  # while they run
    operators: dict[str, Operator] = field(default_factory=dict)
    import_fault: str = ""  # why the operators could not be listed


# --- symbols ---


def find_binutils(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise EmulatorBuildError(
            f"the report reads libraries with {name}, which is not on PATH; install the GNU binutils (on Debian and "
            "Ubuntu, the package binutils)"
        )
    return found


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode != 0:
        raise EmulatorBuildError(f"{' '.join(command)} failed: {done.stderr.strip()}; is the file whole?")
    return done.stdout


def symbols(path: Path, *options: str) -> Iterable[tuple[str, str]]:
    """(kind, name with version) of each dynamic symbol, from nm."""
    for line in output_of(find_binutils("nm"), "-D", "--with-symbol-versions", *options, str(path)).splitlines():
        kind, name = line.split()[-2:]
        yield kind, name


def unversioned(name: str) -> str:
    return name.partition("@")[0]


def defined_by(libraries: Iterable[Path]) -> set[str]:
    return {unversioned(name) for path in libraries for _, name in symbols(path, "--defined-only")}


def wheel_libraries() -> list[Path]:
    """torch_npu's own shared libraries."""
    folder = DEVICE.package_folder("torch_npu")
    return sorted([*folder.glob("lib/*.so"), *folder.glob("_C*.so")])


def system_has(name: str) -> bool:
    return any(hasattr(library, name) for library in system_libraries())


@functools.cache
def system_libraries() -> list[ctypes.CDLL]:
    """The system libraries. Some builds of torch_npu name their functions without a version."""
    found = []
    for name in ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"):
        with contextlib.suppress(OSError):
            found.append(ctypes.CDLL(name))
    return found


def needed_symbols() -> dict[str, set[str]]:
    """Symbols that each library of torch_npu needs from CANN to load: no other library of the machine has them."""
    libraries = wheel_libraries()
    present = defined_by([*libraries, *DEVICE.package_folder("torch").glob("lib/*.so")])
    needed = {}
    for path in libraries:
        undefined = {name for kind, name in symbols(path, "--undefined-only") if kind == "U"}
        # Symbols of system libraries have a version (memcpy@GLIBC_2.14), or system_has finds them. CANN's have none.
        without_version = {
            name for name in undefined - present if "@" not in name and not name.startswith(("Py", "_Py"))
        }
        needed[path.name] = {name for name in without_version if not system_has(name)}
    return {library: names for library, names in needed.items() if names}


CANN_NAME = re.compile(rb"\0((?:acl[a-z]*|Hccl)[A-Z]\w*)(?=\0)")


def looked_up_names() -> set[str]:
    """Texts in torch_npu's libraries that look like names of CANN's functions."""
    return {name.decode() for path in wheel_libraries() for name in CANN_NAME.findall(path.read_bytes())}


# --- code of the functions of a built library ---

# Instructions of x86-64 and AArch64 in the output of objdump.
FUNCTION = re.compile(r"^[0-9a-f]+ <([^>]+)>:$")
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\s+(\S+)\s*(.*)$")
PADDING = re.compile(r"nop|xchg|data16|cs|endbr64|bti|hint")
CONDITIONAL = re.compile(r"j(?!mp)|b\.|cbn?z|tbn?z|loop")
TRANSFER = re.compile(r"call|jmp|bl?r?$")
# runtime/stubs.cpp, runtime/diagnostics.cpp
REFUSAL = re.compile(r"emulator_(?:refuse|abort)|_ZN8vllm_npu8emulator4fail")
CONSTANT = re.compile(r"(?:xor (%\w+),\1|mov \$0x[0-9a-f]+,%[re]ax|mov [wx]0, (?:#\S+|[wx]zr))(?: .*)?$")


def state_of(body: list[tuple[str, str]]) -> State:
    """State of a function, from its instructions (name, operands)."""
    instructions = [(name, operands) for name, operands in body if not PADDING.match(name)]
    if any(CONDITIONAL.match(name) for name, _ in instructions):
        return State.EMULATED  # it has a branch
    targets = [operands for name, operands in instructions if TRANSFER.match(name)]
    if targets:
        return State.REFUSED if all(REFUSAL.search(target) for target in targets) else State.EMULATED
    does_nothing = all(
        name.startswith("ret") or CONSTANT.match(f"{name} {operands}") for name, operands in instructions
    )
    return State.NO_EFFECT if does_nothing else State.EMULATED


def states_of_library(path: Path) -> dict[str, State]:
    """State of each exported function of a library. Exported objects count as emulated."""
    exported = {unversioned(name) for _, name in symbols(path, "--defined-only")}
    bodies: dict[str, list[tuple[str, str]]] = {}
    body: list[tuple[str, str]] = []
    for line in output_of(find_binutils("objdump"), "-d", "--no-show-raw-insn", str(path)).splitlines():
        if start := FUNCTION.match(line):
            body = bodies.setdefault(start[1], [])
        elif instruction := INSTRUCTION.match(line):
            body.append((instruction[1], instruction[2]))
    return {name: state_of(bodies[name]) if name in bodies else State.EMULATED for name in exported}


def states_of_folder(folder: Path) -> dict[str, State]:
    states: dict[str, State] = {}
    for path in sorted(folder.glob("*.so")):
        states.update(states_of_library(path))
    return states


# --- operators ---

LIST_OPERATORS = """
import vllm_npu.emulator
vllm_npu.emulator.enable()
import json, torch, torch_npu
schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("npu::"))
names = sorted({schema.name + ("." + schema.overload_name if schema.overload_name else "") for schema in schemas})
print("operators: " + json.dumps(names))
"""


def operator_names() -> list[str]:
    """The schemas that torch_npu registers. Another process imports it on the emulated device."""
    command = [sys.executable, "-c", LIST_OPERATORS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise EmulatorBuildError(f"importing torch_npu did not end in {error.timeout:.0f} s") from error
    for line in done.stdout.splitlines():
        if line.startswith("operators: "):
            return list(json.loads(line.removeprefix("operators: ")))
    last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    raise EmulatorBuildError(f"torch_npu cannot be imported on the emulated device: {last}")


def plain(name: str) -> str:
    """The name without case, underscores, version and 'npu', and with 'grad' for 'backward'.

    Names of one operation become equal.
    """
    name = name.lower().replace("_", "").removeprefix("npu").replace("backward", "grad")
    return re.sub(r"(?:v\d+)?(?:functional)?$", "", name)


def operations(names: Iterable[str]) -> dict[str, list[str]]:
    """Operations by their plain name. An operation is a pair of functions aclnnX and aclnnXGetWorkspaceSize."""
    found: dict[str, list[str]] = {}
    every = set(names)
    for name in sorted(every):
        if f"{name}GetWorkspaceSize" in every:
            found.setdefault(plain(re.sub(r"^acl(?:nn)?", "", name)), []).append(name)
    return found


def state_of_operation(name: str, states: Mapping[str, State]) -> State:
    """State of a pair of functions: that of the less capable one."""
    order = list(State)
    both = (states.get(each, State.ABSENT) for each in (name, f"{name}GetWorkspaceSize"))
    return max(both, key=order.index)


def infer_operator(name: str, by_plain_name: Mapping[str, list[str]], states: Mapping[str, State]) -> Operator:
    schema = name.removeprefix("npu::").partition(".")[0]
    functions = {each: state_of_operation(each, states) for each in by_plain_name.get(plain(schema), ())}
    emulated = sum(state == State.EMULATED for state in functions.values())
    if not functions:
        return Operator(Inferred.UNKNOWN, functions)
    if emulated == len(functions):
        return Operator(Inferred.PROVIDED, functions)
    return Operator(Inferred.IN_PART if emulated else Inferred.ABSENT, functions)


# --- the report ---


def make_report() -> Report:
    """Compare the installed torch_npu with the emulated libraries, and build these first if they are missing.

    Raises EmulatorBuildError if torch_npu or a tool is missing.
    """
    folder = build()
    states = states_of_folder(folder)
    needed = needed_symbols()
    looked_up = looked_up_names().difference(*needed.values())
    report = Report(
        torch_npu=DEVICE.package_version("torch_npu"),
        torch=DEVICE.package_version("torch"),
        libraries=str(folder),
        needed={
            library: {name: states.get(name, State.ABSENT) for name in sorted(names)}
            for library, names in needed.items()
        },
        looked_up={name: states.get(name, State.ABSENT) for name in sorted(looked_up)},
    )
    by_plain_name = operations(looked_up)
    try:
        report.operators = {name: infer_operator(name, by_plain_name, states) for name in operator_names()}
    except EmulatorBuildError as error:
        report.import_fault = str(error)
    return report


FAMILIES, OTHERS = ("aclrt", "Hccl", "aclnn"), "other acl"  # prefixes of functions


def family(name: str) -> str:
    return next((prefix for prefix in FAMILIES if name.startswith(prefix)), OTHERS)


def shortened(names: list[str]) -> str:
    """The first names, up to SHOWN_CHARACTERS, and the number of the other ones."""
    shown = [name for index, name in enumerate(names) if len(", ".join(names[: index + 1])) <= SHOWN_CHARACTERS]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more (--json lists them)" if rest else "")


def table(heading: str, columns: Iterable[str], rows: Mapping[str, Collection[str]]) -> Iterable[str]:
    """A table with one line for each row: the number of names, and the number in each state."""
    titles = ("all", *columns)
    width = max(len(heading), *map(len, rows))
    yield f"{heading:<{width}}" + "".join(f"  {title:>9}" for title in titles)
    for label, states in rows.items():
        numbers = {"all": len(states), **Counter(states)}
        yield f"{label:<{width}}" + "".join(f"  {numbers.get(title, 0):>{max(9, len(title))}}" for title in titles)


def as_text(report: Report) -> str:
    """The report as text."""
    rows = {f"needed by {library}": list(needed.values()) for library, needed in report.needed.items()}
    for each in (*FAMILIES, OTHERS):
        rows[f"looked up while it runs: {each}*"] = [
            state for name, state in report.looked_up.items() if family(name) == each
        ]
    lines = [f"torch_npu {report.torch_npu} with torch {report.torch}, on {report.libraries}", ""]
    lines += table("functions of CANN", State, rows)
    every = dict(report.looked_up)
    for needed in report.needed.values():
        every.update(needed)
    lines.append("")
    for state, meaning in (
        (State.REFUSED, "refused, each fails by its name"),
        (State.NO_EFFECT, "no effect, each returns a constant"),
    ):
        lines.append(f"{meaning}: {shortened(sorted(name for name, its in every.items() if its == state)) or 'none'}")
    for library, needed in report.needed.items():
        if lacking := [name for name, state in needed.items() if state == State.ABSENT]:
            lines.append(f"absent although {library} needs it, which therefore fails: {shortened(lacking)}")
    lines.append("")
    if report.import_fault:
        lines.append(f"operators: {report.import_fault}")
        return "\n".join(lines)
    states = [operator.state for operator in report.operators.values()]
    lines += table("operators", Inferred, {"npu::*, inferred from names alone": states})
    for inferred in (Inferred.PROVIDED, Inferred.IN_PART):
        names = [name.removeprefix("npu::") for name, its in report.operators.items() if its.state == inferred]
        lines.append(f"{inferred}: {', '.join(names) or 'none'}")
    lines += [
        "",
        "Names that are looked up are texts in the wheel, so a few may be no functions. An emulated function may still refuse",
        "arguments. An operator that is not known from its name may consist of others, or fail when it runs. Operators of",
        "aten do not appear: they run by the CPU's kernels, without aclnn.",
    ]
    return "\n".join(lines)


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2) + "\n"
