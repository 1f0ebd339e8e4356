"""vllm-ascend's dispatch_gmm_combine_decode on the emulated device, against numpy in float64.

Every rank makes all ranks' data from one seed, so what it must return is known without communication.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.emulated.references import distinct_ids, group_name, is_undefined, random_rows, refused
from vllm_npu.emulator.ascend_stack import custom_ops

pytestmark = pytest.mark.emulated

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative to the largest element
INT8_FROM_DENSE = 5e-2  # activations are rounded twice to 1/127 of the largest element of their row


@dataclass(frozen=True)
class Layer:
    """A layer of int8 weights with a scale for each column. The same on all ranks."""

    tokens: list[int]  # of each rank
    dtype: torch.dtype = torch.bfloat16
    active: list[int] | None = None  # the tokens of each rank that a mask names
    experts_per_rank: int = 3
    top_k: int = 2
    width: int = 512
    inner: int = 512
    room: int = 0  # the most tokens of a rank that global_bs names; 0: global_bs is 0
    seed: int = 1
    as_lists: bool = False
    scales_as_x: bool = False
    x: list[torch.Tensor] = field(init=False)
    ids: list[torch.Tensor] = field(init=False)
    weights: list[torch.Tensor] = field(init=False)
    w1: torch.Tensor = field(init=False)  # [experts, width, 2 * inner] int8
    w2: torch.Tensor = field(init=False)  # [experts, inner, width] int8
    scale1: torch.Tensor = field(init=False)  # [experts, 2 * inner] float32
    scale2: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        ranks, seed = range(len(self.tokens)), self.seed * 100
        keep("x", [random_rows(self.tokens[r], self.width, dtype=self.dtype, seed=seed + r) for r in ranks])
        keep("ids", [distinct_ids(self.tokens[r], self.top_k, self.experts, seed + 20 + r) for r in ranks])
        keep("weights", [random_rows(self.tokens[r], self.top_k, seed=seed + 40 + r).abs() for r in ranks])
        for name, shape in (("1", (self.width, 2 * self.inner)), ("2", (self.inner, self.width))):
            weight = random_rows(self.experts, *shape, seed=seed + 60 + int(name)) * shape[0] ** -0.5
            scale = weight.abs().amax(1) / 127
            if self.scales_as_x:
                scale = scale.to(self.dtype).float()
            keep(f"scale{name}", scale)
            keep(f"w{name}", (weight / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8))

    @property
    def experts(self) -> int:
        return self.experts_per_rank * len(self.tokens)

    def takes_part(self, rank: int) -> int:
        """The number of this rank's tokens that take part."""
        return self.tokens[rank] if self.active is None else self.active[rank]

    def arrived(self, rank: int) -> list[int]:
        """The rows that arrive for each expert of a rank."""
        first = rank * self.experts_per_rank
        chosen = torch.cat([ids[: self.takes_part(source)].flatten() for source, ids in enumerate(self.ids)])
        return [int((chosen == first + local).sum()) for local in range(self.experts_per_rank)]


def arguments_of(layer: Layer, rank: int) -> dict[str, Any]:
    """The arguments of this rank's call, as vllm-ascend passes them."""
    own = slice(rank * layer.experts_per_rank, (rank + 1) * layer.experts_per_rank)

    def listed(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [each.contiguous().npu() for each in tensor[own]] if layer.as_lists else [tensor[own].npu()]

    mask = None
    if layer.active is not None:
        mask = (torch.arange(layer.tokens[rank]) < layer.active[rank]).npu()
    kind = layer.dtype if layer.scales_as_x else torch.float32
    return {
        "x": layer.x[rank].npu(),
        "expert_ids": layer.ids[rank].npu(),
        "gmm1_permuted_weight": listed(layer.w1),
        "gmm1_permuted_weight_scale": listed(layer.scale1.to(kind)),
        "gmm2_weight": listed(layer.w2),
        "gmm2_weight_scale": listed(layer.scale2.to(kind)),
        "expert_scales": layer.weights[rank].npu(),
        "x_active_mask": mask,
        "group_ep": group_name(),
        "ep_rank_size": len(layer.tokens),
        "ep_rank_id": rank,
        "moe_expert_num": layer.experts,
        "global_bs": layer.room * len(layer.tokens),
    }


def run(layer: Layer, rank: int, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the operator. Returns its output and the counts, on the host."""
    custom_ops.register()
    output, counts = torch.ops._C_ascend.dispatch_gmm_combine_decode(**(arguments_of(layer, rank) | changes))
    return output.cpu(), counts.cpu()


def expert_in_float64(layer: Layer, row: np.ndarray, expert: int) -> np.ndarray:
    first = layer.w1[expert].double().numpy() * layer.scale1[expert].double().numpy()
    second = layer.w2[expert].double().numpy() * layer.scale2[expert].double().numpy()
    gate, up = np.split(row @ first, 2)
    return gate / (1 + np.exp(-gate)) * up @ second


def expert_with_roundings(layer: Layer, row: np.ndarray, expert: int) -> np.ndarray:
    """As the source has it: rows are rounded to int8 before each product, and nothing is rounded to 16 bits between them."""
    row_scale = np.abs(row).max() / 127
    first = np.rint(row / row_scale) @ layer.w1[expert].double().numpy() * layer.scale1[expert].double().numpy()
    gate, up = np.split(first * row_scale, 2)
    inner = gate / (1 + np.exp(-gate)) * up
    inner_scale = np.abs(inner).max() / 127
    second = np.rint(inner / inner_scale) @ layer.w2[expert].double().numpy() * layer.scale2[expert].double().numpy()
    return second * inner_scale


def dense(layer: Layer, rank: int, expert_of_row: Any = expert_in_float64) -> np.ndarray:
    total = np.zeros(layer.x[rank].shape)
    for token, row in enumerate(layer.x[rank]):
        for k, expert in enumerate(layer.ids[rank][token].tolist()):
            if expert >= 0:
                output = expert_of_row(layer, row.double().numpy(), expert)
                total[token] += float(layer.weights[rank][token, k]) * output
    return total


def check(layer: Layer, rank: int) -> None:
    output, counts = run(layer, rank)
    assert (counts.dtype, counts.tolist()) == (torch.int64, layer.arrived(rank))
    kept = layer.takes_part(rank)
    assert is_undefined(output[kept:]), "rows of masked tokens are not written"
    for reference, tolerance in (
        (expert_in_float64, INT8_FROM_DENSE),
        (expert_with_roundings, TOLERANCES[layer.dtype]),
    ):
        exact = dense(layer, rank, reference)
        error = np.abs(output.double().numpy() - exact)[:kept] / np.abs(exact).max()
        assert kept == 0 or error.max() < tolerance, (reference.__name__, error.max())


def layers(rank: int, num_ranks: int) -> None:
    even, uneven = [5] * num_ranks, [1 + 3 * source % 7 for source in range(num_ranks)]
    for dtype in (torch.bfloat16, torch.float16):
        check(Layer(even, dtype=dtype), rank)
        check(Layer(even, dtype=dtype, seed=2, scales_as_x=True), rank)
    check(Layer(uneven, seed=3, room=max(uneven)), rank)
    check(Layer(uneven, seed=4, room=9, as_lists=True), rank)
    check(Layer(even, seed=5, active=[2 * source for source in range(num_ranks)]), rank)  # rank 0 has no token
    check(Layer(even, seed=6, experts_per_rank=1, top_k=1), rank)  # the kernel for one expert a rank
    check(Layer(even, seed=7, experts_per_rank=1, top_k=1, as_lists=True), rank)
    check(Layer(even, seed=8, width=576, inner=768), rank)


def ids_that_are_no_expert(rank: int, num_ranks: int) -> None:
    layer = Layer([5] * num_ranks, seed=9)
    for ids in layer.ids:
        ids[1::2, 0] = -1
        ids[3] = -1
    check(layer, rank)
    assert run(layer, rank)[0][3].abs().max() == 0


def a_row_of_zeros(rank: int, num_ranks: int) -> None:
    layer = Layer([4] * num_ranks, seed=10)
    for x in layer.x:
        x[2] = 0
    output, _ = run(layer, rank)
    assert output[2].abs().max() == 0
    assert not output.isnan().any()


def refusals(rank: int, num_ranks: int) -> None:
    def refuses(text: str, layer: Layer, **changes: Any) -> None:
        refused(text, lambda: run(layer, rank, **changes))

    even = [5] * num_ranks
    refuses("the number of tokens is 257; the tiling takes at most 256", Layer([257] * num_ranks))
    refuses("top_k is 13; the tiling takes at most 12", Layer(even, experts_per_rank=13, top_k=13))
    refuses("the number of experts of a rank is 25; the tiling takes at most 24", Layer(even, experts_per_rank=25))
    refuses("K=480; the tiling takes 512 to 7168", Layer(even, width=480))
    refuses("N=768; the tiling takes 1024 to 6144", Layer(even, inner=384))
    refuses("K=520 is no multiple of 32.*does not check", Layer(even, width=520))
    refuses("N / 2=576 is no multiple of 128.*does not check", Layer(even, inner=576))
    refuses("N / 2=1152 does not halve into blocks of 8 columns.*does not check", Layer(even, inner=1152))
    refuses("x has 5 rows and global_bs has room for 4.*does not check", Layer(even, room=4))
    places = 2 * 3 * num_ranks * 300 * 512 * 2
    needed = -(-(places + 512 * num_ranks) // (1 << 20))
    refuses(f"is 1 MB, and 300 tokens of a rank need {needed}, which.*HCCL_BUFFSIZE={needed}", Layer(even, room=300))


def refused_values(rank: int, num_ranks: int) -> None:
    def refuses(text: str, **changes: Any) -> None:
        refused(text, lambda: run(layer, rank, **changes))

    layer = Layer([5] * num_ranks)
    refuses("names no HCCL communicator", group_ep="nobody")
    refuses(f"ep_rank_size={num_ranks + 1}", ep_rank_size=num_ranks + 1)
    refuses("shared_expert_num=2; the tiling takes 1", shared_expert_num=2)
    refuses(f"moe_expert_num={layer.experts + 1} does not divide", moe_expert_num=layer.experts + 1)
    refuses("global_bs=1 does not divide", global_bs=1)
    refuses("16-bit weights", gmm1_permuted_weight=[layer.w1[:3].bfloat16().npu()])
    refuses("expert_scales is Half", expert_scales=layer.weights[rank].half().npu())
    past = torch.full_like(layer.ids[rank], layer.experts).npu()
    refuses(f"expert_ids has the id {layer.experts}; ids must be below {layer.experts}", expert_ids=past)
    refused(
        "tokens of a rank=(5|6)", lambda: run(Layer([5 + rank % 2] * num_ranks), rank)
    )  # each rank's text shows both
    check(layer, rank)


def not_on_a2(rank: int, num_ranks: int) -> None:
    refused("Ascend910B.* has no DispatchGmmCombineDecode", lambda: run(Layer([5] * num_ranks), rank))


def replayed(rank: int, num_ranks: int) -> None:
    """One graph, captured for other tokens."""
    custom_ops.register()
    held, new = Layer([4] * num_ranks, seed=11), Layer([4] * num_ranks, seed=11)
    object.__setattr__(new, "x", [random_rows(4, 512, dtype=new.dtype, seed=200 + r) for r in range(num_ranks)])
    object.__setattr__(new, "ids", [distinct_ids(4, new.top_k, new.experts, 220 + r) for r in range(num_ranks)])
    arguments = arguments_of(held, rank)
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        output, counts = torch.ops._C_ascend.dispatch_gmm_combine_decode(**arguments)
    arguments["x"].copy_(new.x[rank].npu())
    arguments["expert_ids"].copy_(new.ids[rank].npu())
    graph.replay()
    exact = dense(new, rank)
    assert np.abs(output.cpu().double().numpy() - exact).max() / np.abs(exact).max() < INT8_FROM_DENSE
    assert counts.tolist() == new.arrived(rank)
    dist.barrier()


def test_meta_tensors_are_not_computed():
    custom_ops.register()
    x, weight = torch.empty(2, 64, device="meta"), torch.empty(2, 64, 64, device="meta")
    ids = torch.empty(2, 2, dtype=torch.int32, device="meta")
    returned = torch.ops._C_ascend.dispatch_gmm_combine_decode(
        *(x, ids, [weight], [weight], [weight], [weight], x), ep_rank_size=2, moe_expert_num=6
    )
    assert [(each.shape, each.dtype) for each in returned] == [(x.shape, x.dtype), ((3,), torch.int64)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_layers_equal_the_float64_layer(run_in_ranks, num_ranks):
    run_in_ranks(layers, num_ranks)


@pytest.mark.parametrize("program", [ids_that_are_no_expert, a_row_of_zeros])
def test_ids_below_zero_are_left_out_and_rows_of_zeros_stay_zeros(run_in_ranks, program):
    run_in_ranks(program, 2)


def test_sizes_that_the_operator_does_not_take_are_refused(run_in_ranks):
    run_in_ranks(refusals, 2, env={"HCCL_BUFFSIZE": "1"})


def test_values_that_the_source_excludes_are_refused(run_in_ranks):
    run_in_ranks(refused_values, 2)


def test_a2_has_no_such_operator(run_in_ranks):
    run_in_ranks(not_on_a2, 2, soc="A2")


def test_a_replay_computes_other_tokens(run_in_ranks):
    run_in_ranks(replayed, 2)


@pytest.mark.parametrize("env", [{"VLLM_NPU_EMULATOR_ASYNC": "1"}, {"TASK_QUEUE_ENABLE": "1"}], ids=str)
def test_layers_on_asynchronous_streams_and_behind_torch_npus_queue(run_in_ranks, env):
    run_in_ranks(layers, 2, env=env)
