"""What doctor's checks say, and how they look without importing. Standard library only."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Self

OK, WARNING, PROBLEM = "ok", "warning", "problem"

IMPORT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    status: str  # OK, WARNING or PROBLEM
    what: str
    remedy: str = ""

    @classmethod
    def refusal(cls, check: str, message: str) -> Self:
        """A problem as one of this package's errors says it: what is wrong, and after the last "; " or ". " what to do."""
        parts = re.fullmatch(r"(.+)(?:; |\. )(.+)", message, re.DOTALL)
        what, remedy = parts.groups() if parts else (message, "")
        return cls(check, PROBLEM, what, remedy)


@dataclass(frozen=True, slots=True)
class Probe:
    """How another process ended."""

    output: str
    fault: str  # empty if it succeeded


def probe(command: list[str], seconds: float, **environment: str) -> Probe:
    """Run a command, its variables on top of this process's."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe("", f"did not end in {seconds:.0f} s")
    except OSError as error:
        return Probe("", str(error))
    if done.returncode == 0:
        return Probe(done.stdout.strip(), "")
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return Probe(done.stdout.strip(), last[0] if last else f"exit code {done.returncode}")


def probe_python(code: str, *arguments: str, **environment: str) -> Probe:
    """Run Python code in another interpreter of this environment."""
    return probe([sys.executable, "-c", code, *arguments], IMPORT_SECONDS, **environment)
