"""The gating ops, through op-plugin's own C++, against their documents in plain Python."""

import math
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.emulated

npu = torch.ops.npu

ROWS, EXPERTS = 9, 16


def logits(rows: int = ROWS, experts: int = EXPERTS, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


def best(scores: list[float], k: int) -> list[int]:
    """Indices of the k largest; of equal ones the lowest first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:k]


def gating(x: torch.Tensor, k: int, bias: torch.Tensor | None = None, **options: Any) -> tuple[torch.Tensor, ...]:
    return tuple(
        each.cpu()
        for each in npu.npu_moe_gating_top_k(x.npu(), k, bias=None if bias is None else bias.npu(), **options)
    )


def normalised(x: torch.Tensor, norm_type: int) -> torch.Tensor:
    return torch.sigmoid(x.float()) if norm_type == 1 else torch.softmax(x.float(), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("k_group", "group_count", "select_mode"), [(1, 1, 0), (2, 4, 0), (2, 4, 1), (4, 4, 1)])
def test_gating_top_k(
    dtype: torch.dtype, norm_type: int, with_bias: bool, k_group: int, group_count: int, select_mode: int
) -> None:
    k, factor = 4, 2.5
    x = logits(dtype=dtype)
    bias = logits(1, dtype=dtype, seed=4)[0] if with_bias else None
    weights, ids, scores_out = gating(
        x,
        k,
        bias,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=select_mode,
        norm_type=norm_type,
        out_flag=True,
        routed_scaling_factor=factor,
    )
    scores = normalised(x, norm_type)
    choice = scores if bias is None else scores + bias.float()
    assert ids.dtype == torch.int32
    assert weights.dtype == dtype
    assert torch.equal(scores_out, scores)
    size = EXPERTS // group_count
    for row in range(ROWS):
        group_scores = []
        for group in range(group_count):
            ordered = choice[row, group * size : (group + 1) * size].sort(descending=True).values
            group_scores.append(float(ordered[0] + ordered[1] if select_mode == 1 else ordered[0]))
        kept = set(best(group_scores, k_group))
        allowed = [float(choice[row, e]) if e // size in kept else -math.inf for e in range(EXPERTS)]
        wanted = best(allowed, k)
        assert ids[row].tolist() == wanted
        chosen = scores[row, wanted]
        if norm_type == 1:
            chosen = chosen / (chosen.sum() + 1e-20)
        torch.testing.assert_close(weights[row], (chosen * factor).to(dtype))


def test_gating_top_k_takes_the_lowest_of_equal_experts() -> None:
    _, ids, scores = gating(torch.zeros(3, EXPERTS), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert bool(scores.isnan().all()), "not asked for"
    _, ids, _ = gating(torch.zeros(3, EXPERTS), 5, k_group=2, group_count=4)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(
    ("experts", "options", "text"),
    [
        (EXPERTS, {"k": 0}, "k=0 is not in 1..16"),
        (EXPERTS, {"k": 17}, "k=17"),
        (EXPERTS, {"k": 5, "group_count": 4}, "k=5 is not in 1..4"),
        (EXPERTS, {"k": 2, "group_count": 3}, "group_count=3 does not divide 16"),
        (EXPERTS, {"k": 2, "group_count": 8}, "group_count=8 leaves groups of 2"),
        (EXPERTS, {"k": 2, "k_group": 5, "group_count": 4}, "k_group=5 is not in"),
        (
            520,
            {"k": 2, "group_count": 104},
            "group_count=104 groups of 5 experts, each padded to a multiple of 32, are 3328",
        ),
        (EXPERTS, {"k": 2, "renorm": 1}, "renorm=1 is not emulated"),
        (EXPERTS, {"k": 2, "norm_type": 2}, "norm_type=2"),
        (EXPERTS, {"k": 2, "group_select_mode": 2}, "group_select_mode=2"),
        (2049, {"k": 2}, "x has 2049 experts; at most 2048"),
    ],
)
def test_gating_top_k_refuses_by_name(experts: int, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)561002.*{text}"):
        gating(logits(experts=experts), **options)


# --- experts by a table of token ids ---

TABLE = torch.rand(20, EXPERTS, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :3].int()
TOKENS = torch.arange(ROWS) * 7 % 20
needs_tables = pytest.mark.skipif(
    all(argument.name != "tid2eid" for argument in npu.npu_moe_gating_top_k.default._schema.arguments),
    reason="needs torch_npu 2.13, whose npu_moe_gating_top_k takes tid2eid",
)


@needs_tables
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gating_by_table(dtype: torch.dtype, norm_type: int, index_dtype: torch.dtype) -> None:
    x = logits(dtype=dtype)
    weights, ids, scores_out = (
        each.cpu()
        for each in npu.npu_moe_gating_top_k(
            x.npu(),
            3,
            input_ids=TOKENS.to(index_dtype).npu(),
            tid2eid=TABLE.to(index_dtype).npu(),
            norm_type=norm_type,
            routed_scaling_factor=2.5,
        )
    )
    assert torch.equal(ids, TABLE[TOKENS])
    chosen = normalised(x, norm_type).gather(1, TABLE[TOKENS].long())
    if norm_type == 1:
        chosen = chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(weights, (chosen * 2.5).to(dtype))
    assert bool(scores_out.isnan().all())


def bad_tables(rank: int, num_ranks: int) -> None:
    del rank, num_ranks
    for changes, text in (
        ({"bias": torch.zeros(EXPERTS)}, r"161002.*bias is given, but tid2eid chooses the experts"),
        ({"group_count": 4, "k_group": 4}, r"561002.*group_count=4, but tid2eid chooses"),
        ({"input_ids": TOKENS + 12}, r"561002.*input_ids has a value outside 0\.\.19"),
        ({"tid2eid": TABLE + 1}, rf"561002.*tid2eid has a value outside 0\.\.{EXPERTS - 1}"),
    ):
        arguments = {"input_ids": TOKENS, "tid2eid": TABLE} | changes
        arguments = {name: each.npu() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
        with pytest.raises(RuntimeError, match=f"(?s){text}"):
            npu.npu_moe_gating_top_k(logits().npu(), 3, **arguments)


@needs_tables
def test_gating_by_table_refuses_by_name(run_in_ranks) -> None:
    run_in_ranks(bad_tables, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(ROWS, EXPERTS), (3, 3, EXPERTS)])
@pytest.mark.parametrize("some_finished", [False, True])
def test_gating_top_k_softmax(dtype: torch.dtype, shape: tuple[int, ...], some_finished: bool) -> None:
    k = 3
    x = logits(dtype=dtype).view(shape)
    finished = (torch.arange(ROWS) % 4 == 1).view(shape[:-1])
    weights, ids, rows = npu.npu_moe_gating_top_k_softmax(x.npu(), finished.npu() if some_finished else None, k)
    scores = torch.softmax(x.float(), -1).view(ROWS, EXPERTS)
    for row in range(ROWS):
        wanted = best(scores[row].tolist(), k)
        torch.testing.assert_close(weights.cpu().view(ROWS, k)[row], scores[row, wanted].to(dtype))
        is_finished = some_finished and bool(finished.flatten()[row])
        assert ids.view(ROWS, k)[row].tolist() == ([EXPERTS] * k if is_finished else wanted)
        assert rows.view(ROWS, k)[row].tolist() == [i * ROWS + row for i in range(k)]
    assert weights.shape == ids.shape == rows.shape == (*shape[:-1], k)


@pytest.mark.parametrize("renorm", [0, 1])
@pytest.mark.parametrize("wants_scores", [False, True])
def test_gating_top_k_softmax_v2(renorm: int, wants_scores: bool) -> None:
    k, x = 4, logits(seed=7)
    weights, ids, scores_out = npu.npu_moe_gating_top_k_softmax_v2(
        x.npu(), k=k, renorm=renorm, output_softmax=wants_scores
    )
    scores = torch.softmax(x, -1)
    for row in range(ROWS):
        wanted = best(x[row].tolist(), k)
        assert ids[row].tolist() == wanted
        chosen = torch.softmax(x[row, wanted], -1) if renorm else scores[row, wanted]
        torch.testing.assert_close(weights[row].cpu(), chosen)
    if wants_scores and not renorm:
        torch.testing.assert_close(scores_out.cpu(), scores)
    else:
        assert scores_out.numel() == 0


def test_gating_top_k_softmax_refuses_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)561002.*k=1025 is not in 1\.\.1024"):
        npu.npu_moe_gating_top_k_softmax(torch.zeros(2, 2000).npu(), None, 1025)
    with pytest.raises(RuntimeError, match="renorm must be 0 or 1"):
        npu.npu_moe_gating_top_k_softmax_v2(logits().npu(), k=2, renorm=2)
