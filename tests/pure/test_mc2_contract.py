"""portable_ops against the contract of Ascend's dispatch and combine ops, written here a second time as plain loops."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cases import SEEDS, distinct_ids, same_bits, seeded
from vllm_npu.device.portable_ops import (
    ASSIST_CELLS,
    UNDEFINED,
    distribute_combine,
    distribute_dispatch,
)
from vllm_npu.errors import InvalidInputError
from vllm_npu.tools.launch import Rank

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """The arguments of all ranks for one dispatch and one combine."""

    num_local: int
    top_k: int
    num_tokens: int
    active: tuple[int, ...]  # number of active tokens on each rank
    masked: bool  # False: no mask is passed, and all tokens are active
    dtype: torch.dtype
    id_dtype: torch.dtype = torch.int32
    hidden_size: int = 3
    width: int = 5  # of the rows of the experts' output
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.active)

    @property
    def rows(self) -> int:
        return self.num_tokens * self.num_ranks * min(self.num_local, self.top_k)

    def arguments(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, expert_ids, expert_scales, x_active_mask. Rows and ids of inactive tokens are NaN and unknown experts."""
        generator = seeded(self.seed * 1000 + rank)
        num_experts = self.num_local * self.num_ranks
        x = torch.randn(self.num_tokens, self.hidden_size, generator=generator).to(self.dtype)
        ids = distinct_ids(self.num_tokens, self.top_k, num_experts, generator).to(self.id_dtype)
        scales = torch.rand(self.num_tokens, self.top_k, generator=generator)
        if not self.masked:
            return x, ids, scales, None
        unused = self.active[rank]
        x[unused:] = NAN  # the scales stay numbers: combine must return NaN without their help
        ids[unused:] = torch.tensor([-7, 0, num_experts + 3], dtype=self.id_dtype)[torch.arange(self.top_k) % 3]
        return x, ids, scales, torch.arange(self.num_tokens) < self.active[rank]

    def expert_output(self, rank: int, valid_rows: int) -> torch.Tensor:
        output = torch.randn(self.rows, self.width, generator=seeded(self.seed * 1000 + 500 + rank)).to(self.dtype)
        output[valid_rows:] = NAN
        return output


@st.composite
def op_cases(draw):
    num_ranks = draw(st.integers(2, 4))
    num_local = draw(st.integers(1, 4))
    num_tokens = draw(st.integers(1, 6))
    masked = draw(st.booleans())
    active = [draw(st.integers(0, num_tokens)) if masked else num_tokens for _ in range(num_ranks)]
    return OpCase(
        num_local=num_local,
        top_k=draw(st.integers(1, min(6, num_local * num_ranks))),
        num_tokens=num_tokens,
        active=tuple(active),
        masked=masked,
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        id_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(SEEDS),
    )


BASE = {"num_tokens": 4, "dtype": torch.bfloat16, "masked": True}
FEWER_EXPERTS_THAN_TOP_K = OpCase(num_local=1, top_k=3, active=(4, 2, 1), **BASE)
MORE_EXPERTS_THAN_TOP_K = OpCase(num_local=4, top_k=2, active=(3, 4), **BASE)
AN_IDLE_RANK = OpCase(num_local=2, top_k=3, active=(4, 0), **BASE)
ALL_IDLE = OpCase(num_local=2, top_k=2, active=(0, 0), **BASE)


def received_rows(case: OpCase, rank: int) -> list[tuple[int, int, int, int]]:
    """(local expert, source rank, token, k) of each row that the rank receives, in the order of the contract."""
    ids = [case.arguments(source)[1].tolist() for source in range(case.num_ranks)]
    rows = []
    for expert in range(case.num_local):
        for source in range(case.num_ranks):
            for token in range(case.active[source]):
                for k in range(case.top_k):
                    if ids[source][token][k] == rank * case.num_local + expert:
                        rows.append((expert, source, token, k))
    return rows


def dispatch_on_rank(rank: Rank, case: OpCase):
    x, ids, _, mask = case.arguments(rank.rank)
    ep = rank.groups(tp_size=1, dp_size=case.num_ranks).ep
    return distribute_dispatch(x, ids, group_ep=ep, moe_expert_num=case.num_local * case.num_ranks, x_active_mask=mask)


def combine_on_rank(rank: Rank, case: OpCase) -> torch.Tensor:
    _, ids, scales, mask = case.arguments(rank.rank)
    dispatched = dispatch_on_rank(rank, case)
    return distribute_combine(
        case.expert_output(rank.rank, int(dispatched.ep_recv_counts[-1])),
        ids,
        dispatched.combine_index,
        dispatched.ep_recv_counts,
        scales,
        group_ep=rank.groups(tp_size=1, dp_size=case.num_ranks).ep,
        moe_expert_num=case.num_local * case.num_ranks,
        x_active_mask=mask,
    )


@given(op_cases())
@example(FEWER_EXPERTS_THAN_TOP_K)
@example(MORE_EXPERTS_THAN_TOP_K)
@example(AN_IDLE_RANK)
@example(ALL_IDLE)
def test_rows_lie_by_local_expert_then_source_rank_then_token_with_a_poisoned_tail(pools, case):
    for rank, output in enumerate(pools("threaded", case.num_ranks).run(dispatch_on_rank, case)):
        rows = received_rows(case, rank)
        sources = [case.arguments(source)[0] for source in range(case.num_ranks)]
        assert output.expand_x.shape == (case.rows, case.hidden_size)
        assert output.expand_x.dtype == case.dtype
        for row, (_, source, token, _) in zip(output.expand_x, rows, strict=False):
            assert same_bits(row, sources[source][token])
        assert bool(output.expand_x[len(rows) :].isnan().all())


@given(op_cases())
@example(FEWER_EXPERTS_THAN_TOP_K)
@example(AN_IDLE_RANK)
@example(ALL_IDLE)
def test_receive_counts_are_prefix_sums_over_all_experts_and_sources(pools, case):
    for rank, output in enumerate(pools("threaded", case.num_ranks).run(dispatch_on_rank, case)):
        running, total = [], 0
        for cell in range(case.num_local * case.num_ranks):
            expert, source = divmod(cell, case.num_ranks)
            total += sum(1 for row in received_rows(case, rank) if row[:2] == (expert, source))
            running.append(total)
        assert output.ep_recv_counts.tolist() == running
        assert output.ep_recv_counts.dtype == torch.int32


@given(op_cases())
@example(ALL_IDLE)
def test_expert_token_nums_count_the_rows_of_each_local_expert(pools, case):
    for rank, output in enumerate(pools("threaded", case.num_ranks).run(dispatch_on_rank, case)):
        rows, counts = received_rows(case, rank), output.expert_token_nums
        assert counts.tolist() == [sum(1 for row in rows if row[0] == expert) for expert in range(case.num_local)]
        assert counts.dtype == torch.int64


@given(op_cases())
@example(FEWER_EXPERTS_THAN_TOP_K)
@example(AN_IDLE_RANK)
def test_assist_info_names_each_rows_source_token_and_k_and_nothing_else(pools, case):
    for rank, output in enumerate(pools("threaded", case.num_ranks).run(dispatch_on_rank, case)):
        cells = output.combine_index
        assert (cells.shape, cells.dtype) == ((case.rows * ASSIST_CELLS,), torch.int32)
        triples = [cell for _, *triple in received_rows(case, rank) for cell in triple]
        assert cells[: len(triples)].tolist() == triples
        assert set(cells[len(triples) :].tolist()) <= {UNDEFINED}


def round_to(dtype: torch.dtype, total: np.ndarray) -> torch.Tensor:
    """Round float32 to the nearest value, ties to even. For bfloat16 this works on the bits."""
    if dtype is torch.float32:
        return torch.from_numpy(total)
    bits = total.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def expected_token(case: OpCase, rank: int, token: int) -> torch.Tensor:
    """acc = acc + row * scale in float32, k ascending. Each product and each sum is rounded; one cast follows."""
    _, ids, scales, _ = case.arguments(rank)
    total = np.zeros(case.width, dtype=np.float32)
    for k in range(case.top_k):
        owner = int(ids[token, k]) // case.num_local
        rows = received_rows(case, owner)
        position = next(i for i, row in enumerate(rows) if row[1:] == (rank, token, k))
        row = case.expert_output(owner, len(rows))[position].float().numpy()
        product = row * scales[token, k].numpy()
        total = total + product
    return round_to(case.dtype, total)


@given(op_cases())
@example(FEWER_EXPERTS_THAN_TOP_K)
@example(MORE_EXPERTS_THAN_TOP_K)
@example(AN_IDLE_RANK)
@example(ALL_IDLE)
def test_combine_is_the_contracts_sum_bit_for_bit_and_inactive_rows_are_poison(pools, case):
    for rank, output in enumerate(pools("threaded", case.num_ranks).run(combine_on_rank, case)):
        assert (output.shape, output.dtype) == ((case.num_tokens, case.width), case.dtype)
        for token in range(case.active[rank]):
            assert same_bits(output[token], expected_token(case, rank, token))
        assert bool(output[case.active[rank] :].isnan().all())


def combine_that_cancels(rank: Rank, ids: list[int]) -> float:
    """Return the sum of this rank's one token. Experts 0, 1, 2, 3 return 2**24, 1, -2**24, 0."""
    ep = rank.groups(tp_size=1, dp_size=2).ep
    expert_ids = torch.tensor([ids], dtype=torch.int32)
    dispatched = distribute_dispatch(torch.zeros(1, 1), expert_ids, group_ep=ep, moe_expert_num=4)
    values = torch.tensor([2.0**24, 1.0, -(2.0**24), 0.0])[rank.rank * 2 : rank.rank * 2 + 2]
    valid = values.repeat_interleave(dispatched.expert_token_nums)
    output = torch.full((dispatched.expand_x.shape[0], 1), NAN)
    output[: len(valid), 0] = valid
    combined = distribute_combine(
        output,
        expert_ids,
        dispatched.combine_index,
        dispatched.ep_recv_counts,
        torch.ones(1, len(ids)),
        group_ep=ep,
        moe_expert_num=4,
    )
    return combined.item()


@pytest.mark.parametrize(("ids", "total"), [([0, 1, 2], 0.0), ([0, 2, 1], 1.0), ([1, 0, 2], 0.0), ([2, 0, 1], 1.0)])
def test_combine_adds_in_the_order_of_k_not_of_experts_or_ranks(pools, ids, total):
    assert pools("threaded", 2).run(combine_that_cancels, ids) == [total] * 2


def combine_twice(rank: Rank, case: OpCase) -> bool:
    """Whether the outputs of the first call stay as they are while a second call runs."""
    first = dispatch_on_rank(rank, case)
    tensors = [each for each in first if isinstance(each, torch.Tensor)]
    copies = [tensor.clone() for tensor in tensors]
    dispatch_on_rank(rank, case)
    combine_on_rank(rank, case)
    return all(same_bits(a, b) for a, b in zip(tensors, copies, strict=True))


def test_a_second_pair_does_not_touch_the_first_ones_outputs(pools):
    assert pools("threaded", 2).run(combine_twice, MORE_EXPERTS_THAN_TOP_K) == [True, True]


def arguments_after_both(rank: Rank, case: OpCase) -> list[bool]:
    x, ids, scales, mask = case.arguments(rank.rank)
    copies = [tensor.clone() for tensor in (x, ids, scales, mask)]
    ep = rank.groups(tp_size=1, dp_size=case.num_ranks).ep
    fixed = {"group_ep": ep, "moe_expert_num": case.num_local * case.num_ranks, "x_active_mask": mask}
    dispatched = distribute_dispatch(x, ids, **fixed)
    output = case.expert_output(rank.rank, int(dispatched.ep_recv_counts[-1]))
    copies.append(output.clone())
    distribute_combine(output, ids, dispatched.combine_index, dispatched.ep_recv_counts, scales, **fixed)
    return [same_bits(a, b) for a, b in zip((x, ids, scales, mask, output), copies, strict=True)]


def test_arguments_are_not_written(pools):
    assert pools("threaded", 3).run(arguments_after_both, FEWER_EXPERTS_THAN_TOP_K) == [[True] * 5] * 3


def refusals(rank: Rank, mask: torch.Tensor) -> list[str]:
    ep = rank.groups(tp_size=1, dp_size=2).ep
    x, ids = torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int32)
    fixed = {"group_ep": ep, "moe_expert_num": 2}
    dispatched = distribute_dispatch(x, ids, **fixed)
    messages = []
    for call in (
        lambda: distribute_dispatch(x, ids, x_active_mask=mask, **fixed),
        lambda: distribute_combine(
            dispatched.expand_x,
            ids,
            dispatched.combine_index,
            dispatched.ep_recv_counts,
            torch.ones(3, 1),
            x_active_mask=mask,
            **fixed,
        ),
    ):
        try:
            call()
        except InvalidInputError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True, False, True], "has a hole: active tokens must be a prefix"),
        ([False, False, True], "has a hole"),
        ([False, True, True], "has a hole"),
        ([True, False], r"is torch.bool (2,); it must be bool [3]"),
        ([1, 1, 0], r"is torch.int64 (3,); it must be bool [3]"),
        ([[True], [True], [True]], r"is torch.bool (3, 1); it must be bool [3]"),
    ],
)
def test_a_mask_that_is_no_prefix_of_the_tokens_is_refused_by_both_ops(pools, mask, message):
    for messages in pools("threaded", 2).run(refusals, torch.tensor(mask)):
        assert len(messages) == 2
        assert all(re.search(re.escape(message), each) for each in messages)


@settings(max_examples=20)
@given(op_cases())
def test_all_ranks_together_receive_every_active_pair_once(pools, case):
    outputs = pools("threaded", case.num_ranks).run(dispatch_on_rank, case)
    assert sum(int(each.ep_recv_counts[-1]) for each in outputs) == sum(case.active) * case.top_k


def int8_dispatch_on_rank(rank: Rank):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank.rank))
    x[2] = 0
    ids = torch.tensor([[0, 3], [1, 2], [2, 0]], dtype=torch.int32)
    groups = rank.groups(tp_size=1, dp_size=2)
    output = distribute_dispatch(
        x, ids, group_ep=groups.ep, moe_expert_num=4, x_active_mask=torch.tensor([True, True, True]), quant_mode=2
    )
    return x, output


def test_quantised_dispatch_carries_a_scale_for_each_row_and_gives_the_token_back(pools):
    outcomes = pools("threaded", 2).run(int8_dispatch_on_rank)
    sources = [x for x, _ in outcomes]
    for _, output in outcomes:
        rows = int(output.ep_recv_counts[-1])
        triples = output.combine_index[: 3 * rows].view(rows, 3).tolist()
        assert output.expand_x.dtype == torch.int8
        assert (output.expand_x[rows:] == -128).all()
        assert output.dynamic_scales[rows:].isnan().all()
        for row, (source, token, _) in enumerate(triples):
            original = sources[source][token]
            step = float(original.abs().max()) / 127
            restored = output.expand_x[row].float() * output.dynamic_scales[row]
            assert (restored - original).abs().max() <= step / 2 + 1e-6


def test_other_quantisation_modes_are_refused_by_name(pools):
    with pytest.raises(InvalidInputError, match="quant_mode=4"):
        pools("threaded", 1).run(refused_quant_mode)


def refused_quant_mode(rank: Rank):
    ids = torch.zeros(1, 1, dtype=torch.int32)
    ep = rank.groups(tp_size=1, dp_size=1).ep
    distribute_dispatch(torch.zeros(1, 4), ids, group_ep=ep, moe_expert_num=1, quant_mode=4)
