"""Sizes of the symmetric strategy's windows and launches, and the reasons against it. Needs no GPU."""

from dataclasses import replace

import pytest

from vllm_npu.core.limits import SYMMETRIC
from vllm_npu.strategies.dispatch.symmetric_launch import CHUNK_BYTES, LaunchShape, programs_for
from vllm_npu.strategies.dispatch.symmetric_layout import SlotLayout, why_not_symmetric
from vllm_npu.transport.symmetric_memory import ALIGNMENT, SymmetricFacts, WindowSize

FACTS = SymmetricFacts(num_ranks=8, num_hosts=1, cuda=True, peer_access=True, triton=True)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_local_gpus_with_peer_access_are_taken(num_ranks):
    assert why_not_symmetric(replace(FACTS, num_ranks=num_ranks), tokens_per_rank=SYMMETRIC.max_tokens_per_rank) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cuda": False}, "not every rank has a CUDA device of its own"),
        ({"triton": False}, "Triton is not installed on every rank"),
        ({"num_ranks": 1}, "there is one rank only"),
        ({"num_ranks": 9}, "9 ranks are more than 8"),
        ({"num_hosts": 2}, "the ranks are on 2 hosts"),
        ({"peer_access": False}, "not every GPU can write every other GPU's memory"),
    ],
)
def test_what_is_missing_is_named(change, reason):
    assert why_not_symmetric(replace(FACTS, **change), tokens_per_rank=1) == reason


def test_steps_larger_than_the_windows_are_refused():
    answer = why_not_symmetric(FACTS, tokens_per_rank=SYMMETRIC.max_tokens_per_rank + 1)
    assert answer == "4097 tokens a rank are more than 4096"


@pytest.mark.parametrize(
    ("num_slots", "row_bytes", "scale_width", "top_k"), [(0, 2, 0, 1), (3, 14, 1, 3), (64, 7168, 56, 8)]
)
def test_parts_of_a_layout_are_aligned_and_do_not_overlap(num_slots, row_bytes, scale_width, top_k):
    layout = SlotLayout(num_slots, row_bytes, scale_width, top_k)
    offsets = [0, layout.scales_offset, layout.weights_offset, layout.ids_offset, layout.num_bytes]
    widths = [row_bytes, 4 * scale_width, 4 * top_k, 4 * top_k]
    for start, stop, width in zip(offsets, offsets[1:], widths, strict=False):
        assert start % ALIGNMENT == 0
        assert 0 <= stop - start - num_slots * width < ALIGNMENT


@pytest.mark.parametrize("row_bytes", [4, 48, 2000, 14336, 28672, 50000])
@pytest.mark.parametrize("unit_bytes", [2, 4])
def test_programs_cover_a_row_and_have_flags(row_bytes, unit_bytes):
    for num_tokens in (1, 2, 15, 16, 17, 255, 1024, 1025, 4096):
        shape = LaunchShape.of(num_tokens, row_bytes, unit_bytes)
        units = row_bytes // unit_bytes
        assert (shape.parts - 1) * shape.tile < units <= shape.parts * shape.tile
        assert shape.tile & (shape.tile - 1) == 0
        assert shape.parts * num_tokens <= programs_for(num_tokens, row_bytes)
        assert programs_for(num_tokens, row_bytes) <= programs_for(4096, row_bytes)


@pytest.mark.parametrize("max_sms", [1, 7, 24, 1000])
@pytest.mark.parametrize("row_bytes", [4, 2000, 14336, 50000])
@pytest.mark.parametrize("unit_bytes", [2, 4])
def test_few_programs_cover_all_rows_and_have_flags(row_bytes, unit_bytes, max_sms):
    for num_tokens in (1, 2, 17, 1025, 4096):
        shape = LaunchShape.of(num_tokens, row_bytes, unit_bytes, max_sms)
        chunks = -(-num_tokens // shape.rows) * shape.parts
        assert 1 <= shape.programs <= min(max_sms, chunks)
        assert shape.programs == max_sms or shape.programs == chunks, (
            "no multiprocessor stands idle that a chunk could use"
        )
        assert chunks <= programs_for(num_tokens, row_bytes)
        assert (shape.parts - 1) * shape.tile < row_bytes // unit_bytes <= shape.parts * shape.tile
        assert shape.rows * shape.tile * unit_bytes <= CHUNK_BYTES
        assert all(each & (each - 1) == 0 for each in (shape.rows, shape.tile, shape.num_warps))


def test_a_window_holds_what_is_no_larger_in_any_part():
    size = WindowSize(received_bytes=10, returned_bytes=20, rank_flags=30)
    assert size.fits(size)
    assert size.fits(replace(size, received_bytes=1))
    for part in ("received_bytes", "returned_bytes", "rank_flags"):
        assert not size.fits(replace(size, **{part: 31}))
