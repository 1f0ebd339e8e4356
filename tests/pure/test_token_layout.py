"""token_layout: slices cover every token once, unpadding undoes padding exactly, and packed rows keep every bit."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cases import SEEDS, same_bits, seeded
from vllm_npu.core.token_layout import (
    PACK_MAX_BYTES,
    RowFormat,
    TokenSlice,
    ceil_div,
    check_rows,
    chunk_sizes,
    even_sizes,
    offsets,
    pack,
    pad_rows,
    share_messages,
    unpad_rows,
)
from vllm_npu.errors import InvalidInputError

COUNTS = st.integers(0, 300)
SIZES = st.integers(1, 17)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.int8)
FIELDS = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 9)), min_size=1, max_size=5)


def rows_of(piece: TokenSlice) -> list[int]:
    return list(range(piece.start, piece.stop))


def any_bits(num_rows: int, fields: list[tuple[torch.dtype, int]], seed: int) -> list[torch.Tensor]:
    generator = seeded(seed)
    return [
        torch.randint(256, (num_rows, width * dtype.itemsize), generator=generator).to(torch.uint8).view(dtype)
        for dtype, width in fields
    ]


@given(COUNTS, SIZES)
def test_ceil_div_is_the_least_multiple_that_covers(a, b):
    assert b * (ceil_div(a, b) - 1) < a <= b * ceil_div(a, b)


@given(COUNTS, SIZES)
def test_even_slices_follow_one_another_and_differ_by_at_most_one_row(num_tokens, size):
    slices = [TokenSlice.even(num_tokens, rank=rank, size=size) for rank in range(size)]
    assert [row for piece in slices for row in rows_of(piece)] == list(range(num_tokens))
    lengths = [piece.length for piece in slices]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True), "the longer parts come first"


@given(COUNTS, SIZES)
@example(9, 4)
@example(5, 4)
@example(0, 3)
def test_chunks_give_each_token_to_the_rank_that_vllm_gives_it_to(num_tokens, size):
    slices = [TokenSlice.chunk(num_tokens, rank=rank, size=size) for rank in range(size)]
    padded = num_tokens + -num_tokens % size  # vLLM pads to a multiple of the group size, then cuts equal chunks
    chunk = padded // size
    for rank, piece in enumerate(slices):
        assert rows_of(piece) == [row for row in range(rank * chunk, (rank + 1) * chunk) if row < num_tokens]
        assert piece.length == len(rows_of(piece)), "a chunk without tokens has length 0, never less"


@given(COUNTS, SIZES)
def test_sizes_are_the_lengths_of_all_ranks_slices(num_tokens, size):
    for sizes, cut in ((even_sizes, TokenSlice.even), (chunk_sizes, TokenSlice.chunk)):
        assert sizes(num_tokens, size) == [cut(num_tokens, rank=rank, size=size).length for rank in range(size)]


def test_the_documented_examples_of_slices():
    assert even_sizes(9, 4) == [3, 2, 2, 2]
    assert chunk_sizes(9, 4) == [3, 3, 3, 0]


@given(COUNTS, SIZES, st.sampled_from([TokenSlice.even, TokenSlice.chunk]))
def test_taking_every_slice_gives_the_tensor_back(num_tokens, size, cut):
    x = torch.arange(num_tokens * 2).view(num_tokens, 2)
    parts = [cut(num_tokens, rank=rank, size=size).take(x) for rank in range(size)]
    assert torch.equal(torch.cat(parts), x)


@given(st.lists(st.integers(0, 9), max_size=8))
def test_offsets_split_a_row_range_into_its_parts(sizes):
    starts = offsets(sizes)
    assert len(starts) == len(sizes) + 1
    assert [starts[i + 1] - starts[i] for i in range(len(sizes))] == sizes
    assert (starts[0], starts[-1]) == (0, sum(sizes))


@given(st.integers(0, 20), st.integers(0, 20), st.sampled_from(DTYPES), st.sampled_from([(), (3,), (2, 0)]))
def test_unpad_undoes_pad(num_rows, missing, dtype, trailing):
    x = torch.arange(num_rows).view(-1, *[1] * len(trailing)).expand(num_rows, *trailing).to(dtype)
    before = x.clone()
    padded = pad_rows(x, num_rows + missing, -1)
    assert padded.dtype == dtype
    assert padded.shape == (num_rows + missing, *trailing)
    assert bool((padded[num_rows:] == -1).all())
    assert torch.equal(unpad_rows(padded, num_rows), x)
    if missing:
        padded.fill_(7)
        assert torch.equal(x, before), "padding copies: the caller's rows stay"


def test_padding_is_zero_unless_told():
    assert pad_rows(torch.ones(1, 2), 3).tolist() == [[1, 1], [0, 0], [0, 0]]


def test_nothing_is_copied_where_no_row_is_added_or_dropped():
    x = torch.ones(3, 2)
    assert pad_rows(x, 3) is x
    assert unpad_rows(x, 3) is x


@given(st.integers(1, 50), st.integers(1, 50))
def test_padding_to_fewer_rows_than_there_are_is_refused(length, surplus):
    with pytest.raises(
        InvalidInputError, match=rf"cannot pad {length + surplus} rows to {length}: .*planned for fewer"
    ):
        pad_rows(torch.zeros(length + surplus, 2), length)


@given(st.integers(0, 4), st.sampled_from(DTYPES))
def test_unpadding_lets_the_large_buffer_go(kept, dtype):
    gathered = torch.zeros(4096, 8, dtype=dtype)
    assert unpad_rows(gathered, kept).untyped_storage().nbytes() == kept * 8 * dtype.itemsize


@given(FIELDS, st.integers(0, 7), SEEDS)
@example([(torch.int8, 1), (torch.int64, 1), (torch.bfloat16, 3)], 1, 0)
def test_unpack_undoes_pack_bit_for_bit(fields, num_rows, seed):
    tensors = any_bits(num_rows, fields, seed)
    row_format = RowFormat.of(tensors)
    message = row_format.pack(tensors)
    assert (message.shape, message.dtype) == ((num_rows, row_format.row_bytes), torch.uint8)
    for before, after in zip(tensors, row_format.unpack(message.clone()), strict=True):
        assert same_bits(before, after)


@given(FIELDS, SEEDS, st.data())
def test_packed_rows_may_be_cut_and_reordered(fields, seed, data):
    tensors = any_bits(6, fields, seed)
    rows = data.draw(st.lists(st.integers(0, 5), max_size=9))
    row_format = RowFormat.of(tensors)
    moved = row_format.unpack(row_format.pack(tensors)[rows])
    for before, after in zip(tensors, moved, strict=True):
        assert same_bits(before[rows], after)


@given(FIELDS)
def test_fields_are_aligned_apart_and_inside_the_row(fields):
    row_format = RowFormat.of(any_bits(0, fields, 0))
    end = 0
    for dtype, width, start in zip(row_format.dtypes, row_format.widths, row_format.starts, strict=True):
        assert start % dtype.itemsize == 0
        assert end <= start < end + dtype.itemsize, "no overlap, and no more than alignment in between"
        end = start + width * dtype.itemsize
    alignment = max(dtype.itemsize for dtype, _ in fields)
    assert row_format.row_bytes % alignment == 0
    assert end <= row_format.row_bytes < end + alignment


def test_packing_reads_strided_rows_and_writes_none_of_them():
    columns = torch.arange(12, dtype=torch.float32).view(4, 3).t()  # [3, 4], not contiguous
    ids = torch.arange(12, dtype=torch.int64).view(3, 4)[:, ::2]
    before = (columns.clone(), ids.clone())
    row_format = RowFormat.of((columns, ids))
    message = row_format.pack((columns, ids))
    for tensor, field, copy in zip((columns, ids), row_format.unpack(message), before, strict=True):
        assert torch.equal(field, tensor)
        assert torch.equal(tensor, copy)
    message.fill_(255)
    assert torch.equal(columns, before[0]), "the message is memory of its own"


@pytest.mark.parametrize("num_rows", [1, 3])
def test_packing_takes_a_single_column_of_any_stride(num_rows):
    scales = torch.arange(1, num_rows + 1, dtype=torch.float32)[:, None]
    for column in (scales.as_strided(scales.shape, (1, 0)), scales.as_strided(scales.shape, (1, 7))):
        assert column.is_contiguous(), "contiguous() would return the column itself"
        unpacked, _ = RowFormat.of((column, scales)).unpack(RowFormat.of((column, scales)).pack((column, scales)))
        assert torch.equal(unpacked, scales)


@given(FIELDS, st.integers(0, 7), SEEDS, st.booleans())
def test_tensors_share_one_message_up_to_the_limit_and_the_first_is_alone_above(fields, num_rows, seed, above):
    tensors = any_bits(num_rows, fields, seed)
    messages, moved = [], []
    row_bytes = sum(width * dtype.itemsize for dtype, width in fields)
    for together in share_messages(tensors, PACK_MAX_BYTES // row_bytes + above):
        message, unpack = pack(together)
        messages.append(message.shape)
        moved += unpack(message.flip(0))
    for before, after in zip(tensors, moved, strict=True):
        assert same_bits(before.flip(0), after)
    if len(fields) == 1:
        assert messages == [tensors[0].shape], "one tensor is its own message"
    elif not above:
        assert messages == [(num_rows, RowFormat.of(tensors).row_bytes)]
    else:
        assert messages[0] == tensors[0].shape
        assert len(messages) == 2, "the rest is below the limit again, so it shares one message"


def test_all_ranks_choose_the_same_number_of_messages_whatever_they_bring():
    def messages(own_rows: int, max_rows: int) -> int:
        return len(share_messages([torch.zeros(own_rows, 1024), torch.zeros(own_rows, 8)], max_rows))

    assert [messages(own_rows, 10_000) for own_rows in (0, 1, 50)] == [2, 2, 2]
    assert [messages(own_rows, 50) for own_rows in (0, 1, 50)] == [1, 1, 1]


@pytest.mark.parametrize("shape", [(3,), (2, 4), (4, 4), (3, 4, 1)])
def test_rows_of_another_number_are_refused_with_their_meaning(shape):
    check_rows(torch.zeros(3, 4), 3, name="x", stage="Stage.end", meaning="a row for each token")
    message = f"x has shape {shape}; Stage.end needs [3, width], a row for each token"
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        check_rows(torch.zeros(shape), 3, name="x", stage="Stage.end", meaning="a row for each token")
