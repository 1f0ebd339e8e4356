"""Python runs this file if its folder is on PYTHONPATH. It then runs the sitecustomize that it hides, if there is one."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from vllm_npu.emulator.startup import prepare_interpreter


def run_hidden_sitecustomize() -> None:
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


prepare_interpreter()
run_hidden_sitecustomize()
