"""Attention, its norms and rotations, and ATB's operators, through op-plugin's own C++, against plain torch."""

from typing import Any

import pytest
import torch
import torch_npu
from torch_npu.op_plugin.atb import _atb_ops  # noqa: F401  # defines torch_npu._npu_*

from tests.emulated.references import is_undefined, random_rows

pytestmark = pytest.mark.emulated

npu = torch.ops.npu
atb = torch.ops.atb

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, ROPE = 4, 2, 16, 8, 6
BLOCK, BLOCKS = 4, 16
SCALE = 0.3
CAUSAL_MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
QUERY_SIZES, KV_SIZES = [3, 1, 0, 5], [3, 9, 2, 7]  # new tokens; all tokens: a prefill, a decode, nothing, a chunk
CLOSE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [n, N, D], key [m, KN, D], value [m, KN, Dv] -> [n, N, Dv] and the log-sum-exp [n, N], head by head."""
    out = torch.zeros(len(query), query.shape[1], value.shape[-1])
    lse = torch.zeros(query.shape[:2])
    for head in range(query.shape[1]):
        kv_head = head // (query.shape[1] // key.shape[1])
        for row in range(len(query)):
            seen = len(key) - len(query) + row + 1 if causal else len(key)
            scores = key[:seen, kv_head].double() @ query[row, head].double() * SCALE
            out[row, head] = (torch.softmax(scores, 0) @ value[:seen, kv_head].double()).float()
            lse[row, head] = torch.logsumexp(scores, 0)
    return out, lse


def paged(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[blocks, BLOCK, ...] with NaN where nothing is, and the block table: blocks in a shuffled order."""
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    cache = torch.full((BLOCKS, BLOCK, *sequences[0].shape[1:]), torch.nan, dtype=sequences[0].dtype)
    table = torch.zeros(len(sequences), 4, dtype=torch.int32)
    for row, sequence in enumerate(sequences):
        for column in range(-(-len(sequence) // BLOCK)):
            block = order.pop()
            table[row, column] = block
            part = sequence[column * BLOCK : (column + 1) * BLOCK]
            cache[block, : len(part)] = part
    return cache, table


def sequences(sizes: list[int], heads: int, width: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    return [random_rows(size, heads, width, dtype=dtype, seed=seed + i) for i, size in enumerate(sizes)]


def running_sums(sizes: list[int]) -> list[int]:
    return torch.tensor(sizes).cumsum(0).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_paged", [False, True])
def test_attention_of_joined_sequences(dtype: torch.dtype, is_paged: bool) -> None:
    query = sequences(QUERY_SIZES, HEADS, WIDTH, dtype, 10)
    key = sequences(KV_SIZES, KV_HEADS, WIDTH, dtype, 20)
    value = sequences(KV_SIZES, KV_HEADS, WIDTH, dtype, 30)
    if is_paged:
        keys, table = paged(key)
        values, _ = paged(value)
        source = {"block_table": table.npu(), "block_size": BLOCK, "actual_seq_lengths_kv": KV_SIZES}
        keys, values = keys.flatten(2), values.flatten(2)
    else:
        keys, values = torch.cat(key), torch.cat(value)
        source = {"actual_seq_lengths_kv": running_sums(KV_SIZES)}
    padding = random_rows(2, HEADS, WIDTH, dtype=dtype)
    out, lse = npu.npu_fused_infer_attention_score(
        torch.cat([*query, padding]).npu(),
        keys.npu(),
        values.npu(),
        atten_mask=CAUSAL_MASK.npu(),
        actual_seq_lengths=running_sums(QUERY_SIZES),
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        scale=SCALE,
        input_layout="TND",
        sparse_mode=3,
        softmax_lse_flag=True,
        **source,
    )
    wanted = [dense(*each, causal=True) for each in zip(query, key, value, strict=True)]
    total = sum(QUERY_SIZES)
    torch.testing.assert_close(
        out[:total].cpu().float(), torch.cat([each[0] for each in wanted]), rtol=CLOSE[dtype], atol=CLOSE[dtype]
    )
    torch.testing.assert_close(lse[:total].cpu(), torch.cat([each[1] for each in wanted]).unsqueeze(-1))
    assert is_undefined(out[total:])


def test_attention_with_rotated_parts_over_a_cache_of_latents() -> None:
    """As DeepSeek's models decode: one key head whose values are the keys, rotated parts apart, output by heads."""
    sizes, dtype = [3, 9, 1], torch.bfloat16
    query = random_rows(3, HEADS, 1, WIDTH, dtype=dtype, seed=1)
    query_rope = random_rows(3, HEADS, 1, ROPE, dtype=dtype, seed=2)
    latents = sequences(sizes, 1, WIDTH, dtype, 40)
    ropes = sequences(sizes, 1, ROPE, dtype, 50)
    cache, table = paged(latents)
    rope_cache, _ = paged(ropes)
    cache, rope_cache = cache.transpose(1, 2).contiguous().npu(), rope_cache.transpose(1, 2).contiguous().npu()
    out, _ = npu.npu_fused_infer_attention_score_v2(
        query.npu(),
        cache,
        cache,
        query_rope=query_rope.npu(),
        key_rope=rope_cache,
        num_query_heads=HEADS,
        num_key_value_heads=1,
        input_layout="BNSD_NBSD",
        softmax_scale=SCALE,
        block_table=table.npu(),
        block_size=BLOCK,
        actual_seq_kvlen=sizes,
    )
    assert out.shape == (HEADS, 3, 1, WIDTH)
    for i, (latent, rope) in enumerate(zip(latents, ropes, strict=True)):
        whole = torch.cat([query[i], query_rope[i]], -1).transpose(0, 1)
        wanted, _ = dense(whole, torch.cat([latent, rope], -1), latent, causal=False)
        torch.testing.assert_close(out[:, i].cpu().float().transpose(0, 1), wanted, rtol=2e-2, atol=2e-2)


def attention(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "query": random_rows(3, HEADS, WIDTH, dtype=torch.float16),
        "key": random_rows(3, HEADS, WIDTH, dtype=torch.float16),
        "value": random_rows(3, HEADS, WIDTH, dtype=torch.float16),
        "actual_seq_lengths": [3],
        "actual_seq_lengths_kv": [3],
        "num_heads": HEADS,
        "input_layout": "TND",
    } | changes
    return npu.npu_fused_infer_attention_score(
        **{name: each.npu() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_mode": 4}, "sparse_mode=4 is not emulated"),
        ({"sparse_mode": 3}, "atten_mask is missing"),
        ({"atten_mask": CAUSAL_MASK}, "emulated without a mask"),
        ({"pse_shift": torch.zeros(1, HEADS, 3, 3)}, "pse_shift is given"),
        ({"key_antiquant_scale": torch.ones(1)}, "key_antiquant_scale is given"),
        ({"quant_scale1": torch.ones(1)}, "quant_scale1 is given"),
        ({"query_padding_size": torch.ones(1, dtype=torch.int64)}, "query_padding_size is given"),
        ({"actual_seq_lengths": [4]}, "ends at 4 and query has 3"),
        ({"actual_seq_lengths": [3, 2], "actual_seq_lengths_kv": [3, 3]}, "actual_seq_lengths falls"),
        ({"query_rope": torch.ones(3, HEADS, 2, dtype=torch.float16)}, "go together"),
        ({name: random_rows(3, HEADS, WIDTH) for name in ("query", "key", "value")}, "query is Float"),
    ],
)
def test_attention_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attention(**changes)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_attention_in_a_workspace_for_the_longest_sequence(version: str) -> None:
    query = random_rows(2, HEADS, 1, WIDTH, dtype=torch.float16, seed=1).npu()
    key, value = (random_rows(2, KV_HEADS, 9, WIDTH, dtype=torch.float16, seed=seed).npu() for seed in (2, 3))
    names = (
        ("num_query_heads", "softmax_scale", "actual_seq_kvlen")
        if version
        else ("num_heads", "scale", "actual_seq_lengths_kv")
    )
    arguments = {
        "input_layout": "BNSD",
        "num_key_value_heads": KV_HEADS,
        **dict(zip(names, (HEADS, SCALE, [4, 9]), strict=True)),
    }
    function = getattr(torch_npu, f"npu_fused_infer_attention_score{version}")
    expected, lse = function(query, key, value, **arguments)
    workspace = getattr(torch_npu, f"_npu_fused_infer_attention_score{version}_get_max_workspace")(
        query, key, value, **arguments
    )
    out = torch.empty_like(expected)
    function.out(query, key, value, workspace=workspace, **arguments, out=[out, torch.empty_like(lse)])
    assert torch.equal(out.cpu(), expected.cpu())
    with pytest.raises(RuntimeError, match="sparse_mode"):
        getattr(torch_npu, f"_npu_fused_infer_attention_score{version}_get_max_workspace")(
            query, key, value, **{**arguments, "sparse_mode": 1}
        )


def test_merging_partial_attention_gives_the_whole() -> None:
    rows, keys = 6, 10
    query, key, value = (random_rows(n, 1, WIDTH, seed=n + i) for i, n in enumerate((rows, keys, keys)))
    parts = [dense(query, key[span], value[span], causal=False) for span in (slice(0, 3), slice(3, 10))]
    out, lse = npu.npu_attention_update(
        [each[1].flatten().npu() for each in parts], [each[0].flatten(1).npu() for each in parts], 1
    )
    wanted, wanted_lse = dense(query, key, value, causal=False)
    torch.testing.assert_close(out.cpu(), wanted.flatten(1))
    torch.testing.assert_close(lse.cpu(), wanted_lse.flatten())


# --- Norms and rotations ---


def normed(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), gamma.shape, gamma.float(), epsilon)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """Each pair of numbers as a complex number, turned. The pair is (i, i + half) or (2i, 2i + 1); cos, sin are of halves."""
    x = x.double()
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    if neighbours:
        return torch.view_as_real(turned).flatten(-2).float()
    return torch.cat([turned.real, turned.imag], -1).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norms(dtype: torch.dtype) -> None:
    x, other = (random_rows(5, 2, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    gamma = random_rows(32, dtype=dtype, seed=3)
    y, rstd = npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-6)
    torch.testing.assert_close(y.cpu().float(), normed(x, gamma), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(rstd.cpu(), (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt())
    y, _, total = npu.npu_add_rms_norm(x.npu(), other.npu(), gamma.npu(), 1e-6)
    torch.testing.assert_close(total.cpu(), (x.float() + other.float()).to(dtype))
    torch.testing.assert_close(
        y.cpu().float(), normed(x.float() + other.float(), gamma), rtol=CLOSE[dtype], atol=CLOSE[dtype]
    )


def test_rotations() -> None:
    x = random_rows(3, 2, 1, 8)
    angles = random_rows(3, 1, 1, 4, seed=2)
    cos, sin = angles.cos(), angles.sin()
    twice = [torch.cat([each, each], -1).npu() for each in (cos, sin)]
    torch.testing.assert_close(npu.npu_rotary_mul(x.npu(), *twice).cpu(), rotated(x, cos, sin, neighbours=False))
    pairs = [each.repeat_interleave(2, -1).npu() for each in (cos, sin)]
    torch.testing.assert_close(
        npu.npu_rotary_mul(x.npu(), *pairs, "interleave").cpu(), rotated(x, cos, sin, neighbours=True)
    )
    # interleave_rope turns neighbours and leaves them apart: first all the first ones, then all the second.
    wanted = rotated(x, cos, sin, neighbours=True)
    torch.testing.assert_close(
        npu.npu_interleave_rope(x.npu(), *twice).cpu(), torch.cat([wanted[..., 0::2], wanted[..., 1::2]], -1)
    )


@pytest.mark.parametrize(
    ("layout", "mode", "shape"),
    [
        ("BSND", "half", (2, 3, 1, 8)),
        ("BNSD", "interleave", (2, 1, 3, 8)),
        ("SBND", "half", (3, 2, 1, 8)),
        ("TND", "interleave", (6, 1, 8)),
    ],
)
def test_queries_and_keys_are_rotated_in_place(layout: str, mode: str, shape: tuple[int, ...]) -> None:
    """cos and sin have one head, query four and key two."""
    head = shape.index(1)
    angles = random_rows(*shape[:-1], 4, seed=3)
    cos, sin = angles.cos(), angles.sin()
    both = [random_rows(*shape[:head], heads, *shape[head + 1 :], seed=heads) for heads in (4, 2)]
    twice = torch.cat if mode == "half" else lambda parts, dim: torch.stack(parts, dim).flatten(dim - 1)
    made = [x.npu() for x in both]
    returned = npu.npu_apply_rotary_pos_emb(
        *made, twice((cos, cos), -1).npu(), twice((sin, sin), -1).npu(), layout, mode
    )
    for x, inside, out in zip(both, made, returned, strict=True):
        torch.testing.assert_close(inside.cpu(), rotated(x, cos, sin, neighbours=mode != "half"))
        assert torch.equal(inside, out)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("rotary", [32, 64])
def test_rotations_by_a_table_turn_the_first_elements_of_each_head(neighbours, rotary):
    tokens, head_size = 6, 64
    positions = torch.tensor([5, 0, 3, 3, 8, 1])
    query, key = (random_rows(tokens, heads * head_size, seed=heads) for heads in (4, 2))
    angles = random_rows(9, rotary // 2, seed=5)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    got = npu.npu_mrope(
        positions.npu(), query.npu(), key.npu(), table.npu(), head_size,
        mrope_section=[0, 0, 0], rotary_mode="interleave" if neighbours else "half",
    )  # fmt: skip
    for given, out in zip((query, key), got, strict=True):
        heads = given.view(tokens, -1, head_size).clone()
        heads[..., :rotary] = rotated(
            heads[..., :rotary], angles.cos()[positions, None], angles.sin()[positions, None], neighbours=neighbours
        )
        torch.testing.assert_close(out.cpu(), heads.view(tokens, -1))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"positions": torch.tensor([[0], [0], [0]])}, "mrope mode"),
        ({"table": torch.ones(9, 24)}, "multiples of 16"),
        ({"query": torch.ones(1, 65)}, "rows of whole heads of 64"),
        ({"key": torch.ones(1, 64, dtype=torch.float16)}, "keyIn is Half"),
    ],
)
def test_rotations_by_a_table_refuse(changed, reason):
    given = {"positions": torch.tensor([1]), "query": torch.ones(1, 64), "key": torch.ones(1, 64)}
    given |= {"table": torch.ones(9, 32)} | changed
    tensors = [given[name].npu() for name in ("positions", "query", "key", "table")]
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_mrope(*tensors, 64)[0].cpu()


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_keys_and_values_are_written_to_their_slots(slot_dtype):
    key, value = (random_rows(4, KV_HEADS, WIDTH, seed=seed) for seed in (1, 2))
    caches = [torch.full((BLOCKS, BLOCK, KV_HEADS, WIDTH), torch.nan, device="npu") for _ in range(2)]
    slots = torch.tensor([9, -1, 0, BLOCKS * BLOCK - 1], dtype=slot_dtype)
    npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), *caches, slots.npu(), cache_mode="Norm")
    for rows, cache in zip((key, value), caches, strict=True):
        flat = cache.cpu().flatten(0, 1)
        used = [token for token, slot in enumerate(slots.tolist()) if slot >= 0]
        assert torch.equal(flat[slots[used].long()], rows[used])
        assert int(flat.isnan().sum()) == flat.numel() - rows[used].numel()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"cache_mode": "PA_NZ"}, "cache_mode 'PA_NZ' is not emulated"),
        ({"key": torch.ones(1, KV_HEADS, WIDTH + 1)}, "key has the shape"),
    ],
)
def test_a_write_to_slots_refuses(changed, reason):
    rows = torch.ones(1, KV_HEADS, WIDTH)
    given = {"key": rows, "slots": torch.tensor([0]), "cache_mode": "Norm"} | changed
    cache = torch.zeros(BLOCKS, BLOCK, KV_HEADS, WIDTH, device="npu")
    tensors = given["key"].npu(), rows.npu(), cache, cache.clone(), given["slots"].npu()
    with pytest.raises(RuntimeError, match=reason):
        npu.npu_scatter_pa_kv_cache(*tensors, cache_mode=given["cache_mode"])


def use_rows_that_are_not_there(rank: int, size: int) -> list[str]:
    rows, cache = torch.ones(1, 1, 8).npu(), torch.zeros(2, 4, 1, 8).npu()
    head, table, beyond = torch.ones(1, 64).npu(), torch.ones(8, 32).npu(), torch.tensor([8]).npu()
    errors = []
    for call in (
        lambda: npu.npu_mrope(beyond, head, head, table, 64),
        lambda: npu.npu_scatter_pa_kv_cache(rows, rows, cache, cache.clone(), beyond, cache_mode="Norm"),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        errors.append(str(error.value))
    return errors


def test_positions_and_slots_beyond_the_last_are_refused(run_in_ranks):
    # Without torch_npu's queue, which drops all work after an error.
    [errors] = run_in_ranks(use_rows_that_are_not_there, 1, env={"TASK_QUEUE_ENABLE": "0"}).returned
    assert "positions must lie in 0 to 7" in errors[0]
    assert "slotMapping must lie below 8" in errors[1]


def test_latents_are_normed_rotated_and_cached() -> None:
    tokens, latent, rope = 5, 12, 8
    kv = random_rows(tokens, 1, 1, latent + rope)
    gamma = random_rows(latent, seed=2)
    angles = random_rows(tokens, 1, 1, rope // 2, seed=3)
    twice = [torch.cat([each, each], -1).npu() for each in (angles.cos(), angles.sin())]
    slots = torch.tensor([6, 1, -1, 11, 0])
    k_cache = torch.full((3, BLOCK, 1, rope), 7.0).npu()
    ckv_cache = torch.full((3, BLOCK, 1, latent), 7.0).npu()
    _, _, k_rope, c_kv = npu.npu_kv_rmsnorm_rope_cache(
        kv.npu(), gamma.npu(), *twice, slots.npu(), k_cache, ckv_cache, epsilon=1e-6, cache_mode="PA", is_output_kv=True
    )
    turned = rotated(kv[..., latent:], angles.cos(), angles.sin(), neighbours=True)
    wanted_rope = torch.cat([turned[..., 0::2], turned[..., 1::2]], -1)
    wanted_latent = normed(kv[..., :latent], gamma)
    torch.testing.assert_close(k_rope.cpu(), wanted_rope)
    torch.testing.assert_close(c_kv.cpu(), wanted_latent)
    for cache, wanted in ((k_cache, wanted_rope), (ckv_cache, wanted_latent)):
        rows = torch.full((3 * BLOCK, wanted.shape[-1]), 7.0)
        rows[slots[slots >= 0]] = wanted.flatten(0, 2)[slots >= 0]
        torch.testing.assert_close(cache.cpu().flatten(0, 2), rows)
    with pytest.raises(RuntimeError, match="cache_mode=Norm is not emulated"):
        npu.npu_kv_rmsnorm_rope_cache(kv.npu(), gamma.npu(), *twice, slots.npu(), k_cache, ckv_cache)


def test_batched_product_with_permuted_output() -> None:
    x, weight = random_rows(4, 3, 8, dtype=torch.float16), random_rows(4, 8, 5, dtype=torch.float16, seed=2)
    out = npu.npu_transpose_batchmatmul(x.npu(), weight.npu(), perm_y=(1, 0, 2))
    torch.testing.assert_close(out.cpu(), (x.float() @ weight.float()).transpose(0, 1).half(), rtol=2e-3, atol=2e-3)
    with pytest.raises(RuntimeError, match="batch_split_factor=2 is not emulated"):
        npu.npu_transpose_batchmatmul(x.npu(), weight.npu(), batch_split_factor=2)


# --- ATB ---


def test_tokens_are_cached_and_attended() -> None:
    """The cache is filled by ATB and read by ATB's paged attention, one token a sequence."""
    sizes, dtype = [5, 1, 8], torch.float16
    key, value = sequences(sizes, KV_HEADS, WIDTH, dtype, 1), sequences(sizes, KV_HEADS, WIDTH, dtype, 9)
    wanted_cache, table = paged(key)
    caches = [torch.full_like(wanted_cache, torch.nan).npu() for _ in range(2)]
    slots = [int(table[row, i // BLOCK]) * BLOCK + i % BLOCK for row, size in enumerate(sizes) for i in range(size)]
    skipped = random_rows(1, KV_HEADS, WIDTH, dtype=dtype)
    atb._npu_reshape_and_cache(
        torch.cat([*key, skipped]).npu(),
        torch.cat([*value, skipped]).npu(),
        *caches,
        torch.tensor([*slots, -1], dtype=torch.int32).npu(),
    )
    torch.testing.assert_close(caches[0].cpu(), wanted_cache, equal_nan=True)
    query = random_rows(len(sizes), HEADS, WIDTH, dtype=dtype, seed=5)
    out = torch.empty_like(query).npu()
    atb._npu_paged_attention(
        query.npu(), *caches, KV_HEADS, HEADS, SCALE, table.npu(), torch.tensor(sizes, dtype=torch.int32), out
    )
    for row in range(len(sizes)):
        wanted, _ = dense(query[row : row + 1], key[row], value[row], causal=False)
        torch.testing.assert_close(out[row].cpu().float(), wanted[0], rtol=2e-3, atol=2e-3)


def test_positions_are_rotated_in_place_and_products_added() -> None:
    positions, width = torch.tensor([0, 3, 7]), 8
    angles = random_rows(16, width // 2)
    query, key = random_rows(3, 4 * width), random_rows(3, 2 * width, seed=2)
    device_query, device_key = query.npu(), key.npu()
    atb._npu_rotary_embedding(
        positions.npu(), device_query, device_key, width, torch.cat([angles.cos(), angles.sin()], -1).npu(), True
    )
    cos, sin = angles[positions].cos().unsqueeze(1), angles[positions].sin().unsqueeze(1)
    for before, after in ((query, device_query), (key, device_key)):
        wanted = rotated(before.view(3, -1, width), cos, sin, neighbours=False)
        torch.testing.assert_close(after.cpu(), wanted.view_as(before))
    x, weight, total = random_rows(6, 3), random_rows(6, 4, seed=2), random_rows(3, 4, seed=3)
    device_total = total.npu()
    atb._npu_matmul_add_fp32(x.npu(), weight.npu(), device_total)
    torch.testing.assert_close(device_total.cpu(), total + x.T @ weight)


def test_rows_of_a_paged_cache_are_joined() -> None:
    """As chunked prefill of latent attention reads its context: from the block of each sequence's start."""
    sizes, starts = [6, 0, 3], [BLOCK, 0, 2 * BLOCK + 1]
    caches = [random_rows(8, BLOCK, 1, width, dtype=torch.float16, seed=width) for width in (8, 4)]
    table = torch.tensor([[7, 2, 5], [0, 0, 0], [1, 3, 6]], dtype=torch.int32)
    rows = [(table[0, 1 + i // BLOCK], i % BLOCK) for i in range(6)] + [(table[2, 2], i) for i in range(3)]
    lengths, begin = (torch.tensor(each, dtype=torch.int32).npu() for each in (sizes, starts))
    key, value = torch_npu.atb.npu_paged_cache_load(
        *(cache.npu() for cache in caches), table.npu(), lengths, seq_starts=begin
    )
    again = [torch.empty_like(each) for each in (key, value)]
    for _ in range(2):  # the second call gets the operation of the first one
        torch_npu.atb.npu_paged_cache_load(
            *(cache.npu() for cache in caches), table.npu(), lengths, seq_starts=begin, key=again[0], value=again[1]
        )
    for cumulative in (False, True):
        gathered = [torch.full_like(each, float("nan")) for each in (key, value)]
        sums = torch.tensor([0, 6, 6, 9], dtype=torch.int32).npu()
        torch_npu.npu_gather_pa_kv_cache(
            *(cache.npu() for cache in caches),
            table.npu(),
            sums if cumulative else lengths,
            *gathered,
            seq_offset=begin,
            is_seq_lens_cumsum=cumulative,
        )
        again += gathered
    for i, cache in enumerate(caches):
        wanted = torch.stack([cache[block, row] for block, row in rows])
        for loaded in ((key, value)[i], *again[i::2]):
            torch.testing.assert_close(loaded.cpu(), wanted, rtol=0, atol=0)


def refused_while_running(rank: int, num_ranks: int) -> None:
    """What lies in tensors is seen when an op runs, and ATB is called then: with torch_npu's queue, too late to raise."""
    half = {"dtype": torch.float16, "device": "npu"}
    with pytest.raises(RuntimeError, match="atten_mask of sparse_mode=3 must be ones above the diagonal"):
        attention(sparse_mode=3, atten_mask=~CAUSAL_MASK)
    cache, query = torch.zeros(2, BLOCK, 1, 8, **half), torch.zeros(1, 1, 8, **half)
    table = torch.zeros(1, 1, dtype=torch.int32, device="npu")

    def paged_attention(block_table: torch.Tensor, length: int, dtype: torch.dtype = torch.int32) -> None:
        lengths = torch.tensor([length], dtype=dtype)
        atb._npu_paged_attention(query, cache, cache, 1, 1, 1.0, block_table, lengths, torch.empty_like(query))

    paged_attention(table, 4)
    with pytest.raises(RuntimeError, match="ATB PagedAttention: context_lens is Long"):
        paged_attention(table, 4, torch.int64)
    with pytest.raises(RuntimeError, match=r"ATB PagedAttention: the block table names a block outside 0\.\.1"):
        paged_attention(table + 2, 4)
    with pytest.raises(RuntimeError, match="a sequence of 5 tokens needs 2 blocks of 4 and the block table has 1"):
        paged_attention(table, 5)
    slots = torch.tensor([8], dtype=torch.int32, device="npu")
    with pytest.raises(RuntimeError, match="ATB ReshapeAndCache: slot_indices names a slot outside of the cache"):
        atb._npu_reshape_and_cache(query, query, cache, cache.clone(), slots)
    load, lengths = torch_npu.atb.npu_paged_cache_load, table[0] + 2
    for arguments, options, fault in (
        ((cache, cache, table.long(), lengths), {}, "ATB PagedCacheLoad: block_table is Long"),
        ((cache, cache, table[0, 0], lengths), {}, r"block_table has the shape \[\]; it must have 2 dimensions"),
        ((cache, cache, table, lengths), {"cumsum": True}, r"context_lens has the shape \[1\].*\[2\]"),
        ((cache, cache[:, :2].contiguous(), table, lengths), {}, "their blocks differ"),
        (
            (cache, cache, table, lengths),
            {"key": query.clone(), "value": query.clone()},
            "context_lens has 2 at 0, and key has 1 rows, of which 0 are taken",
        ),
    ):
        with pytest.raises(RuntimeError, match=fault):
            load(*arguments, **options)
    with pytest.raises(RuntimeError, match="ATB GroupTopk: this operation is not emulated"):
        atb._npu_group_topk(torch.ones(2, 8, **half), 1, 2, 1)


def test_what_is_refused_while_it_runs(run_in_ranks) -> None:
    run_in_ranks(refused_while_running, 1)


# --- int8 ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_product_with_scales(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-128, 128, (5, 32), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (32, 7), generator=generator, dtype=torch.int8)
    scale, rows, bias = random_rows(7).abs() / 99, random_rows(5, seed=2).abs() / 99, random_rows(7, seed=3)
    out = npu.npu_quant_matmul(
        x.npu(), weight.npu(), scale.npu(), pertoken_scale=rows.npu(), bias=bias.npu(), output_dtype=dtype
    )
    wanted = (x.double() @ weight.double()) * scale.double() * rows.double().unsqueeze(1) + bias.double()
    torch.testing.assert_close(out.cpu().float(), wanted.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    with pytest.raises(RuntimeError, match="offset is given"):
        npu.npu_quant_matmul(
            x.npu(), weight.npu(), scale.npu(), offset=scale.npu(), pertoken_scale=rows.npu(), output_dtype=dtype
        )
