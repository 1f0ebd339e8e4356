"""The command line `vllm-npu COMMAND`. app.COMMANDS lists the commands.

This file imports the standard library only, because doctor starts where no other package can be imported.
"""

import gc
import sys

from vllm_npu.errors import VllmNpuError


def main() -> None:
    """Entry point of `vllm-npu`. Exit status: 0, 1 for a failure, 2 for wrong usage, or the status of the command."""
    try:
        if sys.argv[1:2] == ["doctor"]:
            from vllm_npu.cli.doctor import doctor

            doctor(sys.argv[2:])
        else:
            from vllm_npu.cli.app import build_app

            build_app()(prog_name="vllm-npu")
    except VllmNpuError as error:
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}error: {error}{plain}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # saves 0.5 s: at its end, Python does not search all objects of torch for cycles
