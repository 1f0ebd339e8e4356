"""The table of commands. The module of a command is imported only when the command runs, so that --help is fast."""

from dataclasses import dataclass
from importlib import import_module

import typer

from vllm_npu import __version__


@dataclass(frozen=True, slots=True)
class CommandRow:
    """One command: its function, its line in `vllm-npu --help`, and how it reads its arguments."""

    function: str  # "module:name"
    summary: str
    reads_raw_arguments: bool = False  # True: the function takes a list of strings. False: typer reads its signature.


COMMANDS = {
    "demo": CommandRow(
        "vllm_npu.cli.demo:demo", "Run every strategy in real vLLM on a tiny model, against vanilla vLLM."
    ),
    "verify": CommandRow("vllm_npu.cli.verify:verify", "Run every strategy on real ranks against a dense reference."),
    "bench": CommandRow("vllm_npu.cli.bench:bench", "Measure every strategy and its peers in one run."),
    "bench eplb": CommandRow(
        "vllm_npu.cli.bench_eplb:bench_eplb", "Measure the move of experts between ranks by every communicator."
    ),
    "families": CommandRow(
        "vllm_npu.cli.families:families", "Run every MoE family of vLLM on expert-parallel CPUs, against vanilla vLLM."
    ),
    "plan": CommandRow(
        "vllm_npu.cli.plan:plan", "Show legal strategies, bytes and HCCL buffer of a layer on Ascend chips."
    ),
    "simulate": CommandRow(
        "vllm_npu.cli.simulate:simulate", "Estimate times of the exchange on clusters of 2 to 768 ranks."
    ),
    "top": CommandRow("vllm_npu.cli.top:top", "Show the ranks of a running engine: who works, waits and is late."),
    "doctor": CommandRow(
        "vllm_npu.cli.doctor:doctor",
        "Find what is wrong with this environment, and say what to do.",
        reads_raw_arguments=True,
    ),
    "serve": CommandRow(
        "vllm_npu.cli.serve:serve",
        "Start vLLM's OpenAI-compatible server with this plugin on.",
        reads_raw_arguments=True,
    ),
}


def build_app() -> typer.Typer:
    """The command line. Each command passes its arguments to its function."""
    app = typer.Typer(
        help="Expert-parallel communication of vLLM for Ascend NPUs, GPUs and CPUs.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            print(f"vllm_npu {__version__}")
            raise typer.Exit

    for name, row in COMMANDS.items():
        app.command(
            name,
            help=row.summary,
            add_help_option=False,  # the command's own program prints its help
            context_settings={
                "allow_extra_args": True,
                "ignore_unknown_options": True,
                "allow_interspersed_args": False,
            },
        )(_forward)
    return app


def _forward(context: typer.Context) -> None:
    """Import the command and call it with the arguments that the user typed."""
    name, arguments = str(context.info_name), context.args
    if arguments and f"{name} {arguments[0]}" in COMMANDS:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    row = COMMANDS[name]
    module, _, attribute = row.function.partition(":")
    function = getattr(import_module(module), attribute)
    if row.reads_raw_arguments:
        function(arguments)
        return
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, help=_unwrapped(function.__doc__ or row.summary))(function)
    app(args=arguments, prog_name=f"vllm-npu {name}")


def _unwrapped(docstring: str) -> str:
    """The docstring with one line for each paragraph, so that typer wraps it at the terminal's width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))
