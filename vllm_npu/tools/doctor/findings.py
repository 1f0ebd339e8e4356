"""What a check of doctor reports. Standard library only."""

import re
from dataclasses import dataclass
from typing import Self

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check: the state of one thing, and what to do about it."""

    check: str  # what was checked
    status: str  # OK, WARNING or PROBLEM
    what: str
    remedy: str = ""  # empty only if the status is OK

    @classmethod
    def refusal(cls, check: str, message: str) -> Self:
        """A problem, from the message of an error of this package: the remedy is the part after the last "; " or ". "."""
        parts = re.fullmatch(r"(.+)(?:; |\. )(.+)", message, re.DOTALL)
        what, remedy = parts.groups() if parts else (message, "")
        return cls(check, PROBLEM, what, remedy)
