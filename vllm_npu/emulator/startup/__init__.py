"""What an interpreter does at its start in an environment that has torch_npu but perhaps no CANN.

With VLLM_NPU_EMULATOR=1 it enables the emulated device. Otherwise it keeps a plain `import torch` working: torch would
import torch_npu, which needs CANN.

Two ways to have it done: the launcher puts this folder on PYTHONPATH, for sitecustomize.py; or a .pth file in the
environment's site-packages holds the line that `python -m vllm_npu.emulator hook` prints.
"""

import importlib.util
import os
import sys

PTH_LINE = "import vllm_npu.emulator.startup; vllm_npu.emulator.startup.prepare_interpreter()"


def prepare_interpreter() -> None:
    """Ends the process if the emulated device was asked for and cannot be had: errors of start-up code are ignored."""
    from vllm_npu import envs
    from vllm_npu.emulator import cann, loader
    from vllm_npu.errors import VllmNpuError

    if envs.EMULATOR.read() == "1":
        try:
            loader.enable()
        except VllmNpuError as error:
            sys.stderr.write(f"vllm_npu emulator: {error}\n")
            sys.stderr.flush()
            os._exit(1)
    elif importlib.util.find_spec("torch_npu") is not None and cann.find() is None:
        os.environ.setdefault(loader.AUTOLOAD_VARIABLE, "0")
