"""The command line: `vllm-npu COMMAND`. See app.COMMANDS.

Standard library only at first: doctor has to start where no other package can be imported.
"""

import gc
import sys

from vllm_npu.errors import VllmNpuError


def main() -> None:
    """Entry point of `vllm-npu`. Exit status: 0, 1 for a failure, 2 for wrong usage, or what the command says."""
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
        gc.freeze()  # or Python, before it ends, looks through all that torch has made for cycles: half a second
