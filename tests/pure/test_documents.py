"""What the documents name exists: commands and their options, files, variables; tables are those of their sources."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from vllm_npu import envs
from vllm_npu.cli.app import COMMANDS
from vllm_npu.emulator.__main__ import parse as parse_emulator
from vllm_npu.plugin.options import KEYS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("csrc_npu/*.md"), *ROOT.glob("docs/**/*.md"))
}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
each_document = pytest.mark.parametrize("name", DOCUMENTS)


def command_lines(text: str) -> Iterator[list[str]]:
    """Words after `vllm-npu`, `python -m`, or a script's name, in code; without comments, brackets and what follows a pipe."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in [line for block in fenced for line in block.replace("\\\n", " ").splitlines()] + spans:
        line = re.sub(r"\s#.*|\.\.\.|[|>].*", "", " ".join(line.split()))
        found = re.search(r"(?:^|\s)(vllm-npu|\S+ -m|scripts/\w+\.(?:py|sh))( .*|$)", line)
        if found:
            yield [*found[1].split()[-1:], *re.sub(r"[\[\]]", "", found[2]).split()]


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Of a command of `vllm-npu`."""
    row = COMMANDS[command]
    module, _, name = row.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not row.reads_raw_arguments:
        app = typer.Typer()
        app.command()(function)
        return {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    with pytest.raises(SystemExit):
        function(["--help"])
    return set(OPTION.findall(capsys.readouterr().out))


def options_in(path: str) -> set[str]:
    """Those that a program's text names."""
    return set(OPTION.findall((ROOT / path).read_text(encoding="utf-8")))


@each_document
def test_commands_are_there_and_have_these_options(name, capsys):
    """But for the options of `serve`, which are vLLM's, and of programs that are not this project's."""
    for program, *words in command_lines(DOCUMENTS[name]):
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        if program == "-m" and words[0] in ("vllm_npu", "vllm_npu.cli"):
            program, *words = "vllm-npu", *words[1:]
        if program == "vllm-npu" and words and words[0] != "serve" and not words[0].startswith("-"):
            command = " ".join(words[:2])
            assert used <= options_of(command if command in COMMANDS else words[0], capsys), words
        elif program == "-m" and words[0] == "vllm_npu.emulator":
            parse_emulator(words[1:])
        elif program == "-m" and words[0].startswith(("vllm_npu", "tests.")):
            assert importlib.util.find_spec(words[0]) is not None, words
        elif program == "scripts/demo.sh":
            assert used <= options_of("demo", capsys), words
        elif program.startswith("scripts/"):
            assert used <= options_in(program), words


@each_document
def test_files_that_are_named_are_there(name):
    named = re.findall(r"(?<![\w/.~])(?:scripts|tests|docs|vllm_npu|csrc_npu|\.github)/[\w./*-]*[\w*]", DOCUMENTS[name])
    places = (ROOT, ROOT / "vllm_npu")
    missing = [path for path in named if not any(list(place.glob(path)) for place in places)]
    assert set(missing) <= {"vllm_npu/plugin/compat/v0_NN.py"}


@each_document
def test_variables_that_are_named_are_read(name):
    of_setup = set(re.findall(r"VLLM_NPU_[A-Z_]+[A-Z]", (ROOT / "setup.py").read_text(encoding="utf-8")))
    known = {variable.name for variable in envs.VARIABLES} | {"VLLM_NPU_ENV_HOME"} | of_setup
    assert set(re.findall(r"VLLM_NPU_[A-Z_]+[A-Z]", DOCUMENTS[name])) <= known


def test_the_tables_of_settings_are_complete():
    rows = {
        f"| `{each.name}` | {each.default or 'empty'} | {each.meaning} |"
        for each in envs.VARIABLES
        if each.name != "HCCL_BUFFSIZE"
    }
    emulator, settings = DOCUMENTS["docs/emulator.md"], DOCUMENTS["docs/settings.md"]
    assert rows <= set(f"{settings}\n{emulator}".splitlines())
    assert set(re.findall(r"^\| `(\w+)` \|", settings.partition("Environment")[0], re.MULTILINE)) == set(KEYS)


def exchange_times() -> dict[tuple[str, int], str]:
    """Median us of dispatch and combine between two GPUs by exchange and tokens, as documents print them."""
    rows = json.loads((ROOT / "docs/benchmarks/2026-11-29-exchange-2xH200.json").read_text(encoding="utf-8"))
    times = {(row["what"], row["tokens"]): row["us_median"] for row in rows if row.get("metric") == "both"}
    return {key: f"{us:.1f}" if us < 100 else f"{us:,.0f}" for key, us in times.items()}


def test_the_times_on_gpus_are_those_of_the_run():
    """The tables of docs/gpu.md and of the report are of the rows that scripts/exchange_on_gpus.py wrote."""
    times = exchange_times()
    names = ("symmetric", "symmetric, in its window", "FlashInfer, in its buffer", "AgRs")
    for tokens in (8, 128, 512, 1024, 4096):
        assert f"| {' | '.join([str(tokens), *(times[name, tokens] for name in names)])} |" in DOCUMENTS["docs/gpu.md"]
    report = (ROOT / "docs/benchmarks/2026-11-29-exchange-2xH200.md").read_text(encoding="utf-8")
    every = (1, 8, 32, 128, 512, 1024, 2048, 4096)
    fp8 = ("symmetric fp8, scales given", "symmetric fp8, scales given, in its window")
    peers = ("FlashInfer fp8, scales given, in its buffer", "FlashInfer fp8, scales given, with its copy")
    for name in (*names, "FlashInfer, with its copy", *fp8, *peers):
        assert f"| {' | '.join(times[name, tokens] for tokens in every)} |" in report
    for name, last in (
        ("symmetric, rows sorted by expert", times["symmetric, rows sorted by expert", 4096]),
        ("DeepEP low latency", "–"),
    ):
        assert f"| {' | '.join([*(times[name, tokens] for tokens in every[:6]), last])} |" in report


def test_the_times_of_casts_are_those_of_the_run():
    """The tables of the report are of the rows that scripts/symmetric_kernels.py wrote."""
    rows = json.loads((ROOT / "docs/benchmarks/2026-11-30-fp8-1xH200.json").read_text(encoding="utf-8"))["kernels"]
    report = (ROOT / "docs/benchmarks/2026-11-30-fp8-1xH200.md").read_text(encoding="utf-8")
    times = {(row["what"], row["tokens"]): f"{row['us_median']:#.3g}".rstrip(".") for row in rows}
    for name, what in {
        "rows given in fp8": "dispatch, rows given",
        "dispatch casts": "dispatch casts",
        "a kernel casts before": "cast, then dispatch",
    }.items():
        on_all = [times[f"{what}, all SMs", tokens] for tokens in (1, 8, 32, 128, 512, 1024, 4096)]
        on_some = [times[f"{what}, {sms} SMs", 4096] for sms in (8, 16, 24, 32, 48)]
        for found in (on_all, on_some):
            assert f"| {' | '.join([name, *found])} |" in report


def test_the_times_of_a_layer_are_those_of_the_run():
    """The tables of the report are of the rows that scripts/layer_on_gpus.py wrote: of several rows, the fastest."""
    rows = json.loads((ROOT / "docs/benchmarks/2026-11-29-layer-2xH200.json").read_text(encoding="utf-8"))
    report = (ROOT / "docs/benchmarks/2026-11-29-layer-2xH200.md").read_text(encoding="utf-8")

    def times(model: str, metric: str, *names: str) -> list[float]:
        wanted = [
            row for row in rows if row["metric"] == metric and row["what"] in {f"{model} {name}" for name in names}
        ]
        return [
            min(row["us_median"] for row in wanted if row["tokens"] == tokens)
            for tokens in (128, 512, 1024, 2048, 4096)
        ]

    for model in ("Qwen3-30B-A3B", "DeepSeek-V3"):
        experts = times(model, "experts", "fused, tiles 0", "fused, tiles 1")
        layer = times(model, "layer", "symmetric, fused, adds up in combine")
        for name, found in {
            "exchange alone": times(model, "exchange", "combine sends", "combine takes"),
            "fused experts alone": experts,
            "symmetric, fused experts": times(model, "layer", "symmetric, fused"),
            "the same, combine adds up": layer,
            "vLLM's experts alone": times(model, "experts", "vLLM", "vLLM, tuned"),
            "symmetric, vLLM's experts": times(model, "layer", "symmetric, vLLM", "symmetric, vLLM, tuned"),
            "AgRs, vLLM's experts": times(model, "layer", "AgRs, vLLM", "AgRs, vLLM, tuned"),
        }.items():
            printed = [f"{us:.1f}" if us < 100 else f"{us:,.0f}" for us in found]
            assert f"| {name} | {' | '.join(printed)} |" in report
        ratios = [f"{whole / alone:.2f}" for whole, alone in zip(layer, experts, strict=True)]
        assert f"| its ratio to the experts alone | {' | '.join(ratios)} |" in report
