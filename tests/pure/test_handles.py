"""Handles are frozen. Each is good for one call of its own inverse. Several may be in flight, in any order."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import SEEDS
from vllm_npu.core.handles import Handle, check_handle
from vllm_npu.core.step_plan import StepPlan, TokenSharding
from vllm_npu.errors import HandleMismatchError, InvalidInputError
from vllm_npu.strategies.dispatch.base import RoutedTokens
from vllm_npu.strategies.select import build
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.launch import Rank
from vllm_npu.tools.verification import Case, CaseTensors

TP_SIZE = 2
HANDLES = {
    "mc2": ("MC2Handle", "MC2DispatchHandle"),
    "all2all": ("All2AllHandle", "All2AllVHandle"),
    "allgather": ("AllGatherHandle", "LocalPermuteHandle"),
    "naive": ("AllGatherHandle", "LocalPermuteHandle"),
}


def case_of(strategy: str, num_tokens: int, seed: int = 0, sharding: TokenSharding = TokenSharding.REPLICATED) -> Case:
    return Case(
        strategy=strategy, tp_size=TP_SIZE, dp_size=1, num_tokens_across_dp=(num_tokens,), sharding=sharding, seed=seed
    )


class MicroBatch:
    """One case whose four stages run one at a time."""

    def __init__(self, rank: Rank, case: Case) -> None:
        groups = rank.groups(tp_size=case.tp_size, dp_size=case.dp_size)
        self.pipeline = build(case.strategy, groups, case.num_experts)
        tensors = CaseTensors.of(case)
        self.hidden_states, *self.routing = tensors.input_of(groups.topology, case.sharding, rank.device)
        self.experts = tensors.experts_of(groups.topology, rank.device)
        self.expected = tensors.expected_on(groups.topology, case.sharding)
        self.step = StepPlan(num_tokens_across_dp=case.num_tokens_across_dp, sharding=case.sharding)
        self.taken = 0

    def advance(self) -> None:
        """Run the next stage."""
        (self.prepare, self.dispatch, self.combine, self.finalize)[self.taken]()
        self.taken += 1

    def prepare(self) -> None:
        self.prepared = self.pipeline.prepare_finalize.prepare(self.hidden_states, tuple(self.routing), self.step)

    def dispatch(self) -> None:
        self.dispatched = self.pipeline.dispatcher.dispatch(RoutedTokens.of(self.prepared))

    def combine(self) -> None:
        self.expert_output = self.experts(self.dispatched.expert_input, self.dispatched.tokens_per_expert, None)
        self.routed = self.pipeline.dispatcher.combine(self.expert_output, self.dispatched.handle)

    def finalize(self) -> None:
        finalized = self.pipeline.prepare_finalize.finalize(self.routed, self.prepared.handle)
        self.output = finalized.hidden_states[: self.expected.shape[0]]

    def is_right(self) -> bool:
        return torch.equal(self.output, self.expected)


def run_interleaved(rank: Rank, cases: tuple[Case, ...], order: list[int]) -> list[bool]:
    batches = [MicroBatch(rank, case) for case in cases]
    for each in order:
        batches[each].advance()
    return [batch.is_right() for batch in batches]


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25)
@given(order=st.permutations([0] * 4 + [1] * 4 + [2] * 4), seed=SEEDS, sharding=st.sampled_from(list(TokenSharding)))
def test_micro_batches_may_interleave_in_any_order(pools, strategy, order, seed, sharding):
    cases = tuple(case_of(strategy, num_tokens, seed + num_tokens, sharding) for num_tokens in (5, 0, 8))
    assert pools("threaded", TP_SIZE).run(run_interleaved, cases, order) == [[True] * 3] * TP_SIZE


def message_of(call, *arguments) -> str:
    """Message of the HandleMismatchError that the call raises, or "no error"."""
    try:
        call(*arguments)
    except HandleMismatchError as error:
        return str(error)
    return "no error"


def spend_twice(rank: Rank, case: Case) -> tuple[str, str, str, bool]:
    batch = MicroBatch(rank, case)
    for _ in range(4):
        batch.advance()
    again = message_of(batch.combine), message_of(batch.finalize)
    (kept,) = run_interleaved(rank, (case,), [0] * 4)
    return type(batch.pipeline.dispatcher).__name__, type(batch.pipeline.prepare_finalize).__name__, *again, kept


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_handle_is_good_for_one_use(pools, strategy):
    prepare_handle, dispatch_handle = HANDLES[strategy]
    for outcome in pools("threaded", TP_SIZE).run(spend_twice, case_of(strategy, 5)):
        dispatcher, prepare_finalize, combined_again, finalized_again, still_usable = outcome
        stage = f"{dispatcher}.combine"
        assert combined_again.startswith(f"{stage} got a {dispatch_handle} that {stage} has already used; each prepare")
        stage = f"{prepare_finalize}.finalize"
        assert finalized_again.startswith(f"{stage} got a {prepare_handle} that {stage} has already used; each prepare")
        assert still_usable, "another run with the same object succeeds"


def swap_handles(rank: Rank, own_case: Case, other_case: Case) -> tuple[str, str, bool]:
    own, other = MicroBatch(rank, own_case), MicroBatch(rank, other_case)
    for batch in (own, other):
        batch.prepare()
        batch.dispatch()
    combined = message_of(own.pipeline.dispatcher.combine, own.dispatched.expert_input, other.dispatched.handle)
    finalized = message_of(own.pipeline.prepare_finalize.finalize, own.hidden_states, other.prepared.handle)
    for batch in (own, other):  # the refused handles are not spent
        batch.combine()
        batch.finalize()
    return combined, finalized, own.is_right() and other.is_right()


@pytest.mark.parametrize(("own", "other"), [(a, b) for a in STRATEGIES for b in STRATEGIES if HANDLES[a] != HANDLES[b]])
def test_a_handle_of_another_strategy_is_refused_and_stays_good(pools, own, other):
    for outcome in pools("threaded", TP_SIZE).run(swap_handles, case_of(own, 5), case_of(other, 5)):
        combined, finalized, both_are_right = outcome
        assert f"got a {HANDLES[other][1]}, but needs the {HANDLES[own][1]} of its own inverse" in combined
        assert f"got a {HANDLES[other][0]}, but needs the {HANDLES[own][0]} of its own inverse" in finalized
        assert both_are_right


def give_wrong_rows(rank: Rank, case: Case) -> tuple[list[str], bool]:
    batch = MicroBatch(rank, case)
    batch.prepare()
    batch.dispatch()
    messages = []
    dispatcher, prepare_finalize = batch.pipeline.dispatcher, batch.pipeline.prepare_finalize
    rows, prepared_rows = batch.dispatched.expert_input.shape[0], batch.prepared.hidden_states.shape[0]
    for call, wrong, handle in (
        (dispatcher.combine, torch.zeros(rows + 1, 3), batch.dispatched.handle),
        (dispatcher.combine, torch.zeros(rows), batch.dispatched.handle),
        (prepare_finalize.finalize, torch.zeros(prepared_rows + 1, 3), batch.prepared.handle),
        (prepare_finalize.finalize, torch.zeros(prepared_rows, 3, 1), batch.prepared.handle),
    ):
        try:
            call(wrong, handle)
        except InvalidInputError as error:
            messages.append((tuple(wrong.shape), str(error)))
    batch.combine()
    batch.finalize()
    return messages, batch.is_right()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_refused_tensor_does_not_spend_the_handle(pools, strategy):
    for messages, is_right in pools("threaded", TP_SIZE).run(give_wrong_rows, case_of(strategy, 5)):
        assert len(messages) == 4
        for shape, message in messages:
            assert re.search(
                rf"has shape {re.escape(str(shape))}; \w+\.(combine|finalize) needs \[\d+, width\]", message
            )
        assert is_right


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ticket(Handle):
    number: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt(Handle):
    number: int


def test_a_handle_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ticket(number=1).number = 2


def test_handles_are_spent_one_by_one():
    first, second = Ticket(number=1), Ticket(number=1)
    first.spend("combine")
    second.spend("finalize")
    with pytest.raises(HandleMismatchError, match="other got a Ticket that combine has already used"):
        first.spend("other")
    with pytest.raises(HandleMismatchError, match="other got a Ticket that finalize has already used"):
        second.spend("other")


def test_check_handle_returns_the_handle_of_the_right_type_and_refuses_the_wrong_one():
    ticket = Ticket(number=1)
    assert check_handle(ticket, Ticket, "combine") is ticket
    with pytest.raises(HandleMismatchError, match=r"combine got a Ticket, but needs the Receipt .* in pairs"):
        check_handle(ticket, Receipt, "combine")
