"""A shell script that starts `vllm serve`, as vllm-ascend's tutorials print it. Nothing of it is run.

Standard library only. Variables of the shell stay as they are written.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from vllm_npu.errors import InvalidInputError

ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
API_SERVER = "vllm.entrypoints.openai.api_server"
OF_THE_SHELL = re.compile(
    r"\d*[<>|&;]"
)  # begins a word that is no argument: a redirection, a pipe, the end of a command
FENCED_BLOCK = re.compile(r"^([ \t]*)```[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class ServeScript:
    """One `vllm serve` command and the variables set before it."""

    variables: dict[str, str]
    arguments: tuple[
        str, ...
    ]  # the words after `vllm serve`; option names have hyphens where vLLM also takes underscores


def read_script(script: str) -> ServeScript:
    """Read a script. Raises InvalidInputError if no shell can read it, or if it does not have exactly one `vllm serve`."""
    variables: dict[str, str] = {}
    commands = []
    for words in _commands(script):
        rest = words[1:] if words[0] == "export" else words
        assigned = [found for word in rest if (found := ASSIGNMENT.fullmatch(word))]
        leading = next((number for number, word in enumerate(rest) if not ASSIGNMENT.fullmatch(word)), len(rest))
        variables |= {found[1]: found[2] for found in (assigned if words[0] == "export" else assigned[:leading])}
        if (arguments := _serve_arguments(rest[leading:])) is not None:
            commands.append(arguments)
    if len(commands) != 1:
        raise InvalidInputError(
            f"the recipe has {len(commands)} commands that start vLLM (vllm serve, {API_SERVER}); give a file with one, as a "
            "node runs it"
        )
    return ServeScript(variables, tuple(map(_with_hyphens, commands[0])))


def scripts_below(path: Path) -> Iterator[tuple[str, str]]:
    """The name and the text of each script that starts vLLM: a file, or the files *.sh and *.md of a folder and below.

    Of a Markdown file, each fenced block is a script. Raises OSError and UnicodeError for files that cannot be read.
    """
    files = sorted(file for kind in ("*.sh", "*.md") for file in path.rglob(kind)) if path.is_dir() else [path]
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".md":
            yield file.name, text
            continue
        blocks = (block[2] for block in FENCED_BLOCK.finditer(text))
        started = (block for block in blocks if "vllm serve" in block or API_SERVER in block)
        yield from ((f"{file.stem} {number}", block) for number, block in enumerate(started, 1))


def _commands(script: str) -> Iterator[list[str]]:
    """The words of each command. Comments are left out. A command goes on after a backslash, and inside quotes."""
    lines = re.sub(r"\\\s*\n", " ", script).splitlines()
    command = ""
    for line in lines:
        command += line
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quotation is open
            command += "\n"
            continue
        command = ""
        if words:
            yield words
    if command:
        start = command.strip().splitlines()[0][:80]
        raise InvalidInputError(f"the recipe has a quotation that does not end, in the command: {start}")


def _serve_arguments(words: list[str]) -> list[str] | None:
    """The arguments of a command that starts vLLM. None: it starts something else."""
    words = list(takewhile(lambda word: not OF_THE_SHELL.match(word), words))
    if API_SERVER in words:
        return words[words.index(API_SERVER) + 1 :]
    for number in range(len(words) - 1):
        if words[number].rpartition("/")[2] == "vllm" and words[number + 1] == "serve":
            return words[number + 2 :]
    return None


def _with_hyphens(word: str) -> str:
    return re.sub(r"^--[^=]+", lambda option: option[0].replace("_", "-"), word)
