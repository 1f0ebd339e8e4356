#!/usr/bin/env python3
"""Writes C++ stubs for the functions of CANN that torch_npu's libraries need and the emulator does not have.

A stub prints its name and returns an error, never success. If its return type allows no error, the stub ends the process.
Return types come from the headers that torch_npu ships.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

CANN_SYMBOL = re.compile(r"acl|Hccl|hccl|Msprof|rt[A-Z]|Adx|_ZN?K?2ge")
ERROR_CODES = {"aclError": 200001, "HcclResult": 5}  # ACL_ERROR_API_NOT_SUPPORT, HCCL_E_NOT_SUPPORT
OTHER_ERROR = -1
DECLARATION = re.compile(r"(?:^|[;{}>)]|\n)\s*((?:[\w:]+[\s*]+)+?)(\w+)\s*\(", re.MULTILINE)
NOT_OF_A_TYPE = {"extern", "static", "inline", "const", "ACL_FUNC_VISIBILITY", "MSVP_PROF_API", "RTS_API"}


def symbols(nm: str, path: str, *options: str) -> list[tuple[str, str]]:
    """Return (kind, name) of each dynamic or object symbol, without versions."""
    run = subprocess.run([nm, *options, path], capture_output=True, text=True, check=True)
    found = []
    for line in run.stdout.splitlines():
        kind, name = line.split()[-2:]
        found.append((kind, name.split("@")[0]))
    return found


def return_types(headers: Path) -> dict[str, str]:
    types: dict[str, str] = {}
    for header in sorted(headers.rglob("*.h")):
        text = header.read_text(errors="replace")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*|^\s*#[^\n]*", "", text, flags=re.MULTILINE)
        for prefix, name in DECLARATION.findall(text):
            words = [word for word in re.findall(r"\w+|\*", prefix) if word not in NOT_OF_A_TYPE]
            if words and words[0] not in {"return", "typedef", "else", "define"}:
                types.setdefault(name, " ".join(words))
    return types


def stub(name: str, return_type: str | None) -> str:
    if return_type is not None and "*" in return_type:
        kind, body = "void*", f'emulator_refuse("{name}", {OTHER_ERROR}); return nullptr;'
    elif return_type is not None and return_type != "int32_t" and return_type not in ERROR_CODES:
        kind, body = "void", f'emulator_abort("{name}");'
    else:
        code = ERROR_CODES.get(return_type or "", OTHER_ERROR)
        kind, body = "int", f'return emulator_refuse("{name}", {code});'
    return f'__attribute__((visibility("default"))) {kind} {name}() {{ {body} }}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--headers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--needed-by", nargs="+", required=True)
    parser.add_argument("--provided-by", nargs="+", required=True)
    options = parser.parse_args()

    needed = {
        name
        for path in options.needed_by
        for kind, name in symbols(options.nm, path, "-D", "--undefined-only")
        if kind == "U" and CANN_SYMBOL.match(name)
    }
    defined = {name for path in options.needed_by for _, name in symbols(options.nm, path, "-D", "--defined-only")}
    provided = {name for path in options.provided_by for _, name in symbols(options.nm, path, "--defined-only")}
    missing = sorted(needed - defined - provided)
    types = return_types(options.headers)
    lines = [
        "// Made by generate_stubs.py.",
        'extern "C" {',
        "int emulator_refuse(const char* function, int code);",
        "void emulator_abort(const char* function);",
        *(stub(name, types.get(name)) for name in missing),
        "}",
    ]
    options.output.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{len(needed)} symbols needed from CANN, {len(missing)} of them stubs that fail by name\n")


if __name__ == "__main__":
    main()
