"""Dropout by masks of bits: the masks, npu_dropout, and attention of training with them, against float64 on the CPU."""

import itertools

import numpy
import pytest
import torch
import torch_npu

from tests.emulated.references import random_rows, refused
from tests.emulated.test_aclnn_training import BATCH, HEADS, QUERIES, SCALE, TO_LAYOUT, WIDTH, same, same_with_gradients

pytestmark = pytest.mark.emulated

NPU_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def kept_by(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """[numel] bool, read with numpy: bits from the lowest one of each byte."""
    return torch.from_numpy(numpy.unpackbits(mask.cpu().numpy(), count=numel, bitorder="little")).bool()


def draw(numel: int, p: float, seed: int = 3, offset: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    like = torch.empty(1, dtype=dtype, device="npu")
    return torch_npu._npu_dropout_gen_mask(like, [numel], p=p, seed=seed, offset=offset, parallel=True, sync=False)


# --- masks ---


@pytest.mark.parametrize(("p", "dtype"), list(itertools.product([0.1, 0.5, 0.75], NPU_FLOATS)))
def test_a_mask_drops_its_share(p, dtype):
    numel = 100_001
    mask = draw(numel, p, dtype=dtype)
    assert mask.dtype == torch.uint8
    assert len(mask) == (numel + 127) // 128 * 16
    kept = kept_by(mask, numel).double()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / numel) ** 0.5
    # No bit of a byte and no pair of neighbours differs from the others.
    by_bit = kept[: numel // 8 * 8].view(-1, 8).mean(0)
    assert (by_bit - (1 - p)).abs().max() < 5 * (p * (1 - p) / (numel // 8)) ** 0.5
    both = (kept[1:] * kept[:-1]).mean()
    assert abs(both - (1 - p) ** 2) < 0.01


def test_seed_and_offset_repeat_a_mask():
    first = draw(5000, 0.5, seed=7, offset=4).cpu()
    assert torch.equal(draw(5000, 0.5, seed=7, offset=4).cpu(), first)
    for seed, offset in [(7, 8), (8, 4)]:
        assert (kept_by(draw(5000, 0.5, seed, offset), 5000) ^ kept_by(first, 5000)).sum() > 2000


def test_a_mask_of_the_devices_generator():
    """npu_dropout_gen_mask takes its seed from the device (aclnnDropoutGenMask)."""
    numel, p = 100_001, 0.25
    made = []
    for seed in (3, None, 3):
        if seed is not None:
            torch.npu.manual_seed(seed)
        made.append(torch.ops.npu.npu_dropout_gen_mask([numel], p, dtype=torch.float32, device="npu").cpu())
    assert abs(kept_by(made[0], numel).double().mean() - (1 - p)) < 5 * (p * (1 - p) / numel) ** 0.5
    assert not torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_nothing_and_everything_dropped():
    assert kept_by(draw(300, 0.0), 300).all()
    assert not kept_by(draw(300, 1.0), 300).any()


def test_long_masks_are_drawn_in_parts_that_differ():
    parts = kept_by(draw(3 << 23, 0.5), 3 << 23).view(3, -1)
    assert (parts[0] ^ parts[1]).double().mean() > 0.4
    assert (parts[1] ^ parts[2]).double().mean() > 0.4


# --- npu_dropout ---


@pytest.mark.parametrize("dtype", NPU_FLOATS)
def test_dropout_and_its_gradient(dtype):
    x = random_rows(37, 21, dtype=dtype)
    given = x.npu().requires_grad_()
    torch.npu.manual_seed(5)
    out, mask = torch_npu._npu_dropout(given, 0.25)
    kept = kept_by(mask, x.numel()).view(x.shape)
    assert 0 < kept.sum() < x.numel()
    same(out.detach(), torch.where(kept, x.double() / 0.75, 0), dtype)
    gradient = random_rows(37, 21, dtype=dtype, seed=9)
    out.backward(gradient.npu())
    same(given.grad, torch.where(kept, gradient.double() / 0.75, 0), dtype)
    torch.npu.manual_seed(5)
    assert torch.equal(torch_npu._npu_dropout(given, 0.25)[1].cpu(), mask.cpu())
    assert not torch.equal(torch_npu._npu_dropout(given, 0.25)[1].cpu(), mask.cpu())


def test_dropout_of_everything_gives_zeros():
    out, _ = torch_npu._npu_dropout(torch.full((5, 5), float("nan"), device="npu"), 1.0)
    assert not out.cpu().any()


def test_a_graph_draws_another_mask_at_each_replay():
    """torch_npu then gives the seed and the offset as tensors (aclnnDropoutGenMaskV2Tensor)."""
    x, graph, made = torch.ones(300, device="npu"), torch.npu.NPUGraph(), []
    with torch.npu.graph(graph):
        out, mask = torch_npu._npu_dropout(x, 0.5)
    for seed in (5, None, 5):
        if seed is not None:
            torch.npu.manual_seed(seed)
        graph.replay()
        torch.npu.synchronize()
        assert torch.equal(out.cpu(), torch.where(kept_by(mask, 300), 2.0, 0.0))
        made.append(out.cpu())
    assert not torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


# --- attention ---


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor | float, keep: float):
    """[B, N, S, D] with fewer heads of key and value. `kept` has the shape [B, N, S, S]."""
    group = query.shape[1] // key.shape[1]
    weights = (query @ key.repeat_interleave(group, 1).transpose(-1, -2) * SCALE).softmax(-1)
    return weights * kept / keep @ value.repeat_interleave(group, 1)


@pytest.mark.parametrize("function", [torch_npu.npu_fusion_attention, torch_npu.npu_fusion_attention_v2])
@pytest.mark.parametrize(("layout", "dtype"), [*itertools.product(TO_LAYOUT, [torch.float16]), ("BSH", torch.float32)])
def test_attention_with_dropout(function, layout, dtype):
    """The mask is the one of the same seed, and the gradient draws it again."""
    put, keep = TO_LAYOUT[layout], 0.75
    sizes = [(BATCH, HEADS, QUERIES, WIDTH), (BATCH, 2, 9, WIDTH), (BATCH, 2, 9, WIDTH)]
    plain = [random_rows(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]
    given = [put(x).contiguous().npu().requires_grad_() for x in plain]
    wanted = [x.double().requires_grad_() for x in plain]
    torch.npu.manual_seed(11)
    out, _, _, _, seed, offset, numel = function(*given, HEADS, layout, scale=SCALE, keep_prob=keep)
    assert (seed, numel) == (11, BATCH * HEADS * QUERIES * 9)
    kept = kept_by(draw(numel, 1 - keep, seed, offset, dtype), numel).view(BATCH, HEADS, QUERIES, 9)
    assert 0 < kept.sum() < numel
    expected = put(attended(*wanted, kept, keep))
    same_with_gradients(out, expected, given, wanted, put, dtype)


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
@pytest.mark.parametrize("keep", [1.0, 0.75])
def test_attention_of_joined_sequences(softmax_layout, keep):
    """The mask has one sequence after the other. With softmax_layout="TND" the statistics have the tokens first."""
    queries, keys, dtype = [3, 1, 4], [5, 2, 4], torch.float32
    plain = [
        random_rows(sum(sizes), heads, WIDTH, seed=seed, dtype=dtype)
        for seed, (sizes, heads) in enumerate([(queries, HEADS), (keys, 2), (keys, 2)])
    ]
    given = [x.npu().requires_grad_() for x in plain]
    wanted = [x.double().requires_grad_() for x in plain]
    ends = [torch.tensor(sizes).cumsum(0).tolist() for sizes in (queries, keys)]
    torch.npu.manual_seed(2)
    out, most, total, _, seed, offset, numel = torch_npu.npu_fusion_attention(
        *given,
        HEADS,
        "TND",
        scale=SCALE,
        keep_prob=keep,
        actual_seq_qlen=ends[0],
        actual_seq_kvlen=ends[1],
        softmax_layout=softmax_layout,
    )
    pairs = [HEADS * q * k for q, k in zip(queries, keys, strict=True)]
    kept: list[torch.Tensor | float] = [1.0] * len(pairs)
    if keep < 1:
        assert numel == sum(pairs)
        bits = kept_by(draw(numel, 1 - keep, seed, offset, dtype), numel).split(pairs)
        kept = [each.view(1, HEADS, q, k) for each, q, k in zip(bits, queries, keys, strict=True)]
    heads_first = [
        [x.transpose(0, 1).unsqueeze(0) for x in parts]
        for parts in zip(*(x.split(s) for x, s in zip(wanted, (queries, keys, keys), strict=True)), strict=True)
    ]
    expected = torch.cat(
        [attended(*parts, mask, keep)[0].transpose(0, 1) for parts, mask in zip(heads_first, kept, strict=True)]
    )
    same(out.detach(), expected.detach(), dtype)
    lse = torch.cat(
        [
            (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * SCALE).logsumexp(-1)[0].T.detach()
            for q, k, _ in heads_first
        ]
    )  # [T, N]
    made = (most + total.log()).cpu()
    by_token = made if softmax_layout else made.view(HEADS, sum(queries), 8).transpose(0, 1)
    same(by_token, lse.unsqueeze(-1).expand(-1, -1, 8), dtype)
    gradient = random_rows(*out.shape, dtype=dtype, seed=9)
    out.backward(gradient.npu())
    expected.backward(gradient.double())
    for made_leaf, leaf64 in zip(given, wanted, strict=True):
        same(made_leaf.grad, leaf64.grad, dtype)


def test_attention_with_rotated_parts():
    """query_rope and key_rope are further values of each row, which have a gradient of their own."""
    queries, keys, rope, dtype = [3, 4], [5, 2], 4, torch.float32
    sizes = [
        (sum(queries), HEADS, WIDTH),
        (sum(keys), 2, WIDTH),
        (sum(keys), 2, WIDTH),
        (sum(queries), HEADS, rope),
        (sum(keys), 2, rope),
    ]
    plain = [random_rows(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]
    wanted = [x.double().requires_grad_() for x in plain]
    query, key, value, query_rope, key_rope = (x.npu() for x in plain)
    ends = [torch.tensor(each).cumsum(0).tolist() for each in (queries, keys)]
    lengths = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    ropes = {"query_rope": query_rope, "key_rope": key_rope}
    out, most, total, *_ = torch_npu.npu_fusion_attention_v2(
        query, key, value, HEADS, "TND", scale=SCALE, **ropes, **lengths
    )
    whole_query, whole_key = torch.cat((wanted[0], wanted[3]), -1), torch.cat((wanted[1], wanted[4]), -1)
    parts = zip(whole_query.split(queries), whole_key.split(keys), wanted[2].split(keys), strict=True)
    expected = torch.cat(
        [attended(*(x.transpose(0, 1).unsqueeze(0) for x in each), 1.0, 1.0)[0].transpose(0, 1) for each in parts]
    )
    same(out, expected.detach(), dtype)
    gradient = random_rows(*out.shape, dtype=dtype, seed=9)
    expected.backward(gradient.double())
    dq, dk, dv, _, dq_rope, dk_rope, _ = torch_npu.npu_fusion_attention_grad_v2(
        query,
        key,
        value,
        gradient.npu(),
        HEADS,
        "TND",
        softmax_max=most,
        softmax_sum=total,
        attention_in=out,
        scale_value=SCALE,
        **ropes,
        **lengths,
    )
    for made, leaf64 in zip((dq, dk, dv, dq_rope, dk_rope), wanted, strict=True):
        same(made, leaf64.grad, dtype)


def pass_a_short_mask(rank: int, num_ranks: int) -> None:
    x = torch.ones(1, 2, 16, 8, dtype=torch.float16, device="npu")
    refused(
        "drop_mask has 16 bytes for 512 pairs",
        lambda: torch_npu.npu_fusion_attention(
            x, x, x, 2, "BNSD", keep_prob=0.5, dropout_mask=draw(128, 0.5), seed=3, offset=0
        )[0].cpu(),
    )


def test_a_mask_that_is_too_short_is_refused(run_in_ranks):
    """In a rank: torch_npu's queue takes no more work after an error that comes while an op runs."""
    run_in_ranks(pass_a_short_mask, 1)


def test_a_mask_without_dropout_is_refused():
    x = torch.ones(1, 2, 16, 8, dtype=torch.float16, device="npu")
    refused(
        "keep_prob=1 with a mask of dropout",
        lambda: torch_npu.npu_fusion_attention(x, x, x, 2, "BNSD", dropout_mask=draw(512, 0.5), seed=3, offset=0)[
            0
        ].cpu(),
    )
