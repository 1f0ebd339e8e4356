"""The families of MoE models in vLLM's registry, found by looking.

    python -m vllm_npu.tools.families.registry

Prints a list of families as JSON. This is a program of its own, because vLLM's registry brings the whole of vLLM.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_npu.core.model_facts import ModelFacts
from vllm_npu.errors import VllmNpuError


@dataclass(frozen=True, slots=True)
class Family:
    """One MoE architecture."""

    architecture: str  # vLLM's name
    model_type: str | None  # transformers' name of its configuration; None: transformers has none

    @property
    def name(self) -> str:
        """The name in tables and of `--only`."""
        return self.model_type or self.architecture


def find_families() -> list[Family]:
    """moe_families() of a process of its own. Raises VllmNpuError with the end of its log if it fails."""
    process = subprocess.run(
        [sys.executable, "-m", "vllm_npu.tools.families.registry"],
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise VllmNpuError(f"vLLM's registry cannot be read:\n{process.stderr[-2000:]}")
    return [Family(**each) for each in json.loads(process.stdout.splitlines()[-1])]


def moe_families() -> list[Family]:
    """The MoE architectures that generate text in the installed vLLM, those with a configuration in transformers first.

    A configuration of transformers is one of an MoE model if it counts experts. Without a configuration, the source file of
    the model says so: it names vLLM's layer FusedMoE.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    by_lower_case = {architecture.lower(): architecture for architecture in _TEXT_GENERATION_MODELS}
    found: dict[str, Family] = {}
    dense = set()
    classes: dict[str, Any] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # a name, or several
    for model_type, names in classes.items():
        for name in [names] if isinstance(names, str) else names:
            architecture = by_lower_case.get(name.lower())
            # The type of a language model goes before that of a whole model with other parts.
            if architecture is None or (architecture in found and not model_type.endswith("_text")):
                continue
            if _counts_experts(model_type):
                found[architecture] = Family(architecture, model_type)
            else:
                dense.add(architecture)
    for architecture, (module, *_) in _TEXT_GENERATION_MODELS.items():
        if architecture not in found and architecture not in dense and "FusedMoE" in _source(module):
            found[architecture] = Family(architecture, None)
    return sorted(found.values(), key=lambda family: (family.model_type is None, family.name))


def _counts_experts(model_type: str) -> bool:
    """Whether the default configuration of this type has more than one expert in a layer."""
    from transformers import CONFIG_MAPPING

    try:
        facts = ModelFacts.of_config(_default(CONFIG_MAPPING[model_type]))
    except (KeyError, VllmNpuError):
        return False
    return (facts.num_experts or 0) > 1


def _default(config_class: Any) -> dict[str, Any]:
    content: dict[str, Any] = config_class().to_dict()
    return content


def _source(module: str) -> str:
    """The source of a model: a file of vllm.model_executor.models, or the package that the registry names in full."""
    name = module if "." in module else f"vllm.model_executor.models.{module}"
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return ""
    path = Path(spec.origin)
    files = path.parent.rglob("*.py") if path.name == "__init__.py" else [path]
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))


if __name__ == "__main__":
    print(json.dumps([asdict(family) for family in moe_families()]))
