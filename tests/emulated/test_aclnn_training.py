"""What training adds: gradients of fused ops, cross entropy, and products with collectives, against float64 on the CPU."""

import itertools
from typing import Any

import pytest
import torch
import torch_npu

from tests.emulated.references import random_rows, refused, small_integers

pytestmark = pytest.mark.emulated

npu = torch.ops.npu
CLOSE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
DTYPES = list(CLOSE)
SCALE = 0.3


def leaf(*shape: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values on the device and, in float64, on the CPU. Both want gradients."""
    values = random_rows(*shape, dtype=dtype, seed=seed)
    return values.npu().requires_grad_(), values.double().requires_grad_()


def same(made: torch.Tensor | None, wanted: torch.Tensor | None, dtype: torch.dtype) -> None:
    assert made is not None
    assert wanted is not None
    torch.testing.assert_close(made.cpu().double(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype] * 4)


def compare(out: torch.Tensor, wanted: torch.Tensor, leaves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Values, and gradients from the same gradient of the output."""
    dtype = out.dtype
    same(out.detach(), wanted.detach(), dtype)
    gradient = random_rows(*out.shape, dtype=dtype, seed=99)
    out.backward(gradient.npu())
    wanted.backward(gradient.double())
    for made, expected in leaves:
        same(made.grad, expected.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    x, x64 = leaf(5, 3, 16, dtype=dtype, seed=1)
    gamma, gamma64 = leaf(16, dtype=dtype, seed=2)
    out = torch_npu.npu_rms_norm(x, gamma, epsilon=1e-5)[0]
    wanted = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * gamma64
    compare(out, wanted, [(x, x64), (gamma, gamma64)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_rms_norm(dtype):
    """Its weights are differences from one."""
    x, x64 = leaf(5, 3, 16, dtype=dtype, seed=1)
    gamma, gamma64 = leaf(16, dtype=dtype, seed=2)
    y, rstd = torch_npu.npu_gemma_rms_norm(x.detach(), gamma.detach(), 1e-5)
    wanted = torch.rsqrt(x64.detach().square().mean(-1, keepdim=True) + 1e-5)
    same(y, x64.detach() * wanted * (1 + gamma64.detach()), dtype)
    same(rstd, wanted, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_in_place(dtype):
    """The first argument becomes the norm, the second one the sum. The other form leaves its arguments."""
    x1, x2 = (random_rows(5, 3, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    gamma = random_rows(16, dtype=dtype, seed=3)
    total = x1.double() + x2.double()
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    wanted = (total * rstd * gamma.double(), total)
    given = x1.npu(), x2.npu()
    made_rstd, *made = torch_npu.npu_add_rms_norm_v2_functional(*given, gamma.npu(), 1e-5)
    assert [torch.equal(x.cpu(), before) for x, before in zip(given, (x1, x2), strict=True)] == [True, True]
    for rstds, results in [(made_rstd, made), (torch_npu.npu_add_rms_norm_v2(*given, gamma.npu(), 1e-5), given)]:
        same(rstds, rstd, torch.float32)
        for result, expected in zip(results, wanted, strict=True):
            same(result, expected, dtype)


@pytest.mark.parametrize(("dtype", "dim"), list(itertools.product(DTYPES, [-1, 0])))
def test_swiglu(dtype, dim):
    x, x64 = leaf(6, 8, dtype=dtype, seed=1)
    gate, up = x64.chunk(2, dim)
    compare(torch_npu.npu_swiglu(x, dim=dim), torch.nn.functional.silu(gate) * up, [(x, x64)])


@pytest.mark.parametrize(("dtype", "mode"), list(itertools.product(DTYPES, ["half", "interleave"])))
def test_rotary_mul(dtype, mode):
    x, x64 = leaf(2, 3, 4, 8, dtype=dtype, seed=1)
    cos, cos64 = leaf(2, 1, 4, 8, dtype=dtype, seed=2)
    sin, sin64 = leaf(2, 1, 4, 8, dtype=dtype, seed=3)
    if mode == "half":
        turned = torch.cat((-x64[..., 4:], x64[..., :4]), -1)
    else:
        turned = torch.stack((-x64[..., 1::2], x64[..., ::2]), -1).flatten(-2)
    out = torch_npu.npu_rotary_mul(x, cos, sin, mode)
    compare(out, x64 * cos64 + turned * sin64, [(x, x64), (cos, cos64), (sin, sin64)])


@pytest.mark.parametrize(("dtype", "approximate"), list(itertools.product(DTYPES, ["none", "tanh"])))
def test_gelu(dtype, approximate):
    x, x64 = leaf(6, 8, dtype=dtype, seed=1)
    compare(
        torch_npu.npu_gelu(x, approximate=approximate),
        torch.nn.functional.gelu(x64, approximate=approximate),
        [(x, x64)],
    )


@pytest.mark.parametrize(("dtype", "approximate"), list(itertools.product(DTYPES, ["none", "tanh"])))
def test_gelu_mul(dtype, approximate):
    x = random_rows(6, 8, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    out = torch_npu.npu_gelu_mul(x.npu(), approximate=approximate)
    same(out, torch.nn.functional.gelu(gate, approximate=approximate) * up, dtype)


@pytest.mark.parametrize(("dtype", "kept"), list(itertools.product(DTYPES, [12, 9])))
def test_token_permute_and_unpermute(dtype, kept):
    """6 tokens of 2 experts; with 9 rows kept, those of the last experts are left out."""
    tokens, tokens64 = leaf(6, 8, dtype=dtype, seed=1)
    probs, probs64 = leaf(6, 2, dtype=dtype, seed=2)
    ids = torch.tensor([[3, 1], [0, 2], [2, 3], [1, 0], [0, 3], [2, 1]])
    rows, places = torch_npu.npu_moe_token_permute(tokens, ids.npu(), num_out_tokens=kept)
    order = ids.flatten().sort(stable=True).indices[:kept]
    rows64 = tokens64[order // 2]
    same(rows.detach(), rows64.detach(), dtype)
    out = torch_npu.npu_moe_token_unpermute(rows * rows, places, probs=probs)
    wanted = torch.zeros(6, 8, dtype=torch.float64).index_add(
        0, order // 2, rows64 * rows64 * probs64.flatten()[order].unsqueeze(1)
    )
    compare(out, wanted, [(tokens, tokens64), (probs, probs64)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("reduction", "weighted", "ignored"), [("mean", False, -100), ("sum", True, 2), ("none", True, -100)]
)
def test_cross_entropy_loss(dtype, reduction, weighted, ignored):
    x, x64 = leaf(5, 7, dtype=dtype, seed=1)
    target = torch.tensor([2, 0, 6, 2, 3])
    weight = torch.rand(7, generator=torch.Generator().manual_seed(1)) if weighted else None
    loss, log_prob, *_ = torch_npu.npu_cross_entropy_loss(
        x, target.npu(), None if weight is None else weight.npu(), reduction, ignored
    )
    same(log_prob.detach(), x64.detach().log_softmax(1), dtype)
    wanted = torch.nn.functional.cross_entropy(
        x64, target, None if weight is None else weight.double(), reduction=reduction, ignore_index=ignored
    )
    compare(loss, wanted.reshape(loss.shape), [(x, x64)])


# --- attention ---

BATCH, HEADS, QUERIES, WIDTH = 2, 4, 6, 8
TO_LAYOUT = {  # from [B, N, S, D]
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2),
    "BSH": lambda x: x.transpose(1, 2).flatten(2),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
}
COMPRESSED_MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """[B, N, S, D] with fewer heads of key and value; hidden pairs [S, S]."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * SCALE
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(group, 1)


def hidden_pairs(mode: str, queries: int, keys: int) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Arguments of the call, and the pairs that they hide."""
    query, key = torch.arange(queries).unsqueeze(1), torch.arange(keys)
    right = keys - queries
    if mode == "none":
        return {}, None
    if mode == "mask":
        hidden = (query + 2 * key) % 5 == 3
        return {"atten_mask": hidden.npu(), "sparse_mode": 1}, hidden
    if mode == "default with a range":
        hidden = (key > query + 1) | (key < query - 2)
        return {"atten_mask": hidden.npu(), "sparse_mode": 0, "pre_tockens": 2, "next_tockens": 1}, hidden
    compressed = COMPRESSED_MASK.npu()
    if mode == "left up":
        return {"atten_mask": compressed, "sparse_mode": 2}, key > query
    if mode == "right down":
        return {"atten_mask": compressed, "sparse_mode": 3}, key > query + right
    hidden = (key > query + right) | (key < query + right - 3)
    return {"atten_mask": compressed, "sparse_mode": 4, "pre_tockens": 3, "next_tockens": 0}, hidden


MODES = ["none", "mask", "default with a range", "left up", "right down", "band"]


def same_with_gradients(out, expected, given, wanted, put, dtype):
    """Compare an output with its float64 twin, and the gradients of the inputs. put: from the twin's layout to the op's."""
    same(out.detach(), expected.detach(), dtype)
    gradient = random_rows(*out.shape, dtype=dtype, seed=9)
    out.backward(gradient.npu())
    expected.backward(gradient.double())
    for made, leaf64 in zip(given, wanted, strict=True):
        assert leaf64.grad is not None
        same(made.grad, put(leaf64.grad), dtype)


@pytest.mark.parametrize(
    ("layout", "mode", "kv_heads", "keys", "dtype"),
    [
        *itertools.product(TO_LAYOUT, ["none"], [4], [6], [torch.float16]),
        *itertools.product(["BNSD", "BSH"], MODES, [2], [6, 9], [torch.float32]),
        ("SBH", "right down", 1, 9, torch.bfloat16),
    ],
)
def test_fusion_attention(layout, mode, kv_heads, keys, dtype):
    put = TO_LAYOUT[layout]
    sizes = [(BATCH, HEADS, QUERIES, WIDTH), (BATCH, kv_heads, keys, WIDTH), (BATCH, kv_heads, keys, WIDTH)]
    plain = [random_rows(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]
    given = [put(x).contiguous().npu().requires_grad_() for x in plain]
    wanted = [x.double().requires_grad_() for x in plain]
    arguments, hidden = hidden_pairs(mode, QUERIES, keys)
    out = torch_npu.npu_fusion_attention(*given, HEADS, layout, scale=SCALE, **arguments)[0]
    expected = put(attended(*wanted, hidden))
    same_with_gradients(out, expected, given, wanted, put, dtype)


@pytest.mark.parametrize("mode", ["none", "left up", "right down"])
def test_fusion_attention_of_joined_sequences(mode):
    """Sequences of 3, 0 and 4 queries with 5, 2 and 4 keys; a last one takes no part."""
    queries, keys = [3, 0, 4], [5, 2, 4]
    query, key, value = (
        random_rows(sum(sizes), heads, WIDTH, seed=seed)
        for seed, (sizes, heads) in enumerate([(queries, HEADS), (keys, 2), (keys, 2)])
    )
    given = [x.npu().requires_grad_() for x in (query, key, value)]
    wanted = [x.double().requires_grad_() for x in (query, key, value)]
    arguments, _ = hidden_pairs(mode, 1, 1)
    ends = [[*torch.tensor(sizes).cumsum(0).tolist(), 0] for sizes in (queries, keys)]
    out, most, total, *_ = torch_npu.npu_fusion_attention(
        *given, HEADS, "TND", scale=SCALE, actual_seq_qlen=ends[0], actual_seq_kvlen=ends[1], **arguments
    )
    parts = []
    for q, k, v in zip(*(x.split(s) for x, s in zip(wanted, (queries, keys, keys), strict=True)), strict=True):
        hidden = hidden_pairs(mode, len(q), len(k))[1]
        parts.append(attended(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), hidden)[0].transpose(0, 1))
    expected = torch.cat(parts)
    compare(out, expected, list(zip(given, wanted, strict=True)))
    # The statistics: in memory, the heads come first.
    if mode == "none":
        q, k = wanted[0][:3, 1], wanted[1][:5, 0]
        lse = (q @ k.T * SCALE).logsumexp(-1).detach()
        made = (most + total.log()).cpu().view(HEADS, sum(queries), 8)[1, :3, 0]
        same(made, lse, torch.float32)


def test_fusion_attention_refuses_what_it_does_not_compute():
    x = torch.ones(1, 1, 4, 8, dtype=torch.float16, device="npu")
    mask = torch.zeros(4, 4, dtype=torch.bool, device="npu")
    pse = torch.ones(1, 1, 4, 4, dtype=torch.float16, device="npu")
    refused("pse is given", lambda: torch_npu.npu_fusion_attention(x, x, x, 1, "BNSD", pse=pse)[0].cpu())
    refused(
        "prefix is not emulated",
        lambda: torch_npu.npu_fusion_attention(x, x, x, 1, "BNSD", atten_mask=mask, prefix=[1], sparse_mode=5)[0].cpu(),
    )


WRONG_MASKS = {  # sparse_mode, rows and columns of the mask of zeros: the text
    (0, 4): "pre_tockens=0.*hide; the document forbids it",
    (2, 2048): "atten_mask of sparse_mode=2 must be ones above the diagonal",
    (3, 2048): "atten_mask of sparse_mode=3 must be ones above the diagonal",
    (4, 2048): "atten_mask of sparse_mode=4 must be ones above the diagonal",
}


def pass_a_wrong_mask(rank: int, num_ranks: int, sparse_mode: int, size: int, text: str) -> None:
    x = torch.ones(1, 1, 4, 8, dtype=torch.float16, device="npu")
    mask = torch.zeros(size, size, dtype=torch.bool, device="npu")
    refused(
        text,
        lambda: torch_npu.npu_fusion_attention(
            x, x, x, 1, "BNSD", atten_mask=mask, sparse_mode=sparse_mode, pre_tockens=0, next_tockens=0
        )[0].cpu(),
    )


@pytest.mark.parametrize(("mode", "size"), WRONG_MASKS)
def test_a_mask_that_its_mode_does_not_allow_is_refused(run_in_ranks, mode, size):
    """In a rank: torch_npu's queue takes no more work after an error that comes while an op runs."""
    run_in_ranks(pass_a_wrong_mask, 1, mode, size, WRONG_MASKS[mode, size])


# --- products with collectives ---


def multiply_with_collectives(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    group = torch.distributed.group.WORLD
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)  # type: ignore[union-attr]
    x1, x2, bias, x3 = (x.half().npu() for x in inputs_of(rank))
    made = {
        "all_reduce": torch_npu.npu_mm_all_reduce_base(x1, x2, name, bias=bias),
        "all_reduce of three dimensions": torch_npu.npu_mm_all_reduce_base(
            x1.unsqueeze(1), x2, name, x3=x3.unsqueeze(1)
        ),
        "reduce_scatter": torch_npu.npu_mm_reduce_scatter_base(x1, x2, name, num_ranks),
    }
    made["all_gather"], made["gathered"] = torch_npu.npu_all_gather_base_mm(x1, x2, name, num_ranks)
    scale = torch.full((x2.shape[1],), 0.5, device="npu")
    packed = torch_npu.npu_trans_quant_param(scale)
    x1, x2 = (x.char() for x in (x1, x2))
    made["int8"] = torch_npu.npu_mm_all_reduce_base(x1, x2, name, bias=bias.int(), dequant_scale=packed)
    rows = torch.arange(1.0, 5.0, device="npu")
    made["int8 with scales of rows"] = torch_npu.npu_mm_all_reduce_base(
        x1, x2, name, dequant_scale=scale, pertoken_scale=rows
    )
    return {key: value.cpu() for key, value in made.items()}


def inputs_of(rank: int) -> list[torch.Tensor]:
    """[4, 256] times [256, 5], with integers whose sums are exact in float16."""
    sizes = [(4, 256), (256, 5), (5,), (4, 5)]
    return [small_integers(*size, seed=10 * rank + i) for i, size in enumerate(sizes)]


def test_products_with_collectives(run_in_ranks):
    ranks = 4
    returned = run_in_ranks(multiply_with_collectives, ranks, soc="A2").returned
    x1, x2, bias, x3 = ([inputs_of(rank)[i].double() for rank in range(ranks)] for i in range(4))
    products = [a @ b for a, b in zip(x1, x2, strict=True)]
    total, total_bias = sum(products), sum(bias)
    wanted = {
        "all_reduce": total + total_bias,
        "all_reduce of three dimensions": (total + sum(x3)).unsqueeze(1),
        "int8": (total + total_bias) * 0.5,
        "int8 with scales of rows": total * 0.5 * torch.arange(1.0, 5.0).double().unsqueeze(1),
    }
    for rank, made in enumerate(returned):
        gathered = torch.cat(x1)
        expected = wanted | {
            "reduce_scatter": total[rank : rank + 1],
            "gathered": gathered,
            "all_gather": gathered @ x2[rank],
        }
        assert made.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(made[key].double(), value), (rank, key)


def refuse_products(rank: int, num_ranks: int) -> list[str]:
    name = torch.distributed.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(rank)  # type: ignore[union-attr]
    x1, x2 = torch.ones(4, 256, device="npu").half(), torch.ones(256, 2, device="npu").half()
    calls = [
        lambda: torch_npu.npu_mm_all_reduce_base(x1, x2, name, reduce_op="max"),
        lambda: torch_npu.npu_mm_reduce_scatter_base(x1[:, :8].contiguous(), x2[:8], name, num_ranks),
        lambda: torch_npu.npu_mm_all_reduce_base(x1, x2, "no group"),
    ]
    texts = []
    for call in calls:
        with pytest.raises(RuntimeError) as raised:
            call()
        texts.append(str(raised.value))
    return texts


def test_products_that_a_chip_lacks_are_refused(run_in_ranks):
    [[op, inner, group], _] = run_in_ranks(refuse_products, 2, soc="A2").returned
    assert "reduce_op=max is not emulated" in op
    assert "x1 has rows of 8; they must have 256 to 65534 values" in inner
    assert "hcom no group names no HCCL communicator" in group
    [[on_a3, *_], _] = run_in_ranks(refuse_products, 2, soc="A3").returned
    assert "Ascend910_9391 has no npu_mm_all_reduce_base; Ascend910B has it" in on_a3
