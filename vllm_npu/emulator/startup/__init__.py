"""Code that Python runs at its start, in an environment with torch_npu and possibly without CANN.

With VLLM_NPU_EMULATOR=1 it enables the emulated device. Otherwise it keeps `import torch` working without CANN: torch would
import torch_npu, which needs CANN.

There are two ways to install it. The launcher adds this folder to PYTHONPATH, where Python finds sitecustomize.py. Or a .pth
file in the environment's site-packages contains the line that `python -m vllm_npu.emulator hook` prints.
"""

import importlib.util
import os
import sys

PTH_LINE = "import vllm_npu.emulator.startup; vllm_npu.emulator.startup.prepare_interpreter()"


def prepare_interpreter() -> None:
    """Enable the emulated device if it is wanted.

    If it fails, end the process, because Python ignores errors of start-up code.
    """
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
