"""What is installed in this Python environment. Nothing is imported. Standard library only."""

import importlib.metadata
import importlib.util
import re

PARTS = 5  # numbers of a version that are compared: 2.10.0.post4 has four


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(package: str) -> bool:
    """Whether Python finds the package."""
    return importlib.util.find_spec(package) is not None


def release(version: str, parts: int) -> tuple[int, ...]:
    """The first `parts` numbers of a version: '2.13.0+cpu', 2 -> (2, 13)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:parts])


def requirements() -> list[str]:
    """The requirements of the installed vllm_npu, with those of its extras. Empty if it is not installed."""
    try:
        return importlib.metadata.requires("vllm_npu") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def ranges(distribution: str) -> dict[str, list[str]]:
    """Ranges of versions that the extras of vllm_npu name for a distribution, each with the names of these extras."""
    found: dict[str, list[str]] = {}
    for requirement in requirements():
        match = re.match(r"""([\w.-]+)([<>=!][^;]*);\s*extra\s*==\s*["'](\w+)["']""", requirement)
        if match and re.sub(r"[-_.]+", "-", match[1]).lower() == distribution:
            found.setdefault(match[2].strip(), []).append(match[3])
    return found


def admits(bounds: str, version: str) -> bool:
    """Whether a version lies in a range such as '>=2.11,!=2.12.*,<2.14'. The operators are those of pyproject.toml."""
    for bound in bounds.split(","):
        operator, number = re.findall(r"^\s*(>=|<|!=)\s*(\S+)", bound)[0]
        limit = release(number, PARTS)
        if operator == "!=":
            within = release(version, len(limit)) != limit
        else:
            within = (release(version, PARTS) >= limit) == (operator == ">=")
        if not within:
            return False
    return True
