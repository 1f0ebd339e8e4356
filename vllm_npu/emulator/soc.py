"""The chips that the emulated device can pass for."""

from dataclasses import dataclass

from vllm_npu.errors import UnsupportedConfigError


@dataclass(frozen=True, slots=True)
class SocFamily:
    """Chips that software treats alike."""

    name: str  # as the field calls it
    default_soc: str
    prefixes: tuple[str, ...]  # of the names; csrc_npu/emulator/runtime/soc.cpp has the same, and a test compares


FAMILIES = (
    SocFamily("A2", "Ascend910B1", ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")),
    SocFamily("A3", "Ascend910_9391", ("Ascend910_93",)),
    SocFamily("310P", "Ascend310P3", ("Ascend310P",)),
    SocFamily("A5", "Ascend950PR_9599", ("Ascend950",)),
)


def family_of(name: str) -> SocFamily:
    """The family of a chip, or that of the name. Raises UnsupportedConfigError for one that is not emulated."""
    for family in FAMILIES:
        if name.upper() == family.name or name.startswith(family.prefixes):
            return family
    known = ", ".join(f"{family.name} ({'*, '.join(family.prefixes)}*)" for family in FAMILIES)
    raise UnsupportedConfigError(f"soc {name!r} is not emulated; use one of {known}")


def resolve(name: str) -> str:
    """The chip's name for a chip's or a family's. Raises UnsupportedConfigError for one that is not emulated."""
    family = family_of(name)
    return family.default_soc if name.upper() == family.name else name
