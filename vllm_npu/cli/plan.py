"""`vllm-npu plan`: the strategies that a layer may use on a device, the choice of auto, and the buffer to set."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_npu.cli.outputs import JsonPath
from vllm_npu.core.expert_limits import ExpertsWanted
from vllm_npu.core.limits import DEVICES
from vllm_npu.core.model_facts import ModelFacts, read_config
from vllm_npu.core.topology import ExpertPlacement, ParallelTopology
from vllm_npu.envs import HCCL_BUFFSIZE
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.strategies.planning import LayerPlan, plan_layer
from vllm_npu.strategies.start_checks import check_experts
from vllm_npu.tools.json_option import read_object
from vllm_npu.tools.layers import DTYPES, device_of_engine, layer_of_model


def plan(
    ep: Annotated[int, typer.Option(min=1, help="Ranks that hold the experts: TP times DP.")],
    soc: Annotated[
        str | None, typer.Option(help=f"Family of NPUs: {', '.join(DEVICES)}. Without this option: no NPU.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Largest number of tokens of a step on one data-parallel rank.")
    ] = 512,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed experts of the layer.")] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Experts for each token.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="hidden_size of the model.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"dtype of hidden states: {', '.join(DTYPES)} (bfloat16).")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A config.json, or its folder. It gives the numbers that no option gives.")
    ] = None,
    additional_config: Annotated[
        str,
        typer.Option(help="vLLM's option of this name: vllm-ascend's options for MC2 and fused MC2 count."),
    ] = "{}",
    json_path: JsonPath = None,
) -> None:
    """Show the strategies that are legal for a mixture-of-experts layer, and the reason against each other one. Show the choice
    of auto for each token count, the bytes that a rank sends for a layer, and the HCCL_BUFFSIZE that mc2 needs.

    Nothing runs, and no device is needed. Bytes are computed for uniform routing, without headers. Exit status 1 if no layer
    can have these numbers, and if an engine would refuse the model.
    """
    if ep % tp:
        raise UnsupportedConfigError(
            f"--ep {ep} is not a multiple of --tp {tp}; the experts lie on all ranks of the grid"
        )
    device = device_of_engine(soc, read_object("--additional-config", additional_config), ep_size=ep)
    topology = ParallelTopology.of_rank(0, tp_size=tp, dp_size=ep // tp)
    facts = ModelFacts() if model is None else read_config(model)
    check_experts(ExpertsWanted(model=facts), topology, device)
    layer = layer_of_model(facts, experts=experts, topk=topk, hidden=hidden, dtype=dtype)
    layer = device.placed(layer, ep)
    ExpertPlacement(layer.num_experts, ep)
    planned = plan_layer(layer, topology, device, tokens)
    todo = advice(planned, HCCL_BUFFSIZE.read_whole_number())
    if json_path is not None:
        json_path.write_text(json.dumps({**asdict(planned), "advice": todo}, indent=2) + "\n")
    _print(
        planned,
        todo,
        f"{device.family}, {topology}, {layer.num_experts} experts top {layer.top_k}, {tokens} tokens a DP rank",
    )


def advice(planned: LayerPlan, buffer_mb: int) -> list[str]:
    """The variable to set, or nothing. `buffer_mb` is the present HCCL_BUFFSIZE in MiB."""
    for buffer in planned.buffers:
        if buffer.needed_mb is not None and buffer.needed_mb > buffer_mb:
            return [
                f"set HCCL_BUFFSIZE={buffer.needed_mb} (MiB) on all ranks before the start: {buffer.algorithm} needs it for "
                f"{buffer.tokens_per_rank} tokens a rank, and {buffer_mb} are set"
            ]
        if buffer.needed_mb is not None:
            break
    return []


def _print(planned: LayerPlan, todo: list[str], title: str) -> None:
    console = Console()
    strategies = Table("strategy", "collectives a layer", "KiB a rank sends for a layer", "legal", title=title)
    for row in planned.strategies:
        strategies.add_row(
            row.strategy,
            str(row.collectives),
            f"{row.bytes_sent / 1024:,.0f}",
            f"no: {row.reason}" if row.reason else "yes",
        )
    console.print(strategies)
    auto = Table("tokens of a step", "auto takes", "why")
    for each in planned.auto:
        auto.add_row(f"{each.first_tokens} to {each.last_tokens}", each.strategy, each.reason)
    console.print(auto)
    if planned.buffers:
        buffers = Table("algorithm", "tokens a rank", "HCCL_BUFFSIZE needed, MiB")
        for buffer in planned.buffers:
            needed = f"none: {buffer.reason}" if buffer.reason else str(buffer.needed_mb)
            buffers.add_row(buffer.algorithm, str(buffer.tokens_per_rank), needed)
        console.print(buffers)
    for line in todo:
        print(line)
