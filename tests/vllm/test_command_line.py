"""What `vllm-npu` says without starting an engine."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_npu.cli.tiny_models import QWEN3_MOE, write_tiny_model
from vllm_npu.strategies import STRATEGIES


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "vllm_npu.cli", *arguments], capture_output=True, text=True)


def test_importing_the_command_line_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_npu.cli; print(sorted({'torch', 'vllm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_help_names_every_command() -> None:
    finished = run("--help")
    assert finished.returncode == 0
    assert all(command in finished.stdout for command in ("demo", "verify", "serve"))


def test_an_unknown_strategy_gets_the_list_of_those_that_exist() -> None:
    finished = run("serve", "some-model", "--moe-comm", "mc3")
    assert finished.returncode == 1
    assert "unknown --moe-comm 'mc3'" in finished.stderr
    assert all(name in finished.stderr for name in ("auto", *STRATEGIES))


@pytest.mark.parametrize("arguments", [["--port", "1"], ["--moe-comm", "mc2"]])
def test_serving_nothing_says_where_the_model_goes(arguments: list[str]) -> None:
    finished = run("serve", *arguments)
    assert finished.returncode == 1
    assert "put it first" in finished.stderr


def test_options_and_help_of_vllm_are_reached(tmp_path: Path) -> None:
    """--help after a model is vLLM's; so is the exit status for an option that vLLM does not have."""
    shown = run("serve", "some-model", "--help")
    assert shown.returncode == 0
    assert "--tensor-parallel-size" in shown.stdout
    refused = run("serve", "some-model", "--no-such-option-of-vllm")
    assert refused.returncode == 2
    assert "--no-such-option-of-vllm" in refused.stderr


def test_ranks_without_a_server_are_vllms_serve_command(tmp_path: Path) -> None:
    """vLLM's own refusal of a host without ranks: its API server's module does not know the option."""
    model = write_tiny_model(QWEN3_MOE, tmp_path / "model")
    refused = run("serve", str(model), "--headless", "--data-parallel-size", "2", "--data-parallel-size-local", "0")
    assert refused.returncode != 0
    assert "data_parallel_size_local must be > 0 in headless mode" in refused.stderr + refused.stdout
