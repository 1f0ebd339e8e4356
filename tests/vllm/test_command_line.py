"""`vllm-npu` where it starts no engine."""

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.command_line import vllm_npu
from vllm_npu.cli.app import COMMANDS
from vllm_npu.cli.serve import http_port
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, write_tiny_model


def test_help_names_every_command() -> None:
    finished = vllm_npu("--help")
    assert finished.returncode == 0
    assert all(command.split()[0] in finished.stdout for command in COMMANDS)


def test_an_unknown_strategy_gets_the_list_of_those_that_exist() -> None:
    finished = vllm_npu("serve", "some-model", "--moe-comm", "mc3")
    assert finished.returncode == 1
    assert "unknown --moe-comm 'mc3'" in finished.stderr
    assert all(name in finished.stderr for name in ("auto", *STRATEGIES))


@pytest.mark.parametrize(
    "command",
    [
        [
            "plan",
            *("--soc", "A3", "--ep", "2", "--experts", "128", "--topk", "8", "--hidden", "2048", "--tokens", "512"),
        ],
        ["doctor"],
        ["serve", "some-model"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_of_results_needs_its_folder_before_the_work_begins(command: list[str], tmp_path: Path) -> None:
    finished = vllm_npu(*command, "--json", str(tmp_path / "missing" / "results.json"), COLUMNS="400")
    assert finished.returncode == 2
    assert f"there is no folder {tmp_path / 'missing'}" in finished.stderr
    assert not finished.stdout


@pytest.mark.parametrize("arguments", [["--port", "1"], ["--moe-comm", "mc2"]])
def test_serving_nothing_says_where_the_model_goes(arguments: list[str]) -> None:
    finished = vllm_npu("serve", *arguments)
    assert finished.returncode == 1
    assert "put it first" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "port"),
    [
        ([], 8000),
        (["--port", "1", "--port=2"], 2),
        (["--port", "word"], None),
        (["--config", "server.yaml", "--port", "1"], None),
        (["--uds=socket"], None),
    ],
)
def test_a_stop_looks_at_the_port_that_vllm_will_listen_on(arguments: list[str], port: int | None) -> None:
    assert http_port(["some-model", *arguments]) == port


def test_options_and_help_of_vllm_are_reached() -> None:
    """vLLM answers --help=all after a model, and its own parser refuses an option that it does not have. Both run at once."""
    with ThreadPoolExecutor(2) as pool:
        shown, refused = pool.map(
            vllm_npu, ["serve"] * 2, ["some-model"] * 2, ["--help=all", "--no-such-option-of-vllm"]
        )
    assert shown.returncode == 0
    assert "--tensor-parallel-size" in shown.stdout
    assert refused.returncode == 2
    assert "--no-such-option-of-vllm" in refused.stderr


def test_every_option_of_vllms_serve_command_is_taken() -> None:
    """The options in the help that our command shows are those of the parser that vLLM's own command builds."""
    (command,) = cmd_init()
    parser = command.subparser_init(argparse.ArgumentParser().add_subparsers(parser_class=FlexibleArgumentParser))
    expected = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    shown = vllm_npu("serve", "some-model", "--help=all", COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    assert {"--api-server-count", "--data-parallel-multi-port-external-lb", "--headless"} <= expected
    assert expected - set(re.findall(r"--[\w.-]+", shown.stdout)) == set()
    assert not expected & {"--moe-comm", "--json"}, "vllm-npu takes these for itself"


def test_ranks_without_a_server_are_vllms_serve_command(tmp_path: Path) -> None:
    """vLLM's serve command refuses a host without ranks."""
    model = write_tiny_model(QWEN3_MOE, tmp_path / "model")
    refused = vllm_npu(
        "serve", str(model), "--headless", "--data-parallel-size", "2", "--data-parallel-size-local", "0"
    )
    assert refused.returncode != 0
    assert "data_parallel_size_local must be > 0 in headless mode" in refused.stderr + refused.stdout
