"""Commands that doctor's checks run in processes of their own. Standard library only."""

import os
import subprocess
import sys
from dataclasses import dataclass

IMPORT_SECONDS = 120.0  # for a process that imports torch


@dataclass(frozen=True, slots=True)
class Probe:
    """The end of one process."""

    output: str  # its standard output, without white space at both ends
    fault: str  # why it failed; empty if it succeeded

    @property
    def last_line(self) -> str:
        """The last line of the output, or an empty string."""
        return self.output.rpartition("\n")[2]


def probe(command: list[str], seconds: float, **environment: str) -> Probe:
    """Run a command with these variables added to os.environ. After `seconds` it is killed, which is a fault."""
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
    """Run Python code in a new process of this Python environment."""
    return probe([sys.executable, "-c", code, *arguments], IMPORT_SECONDS, **environment)
