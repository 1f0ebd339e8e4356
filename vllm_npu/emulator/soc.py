"""The chips that can be emulated."""

from dataclasses import dataclass

from vllm_npu.errors import UnsupportedConfigError


@dataclass(frozen=True, slots=True)
class SocFamily:
    """A family of chips. Software treats all chips of a family alike."""

    name: str  # for example A2
    default_soc: str
    prefixes: tuple[str, ...]  # of the chips' names; a test compares them with csrc_npu/emulator/runtime/soc.cpp


FAMILIES = (
    SocFamily("A2", "Ascend910B1", ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")),
    SocFamily("A3", "Ascend910_9391", ("Ascend910_93",)),
    SocFamily("310P", "Ascend310P3", ("Ascend310P",)),
    SocFamily("A5", "Ascend950PR_9599", ("Ascend950",)),
)


def family_of(name: str) -> SocFamily:
    """The family with this name, or the family of the chip. Raises UnsupportedConfigError if it is not emulated."""
    for family in FAMILIES:
        if name.upper() == family.name or name.startswith(family.prefixes):
            return family
    known = ", ".join(f"{family.name} ({'*, '.join(family.prefixes)}*)" for family in FAMILIES)
    raise UnsupportedConfigError(f"soc {name!r} is not emulated; use one of {known}")


def resolve(name: str) -> str:
    """Name of the chip: `name` itself, or the default chip of a family. Raises UnsupportedConfigError if it is not emulated."""
    family = family_of(name)
    return family.default_soc if name.upper() == family.name else name
