"""vllm-ascend's dispatch_ffn_combine on the emulated device, against numpy in float64.

Every rank makes all ranks' data from one seed, so what it must return is known without communication.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.emulated.references import distinct_ids, group_name, quotient_int8, random_rows, refused
from vllm_npu.emulator.ascend_stack import custom_ops

pytestmark = pytest.mark.emulated

WIDTH, INNER = 64, 32
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative to the largest element
INT8_FROM_DENSE = 5e-2  # activations are rounded twice to 1/127 of the largest element of their row
ROOM = 1000


@dataclass(frozen=True)
class Layer:
    """A layer of 16-bit weights, or of int8 weights with a scale for each column. The same on all ranks."""

    tokens: list[int]  # of each rank
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False
    masks: list[torch.Tensor] | None = None
    experts_per_rank: int = 3
    top_k: int = 2
    width: int = WIDTH
    inner: int = INNER
    limit: float = 0.0
    room: int = ROOM
    seed: int = 1
    as_lists: bool = False
    x: list[torch.Tensor] = field(init=False)
    ids: list[torch.Tensor] = field(init=False)
    weights: list[torch.Tensor] = field(init=False)
    w1: torch.Tensor = field(init=False)  # [experts, width, 2 * inner]
    w2: torch.Tensor = field(init=False)  # [experts, inner, width]
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
            keep(f"scale{name}", scale)
            keep(
                f"w{name}", (weight / scale.unsqueeze(1)).round().to(torch.int8) if self.int8 else weight.to(self.dtype)
            )

    @property
    def experts(self) -> int:
        return self.experts_per_rank * len(self.tokens)

    def is_active(self, rank: int, token: int) -> bool:
        return self.masks is None or not self.int8 or bool(self.masks[rank][token])

    def arrivals(self, rank: int) -> list[tuple[int, int, int, int]]:
        """(local expert, source, token, k) of the rows that arrive at a rank, in their order."""
        first = rank * self.experts_per_rank
        return sorted(
            (int(expert) - first, source, token, k)
            for source, ids in enumerate(self.ids)
            for token, row in enumerate(ids)
            for k, expert in enumerate(row)
            if first <= expert < first + self.experts_per_rank and self.is_active(source, token)
        )

    def has_lost(self, rank: int) -> set[int]:
        """The tokens of a rank that are masked, or of which a row found no room."""
        lost = {token for token in range(self.tokens[rank]) if not self.is_active(rank, token)}
        for owner in range(len(self.tokens)):
            lost |= {token for _, source, token, _ in self.arrivals(owner)[self.room :] if source == rank}
        return lost


def run(layer: Layer, rank: int, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the operator. Returns its output, the counts, and expert_idx after the call, on the host."""
    custom_ops.register()
    own = slice(rank * layer.experts_per_rank, (rank + 1) * layer.experts_per_rank)

    def listed(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [each.contiguous().npu() for each in tensor[own]] if layer.as_lists else [tensor[own].npu()]

    def bits(scale: torch.Tensor) -> list[torch.Tensor]:
        numbers = scale.contiguous().view(torch.int32).long()
        return listed(numbers) if layer.as_lists else [numbers[own].flatten().npu()]

    nothing = [torch.tensor([], dtype=torch.int64)]
    ids, out = layer.ids[rank].npu(), torch.full_like(layer.x[rank], torch.nan).npu()
    counts = torch.full((layer.experts_per_rank,), -9, dtype=torch.int32).npu()
    arguments = {
        "x": layer.x[rank].npu(),
        "weight1": listed(layer.w1),
        "weight2": listed(layer.w2),
        "expert_idx": ids,
        "scale1": bits(layer.scale1) if layer.int8 else nothing,
        "scale2": bits(layer.scale2) if layer.int8 else nothing,
        "bias1": [],
        "bias2": [],
        "probs": layer.weights[rank].npu(),
        "group": group_name(),
        "max_output_size": layer.room,
        "out": out,
        "expert_token_nums": counts,
        "x_active_mask": None if layer.masks is None else layer.masks[rank].npu(),
        "swiglu_limit": layer.limit,
    }
    returned = torch.ops._C_ascend.dispatch_ffn_combine(**(arguments | changes))
    assert returned[0].data_ptr() == out.data_ptr()
    return out.cpu(), counts.cpu(), ids.cpu()


def expert_in_float64(layer: Layer, row: np.ndarray, expert: int) -> np.ndarray:
    first, second = layer.w1[expert].double().numpy(), layer.w2[expert].double().numpy()
    if layer.int8:
        first = first * layer.scale1[expert].double().numpy()
        second = second * layer.scale2[expert].double().numpy()
    gate, up = np.split(row @ first, 2)
    if layer.limit:
        gate, up = np.minimum(gate, layer.limit), np.clip(up, -layer.limit, layer.limit)
    return gate / (1 + np.exp(-gate)) * up @ second


def expert_with_roundings(layer: Layer, row: torch.Tensor, expert: int) -> np.ndarray:
    """As the source has it for int8: float16 behind each product, and the scales of the rows behind that."""
    values, scale = quotient_int8(row.float().numpy()[None])
    first = values.astype(np.float64) @ layer.w1[expert].double().numpy() * layer.scale1[expert].double().numpy()
    gate, up = np.split(first[0].astype(np.float16).astype(np.float64) * scale[0], 2)
    if layer.limit:
        gate, up = np.minimum(gate, layer.limit), np.clip(up, -layer.limit, layer.limit)
    inner = gate / (1 + np.exp(-gate)) * up
    largest = np.abs(inner).max()
    second = (
        np.rint(inner * (127 / largest)) @ layer.w2[expert].double().numpy() * layer.scale2[expert].double().numpy()
    )
    return second.astype(np.float16).astype(np.float64) * (largest / 127)


def dense(layer: Layer, rank: int, *, rounded: bool = False) -> np.ndarray:
    total = np.zeros(layer.x[rank].shape)
    for token, row in enumerate(layer.x[rank]):
        for k, expert in enumerate(layer.ids[rank][token].tolist()):
            output = (
                expert_with_roundings(layer, row, expert)
                if rounded
                else expert_in_float64(layer, row.double().numpy(), expert)
            )
            total[token] += float(layer.weights[rank][token, k]) * output
    return total


def check(layer: Layer, rank: int) -> None:
    out, counts, ids = run(layer, rank)
    arrived = [local for local, *_ in layer.arrivals(rank)]
    assert counts.tolist() == [arrived.count(local) for local in range(layer.experts_per_rank)]
    lost = layer.has_lost(rank)
    kept = [token for token in range(layer.tokens[rank]) if token not in lost]
    assert all(bool(out[token].isnan().any()) for token in lost), "a row that did not come back is undefined"
    exact = dense(layer, rank)
    error = np.abs(out.double().numpy() - exact)[kept] / np.abs(exact).max()
    assert not kept or error.max() < (INT8_FROM_DENSE if layer.int8 else TOLERANCES[layer.dtype])
    if layer.int8:
        rounded = dense(layer, rank, rounded=True)
        error = np.abs(out.double().numpy() - rounded)[kept] / np.abs(rounded).max()
        assert not kept or error.max() < TOLERANCES[layer.dtype]
    wanted = layer.ids[rank].clone()
    for token in range(layer.tokens[rank]):
        if not layer.is_active(rank, token):
            wanted[token] = layer.experts  # the operator writes into its input
    assert torch.equal(ids, wanted)


def layers(rank: int, num_ranks: int) -> None:
    even, uneven = [5] * num_ranks, [1 + 3 * source % 7 for source in range(num_ranks)]
    masks = [torch.arange(5) < source * 2 for source in range(num_ranks)]  # rank 0 has no token
    for dtype in (torch.bfloat16, torch.float16):
        check(Layer(even, dtype=dtype), rank)
        check(Layer(even, dtype=dtype, int8=True), rank)
    for int8 in (False, True):
        check(Layer(uneven, int8=int8, seed=2), rank)
        check(Layer(even, int8=int8, seed=3, as_lists=True), rank)
        check(Layer(even, int8=int8, seed=4, masks=masks), rank)  # the operator for 16-bit weights takes no mask
        check(Layer(even, int8=int8, seed=5, room=3 * num_ranks), rank)
    check(Layer(even, int8=True, seed=6, limit=0.25), rank)
    check(Layer(even, int8=True, seed=7, experts_per_rank=2, top_k=3), rank)
    check(Layer(even, seed=8, experts_per_rank=1, top_k=1), rank)


def the_room_is_too_small_on_one_rank(rank: int, num_ranks: int) -> int:
    """Returns the number of this rank's tokens that lost a row."""
    layer = Layer([40] * num_ranks, seed=9, room=60)
    assert sum(len(layer.arrivals(owner)) for owner in range(num_ranks)) == 40 * num_ranks * layer.top_k
    check(layer, rank)
    return len(layer.has_lost(rank))


def refusals(rank: int, num_ranks: int) -> None:
    def refuses(text: str, layer: Layer, **changes: Any) -> None:
        refused(text, lambda: run(layer, rank, **changes))

    even = [5] * num_ranks
    refuses("2 experts: the kernel then computes no activation", Layer(even, experts_per_rank=2))
    refuses("1 experts: the kernel then computes no activation", Layer(even, int8=True, experts_per_rank=1, top_k=1))
    refuses("N=96 is more than K=64", Layer(even, int8=True, inner=48))
    refuses("K=48 is no multiple of 32", Layer(even, width=48, inner=16))
    refuses("N=8192 needs 212992 bytes in a vector core", Layer(even, inner=4096))
    refuses("x has no row", Layer([0] * num_ranks))
    refuses("HCCL_BUFFSIZE of the group .* is 1 MB, and 5 tokens need 5", Layer(even))
    refuses("is 1 MB, and 5 tokens need 11", Layer(even, int8=True))


def refused_values(rank: int, num_ranks: int) -> None:
    def refuses(text: str, layer: Layer, **changes: Any) -> None:
        refused(text, lambda: run(layer, rank, **changes))

    layer = Layer([5] * num_ranks)
    refuses("names no HCCL communicator", layer, group="nobody")
    refuses("expert_idx has the id -1", layer, expert_idx=torch.full_like(layer.ids[rank], -1).npu())
    past = torch.full_like(layer.ids[rank], layer.experts)
    refuses(
        f"expert_idx has the id {layer.experts}; ids must be in 0..{layer.experts - 1}", layer, expert_idx=past.npu()
    )
    refuses("probs is Half", layer, probs=layer.weights[rank].half().npu())
    refuses("max_output_size=0", layer, max_output_size=0)
    refuses("K=(64|96)", Layer([5] * num_ranks, width=64 + 32 * (rank % 2)))  # each rank's text shows both
    check(layer, rank)


def sixteen_bit_on_a2(rank: int, num_ranks: int) -> None:
    refused("Ascend910B.* has no DispatchFFNCombineBF16", lambda: run(Layer([5] * num_ranks), rank))
    check(Layer([5] * num_ranks, int8=True), rank)


def replayed(rank: int, num_ranks: int) -> None:
    """One graph, captured for other tokens. It holds one operation."""
    custom_ops.register()
    for int8 in (False, True):
        held, new = Layer([4] * num_ranks, int8=int8, seed=11), Layer([4] * num_ranks, int8=int8, seed=11)
        object.__setattr__(new, "x", [random_rows(4, WIDTH, dtype=new.dtype, seed=200 + r) for r in range(num_ranks)])
        object.__setattr__(new, "ids", [distinct_ids(4, new.top_k, new.experts, 220 + r) for r in range(num_ranks)])
        x, ids = held.x[rank].npu(), held.ids[rank].npu()
        out, counts = torch.empty_like(x), torch.empty(held.experts_per_rank, dtype=torch.int32, device="npu")
        weights = held.weights[rank].npu()
        changes = {"x": x, "expert_idx": ids, "expert_token_nums": counts, "probs": weights}
        own = slice(rank * held.experts_per_rank, (rank + 1) * held.experts_per_rank)
        bits = [
            [scale[own].contiguous().view(torch.int32).long().flatten().npu()] for scale in (held.scale1, held.scale2)
        ]
        arguments = changes | {
            "weight1": [held.w1[own].npu()],
            "weight2": [held.w2[own].npu()],
            "scale1": bits[0],
            "scale2": bits[1],
            "bias1": [],
            "bias2": [],
            "group": group_name(),
            "max_output_size": ROOM,
            "out": out,
        }
        torch.npu.synchronize()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            torch.ops._C_ascend.dispatch_ffn_combine(**arguments)
        x.copy_(new.x[rank].npu())
        ids.copy_(new.ids[rank].npu())
        graph.replay()
        exact = dense(new, rank)
        error = np.abs(out.cpu().double().numpy() - exact).max() / np.abs(exact).max()
        assert error < (INT8_FROM_DENSE if int8 else TOLERANCES[new.dtype])


def test_meta_tensors_are_not_computed():
    custom_ops.register()
    x, weight = torch.empty(2, 64, device="meta"), torch.empty(2, 64, 64, device="meta")
    counts = torch.empty(2, dtype=torch.int32, device="meta")
    returned = torch.ops._C_ascend.dispatch_ffn_combine(
        x, [weight], [weight], counts, [], [], [], [], x, "no group", 1, x, counts
    )
    assert [each.shape for each in returned] == [x.shape, counts.shape]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_layers_equal_the_float64_layer(run_in_ranks, num_ranks):
    run_in_ranks(layers, num_ranks)


def test_rows_past_max_output_size_are_lost_without_an_error(run_in_ranks):
    lost = run_in_ranks(the_room_is_too_small_on_one_rank, 2).returned
    assert sum(lost) > 0


def test_sizes_that_the_kernel_cannot_hold_are_refused(run_in_ranks):
    run_in_ranks(refusals, 2, env={"HCCL_BUFFSIZE": "1"})


def test_values_that_the_source_excludes_are_refused(run_in_ranks):
    run_in_ranks(refused_values, 2)


def test_a2_has_the_operator_for_int8_only(run_in_ranks):
    run_in_ranks(sixteen_bit_on_a2, 2, soc="A2")


def test_a_replay_computes_other_tokens(run_in_ranks):
    run_in_ranks(replayed, 2)


@pytest.mark.parametrize("env", [{"VLLM_NPU_EMULATOR_ASYNC": "1"}, {"TASK_QUEUE_ENABLE": "1"}], ids=str)
def test_layers_on_asynchronous_streams_and_behind_torch_npus_queue(run_in_ranks, env):
    run_in_ranks(layers, 2, env=env)
