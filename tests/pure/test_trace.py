"""compare() on traces that were drawn, and made wrong in one place; the files of TraceRing."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import SEEDS
from vllm_npu.errors import InvalidInputError
from vllm_npu.trust import trace
from vllm_npu.trust.timeline import timeline
from vllm_npu.trust.trace import Call, Group, RankTrace, TraceRing, read_trace, read_traces
from vllm_npu.trust.trace_comparison import Kind, compare, report

WORLD = 4
GROUPS = [
    *(Group(name="tp", members=members) for members in ((0, 1), (2, 3))),
    *(Group(name="dp", members=members) for members in ((0, 2), (1, 3))),
    Group(name="ep", members=(0, 1, 2, 3)),
]


def program(seed: int, length: int = 30) -> dict[int, list[Call]]:
    """A right run of TP2 x DP2: each step of the program is one call on all groups of a name."""
    draw = random.Random(seed)
    calls: dict[int, list[Call]] = {rank: [] for rank in range(WORLD)}
    for position in range(length):
        name = draw.choice(["tp", "dp", "ep"])
        operation = draw.choice(["all_gather", "reduce_scatter", "all_to_all", "all_reduce", "broadcast from 1"])
        facts = {
            "row": draw.choice(["bfloat16[32]", "int32[3]"]),
            "step": position // 10,
            "layer": f"layer {position // 5}",
        }
        for group in (group for group in GROUPS if group.name == name):
            sizes = tuple(draw.randrange(5) for _ in group.members)
            matrix = [tuple(draw.randrange(5) for _ in group.members) for _ in group.members]
            for place, rank in enumerate(group.members):
                rows = {"sizes": sizes}
                if operation == "all_to_all":
                    rows = {"sent": matrix[place], "received": tuple(row[place] for row in matrix)}
                calls[rank].append(
                    Call(group=group, number=0, operation=operation, strategy="all2all", **facts, **rows)
                )
    return calls


def traces_of(calls: dict[int, list[Call]]) -> list[RankTrace]:
    """As TraceRing would number the calls."""
    traces = []
    for rank, made in calls.items():
        numbers: dict[Group, int] = {}
        numbered = []
        for index, call in enumerate(made):
            number = numbers[call.group] = numbers.get(call.group, -1) + 1
            numbered.append(replace(call, number=number, index=index))
        traces.append(RankTrace(rank=rank, calls=tuple(numbered), world_size=WORLD))
    return traces


@given(SEEDS, st.integers(0, 25), st.integers(0, 25))
def test_a_right_run_has_no_findings_wherever_the_rings_begin_and_end(seed, dropped, behind):
    traces = traces_of(program(seed))
    traces[1] = replace(traces[1], calls=traces[1].calls[dropped:])
    traces[2] = replace(traces[2], calls=traces[2].calls[: len(traces[2].calls) - behind])
    assert compare(traces) == []
    assert compare(traces[1:3]) == []


@given(SEEDS, st.integers(0, WORLD - 1), st.data())
def test_one_changed_call_is_the_first_finding_and_names_its_rank_layer_and_strategy(seed, rank, data):
    calls = program(seed)
    position = data.draw(st.integers(0, len(calls[rank]) - 1))
    field, value = data.draw(
        st.sampled_from(
            [("operation", "barrier"), ("row", "float16[7]"), ("layer", "wrong"), ("strategy", "naive"), ("step", 99)]
        )
    )
    calls[rank][position] = replace(calls[rank][position], **{field: value})
    traces = traces_of(calls)
    wrong = traces[rank].calls[position]
    findings = compare(traces)
    assert [finding.kind for finding in findings] == [Kind.DIFFERENCE]
    assert findings[0].group == wrong.group
    assert findings[0].ranks == wrong.group.members
    assert findings[0].text.startswith(f"call {wrong.number} on group {wrong.group}: ranks make different calls")
    others = [other for other in wrong.group.members if other != rank]
    assert f"ranks [{rank}]: {wrong}" in findings[0].text
    assert f"ranks {others}: " in findings[0].text
    assert f"strategy {wrong.strategy}" in findings[0].text


def test_the_first_difference_in_time_comes_first():
    one, other = (Group(name=name, members=(0, 1)) for name in ("tp", "ep"))
    calls = {
        rank: [
            Call(group=one, number=0, operation="barrier"),
            Call(group=one, number=0, operation="barrier", step=rank),  # the second of its group, and the first in time
            Call(group=other, number=0, operation="barrier", step=rank),
        ]
        for rank in range(2)
    }
    assert [finding.group for finding in compare(traces_of(calls))] == [one, other]


@given(SEEDS, st.integers(0, WORLD - 1), st.data())
def test_a_changed_size_is_found(seed, rank, data):
    calls = program(seed)
    position = data.draw(st.integers(0, len(calls[rank]) - 1))
    call = calls[rank][position]
    field = "sent" if call.operation == "all_to_all" else "sizes"
    rows = list(getattr(call, field))
    place = data.draw(st.integers(0, len(rows) - 1))
    rows[place] += 1
    calls[rank][position] = replace(call, **{field: tuple(rows)})
    [finding] = compare(traces_of(calls))
    assert finding.kind is Kind.DIFFERENCE
    if field == "sent":
        receiver = call.group.members[place]
        assert (
            f"rank {rank} sends {rows[place]} rows to rank {receiver}, which expects {rows[place] - 1}" in finding.text
        )


@given(SEEDS, st.integers(0, WORLD - 1), st.data())
def test_a_call_left_out_is_found_at_the_first_call_that_meets_another(seed, rank, data):
    calls = program(seed)
    position = data.draw(st.integers(0, len(calls[rank]) - 1))
    group = calls[rank].pop(position).group
    right, wrong = traces_of(program(seed)), traces_of(calls)
    findings = compare(wrong)
    mine = [call.must_be_equal for call in wrong[rank].calls if call.group == group]
    theirs = [call.must_be_equal for call in right[rank].calls if call.group == group]
    shifted = [number for number, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other]
    different = [finding for finding in findings if finding.kind is Kind.DIFFERENCE and finding.group == group]
    if shifted:
        assert f"call {shifted[0]} on group {group}" in different[0].text
    else:  # calls without sizes that meet a like one: sizes of an all_to_all may still tell
        assert all("sends" in finding.text for finding in different)


@given(SEEDS, st.sampled_from([(0, 1, "tp"), (0, 2, "dp"), (3, 1, "dp"), (2, 3, "tp")]))
def test_two_groups_in_different_order_on_two_ranks_are_a_cycle(seed, pair):
    one, other, name = pair
    calls = program(seed)
    both = next(group for group in GROUPS if group.name == name and {one, other} <= set(group.members))
    everyone = GROUPS[-1]
    where = random.Random(seed).randrange(len(calls[0]) + 1)
    for rank in range(WORLD):
        pair_of_calls = [Call(group=everyone, number=0, operation="barrier", stream=1)]
        if rank in both.members:
            pair_of_calls.insert(0 if rank == one else 1, Call(group=both, number=0, operation="barrier", stream=0))
        calls[rank][where:where] = pair_of_calls
    findings = compare(traces_of(calls))
    [order] = [finding for finding in findings if finding.kind is Kind.ORDER]
    assert order.ranks == tuple(sorted((one, other)))
    assert f"ranks use groups {' and '.join(sorted((str(both), str(everyone))))} in different orders" in order.text
    assert "barrier" in order.text
    assert findings == [order]


def test_a_cycle_over_three_ranks_of_which_no_two_share_two_groups():
    a, b, c = (Group(name="p2", members=members) for members in ((0, 1), (1, 2), (0, 2)))
    barrier = {"number": 0, "operation": "barrier"}
    orders = {0: (c, a), 1: (a, b), 2: (b, c)}
    calls = {rank: [Call(group=group, **barrier) for group in groups] for rank, groups in orders.items()}
    [finding] = compare(traces_of(calls))
    assert (finding.kind, finding.ranks) == (Kind.ORDER, (0, 1, 2))
    calls[2].reverse()
    assert compare(traces_of(calls)) == []


@given(SEEDS, st.integers(0, WORLD - 1), st.data())
def test_ranks_that_wait_and_the_one_that_did_not_come_are_named(seed, late, data):
    """The late rank stops before a call on ep; the others, and nobody else, are inside it."""
    calls = program(seed)
    for made in calls.values():
        made.append(Call(group=GROUPS[-1], number=0, operation="all_gather", layer="last", strategy="naive"))
    traces = traces_of(calls)
    for rank in range(WORLD):
        made = traces[rank].calls
        made = made[:-1] if rank == late else (*made[:-1], replace(made[-1], done=False))
        traces[rank] = replace(traces[rank], calls=made)
    [finding] = compare(traces)
    assert (finding.kind, finding.ranks) == (Kind.WAITING, (late,))
    others = [rank for rank in range(WORLD) if rank != late]
    assert f"ranks {others} are in call " in finding.text
    assert f"rank {late} did not come; its last call: {traces[late].calls[-1].group} " in finding.text
    [finding] = compare([trace for trace in traces if trace.rank != late])
    assert finding.ranks == (late,)
    assert f"ranks [{late}]: no trace of them here" in finding.text


@given(st.sets(st.integers(0, 900), min_size=1), st.text("abc- ", min_size=1, max_size=9))
def test_a_group_is_read_as_it_was_written(members, name):
    group = Group(name=name, members=tuple(sorted(members)))
    assert Group.parse(str(group)) == group


def test_regular_groups_are_short():
    assert str(Group(name="dp", members=tuple(range(3, 768, 8)))) == "dp:3-763/8"


# --- the files ---

EP = GROUPS[-1]


def test_a_ring_keeps_the_last_calls_and_says_which_did_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "RING_CALLS", 8)
    ring = TraceRing.create(tmp_path / "new", rank=3, world_size=WORLD)
    for step in range(20):
        ring.enter_step(step, "mc2")
        ring.enter_layer("model.layers.0")
        call = ring.begin(EP, "all_gather", row="int32[1]", sizes=[1, 2, 3, step], stream=2)
        if step == 18:
            late = call
            continue
        ring.end(call)
    found = read_trace(tmp_path / "new" / "rank3.trace")
    assert (found.rank, found.world_size) == (3, WORLD)
    assert [call.index for call in found.calls] == list(range(12, 20))
    assert [call.done for call in found.calls] == [step != 18 for step in range(12, 20)]
    assert found.calls[-1] == Call(
        group=EP, number=19, operation="all_gather", row="int32[1]", sizes=(1, 2, 3, 19), stream=2,
        layer="model.layers.0", step=19, strategy="mc2", index=19,
    )  # fmt: skip
    ring.end(late, sent=[1, 2, 3, 4], received=[5, 6, 7, 8])
    assert read_trace(ring.path).calls[-2].received == (5, 6, 7, 8)
    for _ in range(20):
        ring.end(ring.begin(EP, "barrier"))
    ring.end(late)  # overwritten since: leaves the ring alone
    assert all(call.operation == "barrier" for call in read_trace(ring.path).calls)


def test_a_file_is_its_owners_alone_and_never_somebody_elses(tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / "rank0.trace").symlink_to(other)
    ring = TraceRing.create(tmp_path, 0, 1)
    assert other.read_text() == "kept"
    assert ring.path.lstat().st_mode & 0o177777 == 0o100600


def test_what_does_not_fit_a_line_is_kept_as_a_checksum_that_still_compares(tmp_path):
    members = Group(name="ep", members=tuple(range(768)))
    for rank in range(2):
        ring = TraceRing.create(tmp_path, rank, 768)
        ring.enter_layer("x" * 600)
        for last in (1, 1 + rank):
            ring.end(ring.begin(members, "all_gather", sizes=[1] * 767 + [last]))
        ring.end(ring.begin(members, "all_to_all", sent=[rank] * 768, received=[rank] * 768))
    [finding] = compare(read_traces([tmp_path]))
    assert finding.text.startswith("call 1 on group ep:0-767: ranks make different calls")
    assert "sizes [-768, 769, " in finding.text


def test_sends_to_single_ranks_do_not_shift_the_numbers(tmp_path):
    for rank in range(2):
        ring = TraceRing.create(tmp_path, rank, 2)
        group = Group(name="ep", members=(0, 1))
        if rank == 0:
            ring.end(ring.begin(group, "send_recv"))
        ring.end(ring.begin(group, "barrier"))
    assert compare(read_traces([tmp_path])) == []


def test_a_half_written_line_is_left_out(tmp_path):
    ring = TraceRing.create(tmp_path, 0, 1)
    for _ in range(3):
        ring.end(ring.begin(EP, "barrier"))
    content = bytearray(ring.path.read_bytes())
    content[2 * trace.LINE_BYTES + 20 : 2 * trace.LINE_BYTES + 60] = b" " * 40
    ring.path.write_bytes(content)
    assert [call.index for call in read_trace(ring.path).calls] == [0, 2]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, "ep:0-999999999999"),
        (0, "ep:3-1"),
        (0, "ep:0-3/-1"),
        (0, 5),
        (0, "ep"),
        (1, "0"),
        (4, [[1]]),
        (4, None),
        (7, True),
        (11, 1.5),
        (11, "x"),
    ],
)
def test_a_line_that_is_no_calls_is_left_out_and_allocates_nothing(tmp_path, place, value):
    ring = TraceRing.create(tmp_path, 0, 1)
    for _ in range(2):
        ring.end(ring.begin(EP, "barrier", sizes=[1, 2]))
    content = bytearray(ring.path.read_bytes())
    line = slice(trace.LINE_BYTES, 2 * trace.LINE_BYTES)
    values = json.loads(content[line][1 : -trace.TIME_BYTES])
    values[place] = value
    content[line] = (trace.DONE + json.dumps(values)).encode().ljust(trace.LINE_BYTES - 2) + b"0\n"
    ring.path.write_bytes(content)
    assert [call.index for call in read_trace(ring.path).calls] == [1]


@pytest.mark.parametrize("content", ["", "hello\n", '{"trace": 1}', '{"trace": 99, "rank": 0}', "[]"])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "rank0.trace"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=r"is no trace of collectives|of version (1|99), not 2"):
        read_traces([tmp_path])


def test_a_timeline_has_a_row_for_each_rank_and_group_and_shows_the_call_that_hangs(tmp_path):
    dp = Group(name="dp", members=(0, 1))
    for rank in (0, 1):
        ring = TraceRing.create(tmp_path, rank, 2)
        ring.enter_step(4, "mc2")
        ring.end(ring.begin(dp, "all_gather", sizes=[2, 3]))
        ring.end(ring.begin(Group(name="ep", members=(0, 1)), "send_recv"))
        call = ring.begin(dp, "reduce_scatter")
        if rank == 0:
            ring.end(call)
    traces = read_traces([tmp_path])
    events = timeline(traces)["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert [(event["pid"], event["tid"], event["name"]) for event in drawn] == [
        (0, 0, "all_gather"), (0, 1, "send_recv"), (0, 0, "reduce_scatter"),
        (1, 0, "all_gather"), (1, 1, "send_recv"), (1, 0, "NOT ENDED reduce_scatter"),
    ]  # fmt: skip
    for event, call in zip(drawn, [call for each in traces for call in each.calls], strict=True):
        assert event["ts"] == call.began > 1.7e15
        assert event["dur"] >= max(call.ended - call.began, 1)
        assert ("cname" in event) == (not call.done)
    arrows = [(event["ph"], event["pid"], event["id"]) for event in events if event["ph"] in "sf"]
    assert arrows == [("s", 0, "0.1"), ("f", 1, "0.1"), ("s", 0, "1.1"), ("f", 1, "1.1")], "none between single ranks"
    names = {event["args"]["name"] for event in events if event["name"] in ("process_name", "thread_name")}
    assert {"dp:0-1", "ep:0-1", f"rank 1 on {traces[1].host}"} <= names
    assert timeline([]) == {"traceEvents": []}


def test_traces_that_cannot_be_of_one_run_are_refused(tmp_path):
    for rank, world in ((0, 2), (1, 4)):
        TraceRing.create(tmp_path, rank, world)
    with pytest.raises(InvalidInputError, match=r"runs of \[2, 4\] ranks"):
        read_traces([tmp_path])
    with pytest.raises(InvalidInputError, match="several traces of one rank"):
        compare([RankTrace(rank=1, calls=())] * 2)
    with pytest.raises(InvalidInputError, match="cannot record collectives"):
        TraceRing.create(tmp_path / "rank0.trace", 0, 1)


def test_doctor_compares_files_without_importing_torch(tmp_path):
    for rank in range(2):
        ring = TraceRing.create(tmp_path / "run", rank, 2)
        ring.enter_step(5, "all2all")
        ring.enter_layer("model.layers.7")
        ring.end(ring.begin(Group(name="ep", members=(0, 1)), ["all_gather", "all_reduce"][rank], sizes=[1, 1]))
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    files = ["--json", str(tmp_path / "out.json"), "--timeline", str(tmp_path / "timeline.json")]
    command = [sys.executable, "-m", "vllm_npu.cli", "doctor", *files, "--trace"]
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": ""}
    done = subprocess.run(
        [*command, str(tmp_path / "run")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "ranks [0]: all_gather, sizes [1, 1], step 5, layer model.layers.7, strategy all2all" in done.stdout
    assert "2 calls of ranks [0, 1]: 1 findings" in done.stdout
    [finding] = json.loads((tmp_path / "out.json").read_text())["findings"]
    assert finding["ranks"] == [0, 1]
    assert len(json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]) == 10
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, "no traces in" in done.stderr) == (1, True)


def test_report_of_nothing():
    assert report([]) == "no traces"
    assert (
        report([RankTrace(rank=1, calls=(), world_size=3)]) == "0 calls of ranks [1] (no trace of [0, 2]): 0 findings"
    )
