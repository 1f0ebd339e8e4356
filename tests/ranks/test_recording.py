"""RecordingTransport: calls and bytes as counted by hand, results as without it."""

import time

import pytest
import torch

from tests.cases import same_bits
from vllm_npu.errors import InvalidInputError, TransportError
from vllm_npu.tools.launch import Rank, ThreadRankPool
from vllm_npu.transport.base import SendRecv, Transport
from vllm_npu.trust.recording import CollectiveCounter, RecordingTransport, record
from vllm_npu.trust.trace import read_traces
from vllm_npu.trust.trace_comparison import compare

SIZES = [4, 0, 3]  # rows of each of 3 ranks
ROW_BYTES = 2 * 5  # [*, 5] bfloat16


def rows(num_rows: int, rank: int) -> torch.Tensor:
    return torch.arange(num_rows * 5).view(num_rows, 5).to(torch.bfloat16) + rank


def one_of_each(t: Transport) -> dict[str, torch.Tensor]:
    """Results of a call of every operation, on a group of 3."""
    received = torch.zeros(2, 5, dtype=torch.bfloat16)
    t.send_recv(
        [
            SendRecv((t.rank + 1) % 3, rows(2, t.rank), is_send=True),
            SendRecv((t.rank + 1) % 3, rows(1, t.rank), is_send=True),
            SendRecv((t.rank - 1) % 3, received, is_send=False),
            SendRecv((t.rank - 1) % 3, torch.zeros(1, 5, dtype=torch.bfloat16), is_send=False),
        ]
    )
    t.barrier()
    return {
        "all_gather": t.all_gather(rows(SIZES[t.rank], t.rank), SIZES),
        "reduce_scatter": t.reduce_scatter(rows(sum(SIZES), t.rank), SIZES),
        "all_to_all": t.all_to_all(rows(6, t.rank), [1, 2, 3], [t.rank + 1] * 3),
        "all_to_all_start": t.all_to_all_start(rows(6, t.rank), [1, 2, 3], [t.rank + 1] * 3).finish(),
        "broadcast": t.broadcast(rows(4, t.rank), 2),
        "all_reduce": t.all_reduce(rows(5, t.rank)),
        "send_recv": received,
    }


# Rows that ranks 0, 1 and 2 put on the wire, by hand.
ROWS_SENT = {
    "all_gather": (4 * 2, 0, 3 * 2),  # own rows to two others
    "reduce_scatter": (0 + 3, 4 + 3, 4 + 0),  # the others' parts
    "all_to_all": (2 * (2 + 3), 2 * (1 + 3), 2 * (1 + 2)),  # at once, and with a start
    "broadcast": (0, 0, 4 * 2),
    "send_recv": (2 + 1,) * 3,
    "barrier": (0, 0, 0),
}
ALL_REDUCE_BYTES = 2 * 5 * ROW_BYTES * 2 // 3  # a ring: 2 * (W - 1) / W of the tensor


def counted_and_bare(rank: Rank):
    """(counts, results equal those of the bare transport, what the groups of one counted)."""
    counter = CollectiveCounter()
    recorded = rank.groups(tp_size=1, dp_size=3, counter=counter)
    bare = rank.groups(tp_size=1, dp_size=3)
    assert isinstance(recorded.ep, RecordingTransport)
    assert not isinstance(bare.ep, RecordingTransport)
    first, second = one_of_each(recorded.ep), one_of_each(bare.ep)
    same = {name: same_bits(first[name], second[name]) for name in first}
    return dict(counter.calls), dict(counter.bytes_sent), same


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_calls_and_bytes_are_those_counted_by_hand(pools, kind):
    for rank, (calls, bytes_sent, _) in enumerate(pools(kind, 3).run(counted_and_bare)):
        expected = {f"ep.{name}": sent[rank] * ROW_BYTES for name, sent in ROWS_SENT.items()}
        assert bytes_sent == expected | {"ep.all_reduce": ALL_REDUCE_BYTES}
        assert calls == dict.fromkeys(bytes_sent, 1) | {"ep.all_to_all": 2}


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_results_are_those_of_the_transport_inside(pools, kind):
    for _, _, same in pools(kind, 3).run(counted_and_bare):
        assert len(same) == 7
        assert all(same.values()), same


def by_group(rank: Rank):
    counter = CollectiveCounter()
    groups = rank.groups(tp_size=2, dp_size=2, counter=counter)
    for times, t in enumerate((groups.tp, groups.dp, groups.ep), start=1):
        for _ in range(times):
            t.all_gather(torch.zeros(3, dtype=torch.int64))
    before_reset = dict(counter.calls), dict(counter.bytes_sent)
    counter.reset()
    return *before_reset, dict(counter.calls), dict(counter.bytes_sent)


def test_groups_are_counted_apart_until_reset(pools):
    for outcome in pools("threaded", 4).run(by_group):
        assert outcome == (
            {"tp.all_gather": 1, "dp.all_gather": 2, "ep.all_gather": 3},
            {"tp.all_gather": 24, "dp.all_gather": 2 * 24, "ep.all_gather": 3 * 3 * 24},
            {},
            {},
        )


def uncounted(rank: Rank):
    """What a group of one, an empty exchange and a refused call leave in the counter."""
    counter = CollectiveCounter()
    groups = rank.groups(tp_size=1, dp_size=2, counter=counter)
    groups.tp.all_gather(torch.zeros(3))
    groups.tp.reduce_scatter(torch.zeros(3))
    groups.tp.all_to_all(torch.zeros(3), [3], [3])
    groups.tp.all_to_all_start(torch.zeros(3), [3], [3]).finish()
    groups.tp.gather_tokens([torch.zeros(3, 1)], [3])
    groups.tp.exchange_tokens([torch.zeros(3, 1)], torch.tensor([3]))
    groups.tp.exchange_tokens_start([torch.zeros(3, 1)], torch.tensor([3])).finish()
    groups.tp.broadcast(torch.zeros(3), 0)
    groups.tp.all_reduce(torch.zeros(3))
    groups.tp.barrier()
    try:
        groups.dp.all_gather(torch.zeros(3), [2, 2])
    except InvalidInputError:
        return dict(counter.calls)
    return None


def test_what_sends_nothing_is_not_counted(pools):
    assert pools("threaded", 2).run(uncounted) == [{}, {}]


def empty_tensors(rank: Rank):
    counter = CollectiveCounter()
    t = rank.groups(tp_size=1, dp_size=2, counter=counter).ep
    t.reduce_scatter(torch.zeros(0, 5), [0, 0])
    t.all_to_all(torch.zeros(0, 5), [0, 0], [0, 0])
    return dict(counter.calls), dict(counter.bytes_sent)


def test_calls_with_empty_tensors_are_counted_with_no_bytes(pools):
    names = ("ep.reduce_scatter", "ep.all_to_all")
    assert pools("threaded", 2).run(empty_tensors) == [(dict.fromkeys(names, 1), dict.fromkeys(names, 0))] * 2


def several_in_one_message(rank: Rank):
    counter = CollectiveCounter()
    t = rank.groups(tp_size=1, dp_size=3, counter=counter).ep
    fields = [rows(SIZES[t.rank], t.rank), torch.zeros(SIZES[t.rank], 1)]  # 10 bytes a row, 2 of alignment, and 4
    t.gather_tokens(fields, SIZES)
    t.exchange_tokens(fields, torch.tensor([0, 0, SIZES[t.rank]]))
    return dict(counter.calls), dict(counter.bytes_sent)


@pytest.mark.parametrize("kind", ["threaded", "gloo"])
def test_a_message_of_several_tensors_is_one_call_and_its_sizes_another(pools, kind):
    for rank, (calls, bytes_sent) in enumerate(pools(kind, 3).run(several_in_one_message)):
        assert calls == {"ep.all_gather": 1, "ep.all_to_all": 2}
        payload = SIZES[rank] * 16 if rank != 2 else 0
        assert bytes_sent == {"ep.all_gather": SIZES[rank] * 16 * 2, "ep.all_to_all": 8 * 2 + payload}


def closes(rank: Rank) -> list[int]:
    t = rank.groups(tp_size=1, dp_size=2, counter=CollectiveCounter()).ep
    t.close()
    t.close()
    return [t.rank, t.size]


def test_a_counted_group_says_who_it_is_and_may_be_closed_twice(pools):
    assert pools("threaded", 2).run(closes) == [[0, 2], [1, 2]]


def without_counter(rank: Rank) -> bool:
    t = rank.groups(tp_size=1, dp_size=2).ep
    return record(t, None) is t


def test_without_a_counter_nothing_is_wrapped(pools):
    assert pools("threaded", 2).run(without_counter) == [True, True]


# --- VLLM_NPU_RECORD ---


def traced_calls(rank: Rank) -> None:
    groups = rank.groups(tp_size=2, dp_size=2)
    rank.ring.enter_step(7, "mc2")
    rank.ring.enter_layer("model.layers.3")
    several_in_one_message_on(groups.dp)
    one = groups.ep.all_to_all_start(torch.zeros(4, 5, dtype=torch.bfloat16), [1] * 4, [1] * 4)
    groups.tp.all_reduce(torch.zeros(3, 5))
    one.finish()
    groups.ep.broadcast(torch.zeros(2, 4), 3)
    groups.ep.reduce_scatter(torch.zeros(4, 2), [0, 1, 2, 1])
    groups.ep.send_recv([SendRecv(1, torch.zeros(1), is_send=True)] if rank.rank == 0 else
                        [SendRecv(0, torch.zeros(1), is_send=False)] if rank.rank == 1 else [])  # fmt: skip
    groups.ep.note_op("npu_moe_distribute_dispatch_v2", 100)


def several_in_one_message_on(t: Transport) -> None:
    fields = [torch.zeros(t.rank + 1, 5, dtype=torch.bfloat16), torch.zeros(t.rank + 1, 1)]
    t.gather_tokens(fields, [1, 2])
    t.exchange_tokens(fields, torch.tensor([t.rank + 1, 0]))


def test_every_call_is_in_the_trace_with_group_sizes_layer_and_step(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_NPU_RECORD", str(tmp_path))
    with ThreadRankPool(4, timeout=5) as pool:
        pool.run(traced_calls)
    traces = read_traces([tmp_path])
    assert compare(traces) == []
    assert [trace.rank for trace in traces] == [0, 1, 2, 3]
    for trace in traces:
        assert all(call.done and call.step == 7 and call.layer == "model.layers.3" for call in trace.calls)
        dp = f"dp:{trace.rank % 2}-{trace.rank % 2 + 2}/2"
        tp = "tp:0-1" if trace.rank < 2 else "tp:2-3"
        place = trace.rank // 2
        assert [
            (str(call.group), call.operation, call.row, call.sizes, call.sent, call.received) for call in trace.calls
        ] == [
            (dp, "all_gather", "bfloat16[5]+float32[1]", (1, 2), (), ()),
            (dp, "all_to_all", "bfloat16[5]+float32[1]", (), (place + 1, 0), (0, 0) if place else (1, 2)),
            ("ep:0-3", "all_to_all", "bfloat16[5]", (), (1,) * 4, (1,) * 4),
            (tp, "all_reduce", "float32[5]", (3,), (), ()),
            ("ep:0-3", "broadcast from 3", "float32[4]", (2,), (), ()),
            ("ep:0-3", "reduce_scatter", "float32[2]", (0, 1, 2, 1), (), ()),
            ("ep:0-3", "send_recv", "", (), (), ()),
            ("ep:0-3", "npu_moe_distribute_dispatch_v2", "", (), (), ()),
        ]


def make_another_call(rank: Rank) -> None:
    t = rank.groups(tp_size=1, dp_size=4).ep
    rank.ring.enter_step(1, "naive")
    t.barrier()
    if rank.rank == 2:
        rank.ring.enter_layer("layer of rank 2")
        t.all_reduce(torch.zeros(3))
    else:
        t.all_gather(torch.zeros(3))


def come_late(rank: Rank) -> None:
    t = rank.groups(tp_size=1, dp_size=4).ep
    t.barrier()
    if rank.rank != 1:
        t.all_gather(torch.zeros(3))
    else:
        time.sleep(2)


def wait_for_each_other(rank: Rank) -> None:
    groups = rank.groups(tp_size=2, dp_size=2)
    for t in (groups.tp, groups.ep) if rank.rank != 2 else (groups.ep, groups.tp):
        t.barrier()


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (make_another_call, ["call 1 on group ep:0-3: ranks make different calls", "ranks [0, 1, 3]: all_gather float32[]",
                             "ranks [2]: all_reduce float32[], sizes [3], step 1, layer layer of rank 2, strategy naive"]),
        (come_late, ["ranks [0, 2, 3] are in call 1 on group ep:0-3: all_gather",
                     "rank 1 did not come; its last call: ep:0-3 barrier"]),
        (wait_for_each_other, ["ranks use groups ep:0-3 and tp:2-3 in different orders, and wait for each other",
                               "rank 3: call 0 on tp:2-3 (barrier, step 0, layer -, strategy -, stream 0 (not ended)), "
                               "then call 0 on ep:0-3 (to which it has not come)",
                               "rank 2 did not come; its last call: ep:0-3 barrier"]),
    ],
)  # fmt: skip
def test_an_error_says_what_the_traces_show(monkeypatch, tmp_path, function, parts):
    monkeypatch.setenv("VLLM_NPU_RECORD", str(tmp_path))
    with ThreadRankPool(4, timeout=1) as pool:
        errors = [outcome for outcome in pool.outcomes(function) if outcome is not None]
    assert len(errors) >= 3
    assert all(isinstance(error, TransportError) for error in errors)
    for part in parts:
        assert any(part in str(error) for error in errors), (part, errors[0])


def traced_from_the_environment(rank: Rank) -> bool:
    return isinstance(rank.groups(tp_size=1, dp_size=2).ep, RecordingTransport)


def test_nothing_is_wrapped_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_NPU_RECORD", raising=False)
    with ThreadRankPool(2) as pool:
        assert pool.run(traced_from_the_environment) == [False, False]
        monkeypatch.setenv("VLLM_NPU_RECORD", str(tmp_path))
        assert pool.run(traced_from_the_environment) == [True, True]
