"""Laws of training windows: pure, disjoint, covering, in proportion; and of streams in memory."""

import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import default_data_collator

from dyadlm.data import TokenStream, TrainingWindows, byte_tokenizer
from dyadlm.data.batches import tag_code
from dyadlm.data.streams import Segment, SegmentTable
from dyadlm.errors import UserError


def numbers(size: int, name: str = "numbers") -> TokenStream:
    """A stream in which every token says where it is."""
    return TokenStream.from_tokens(np.arange(size), byte_lengths=np.ones(size), name=name)


@given(size=st.integers(2, 300), length=st.integers(2, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_windows_of_an_epoch_are_disjoint_and_cover(size, length, seed, epoch):
    if size < length:
        size, length = length, size
    count = size // length
    windows = TrainingWindows([(numbers(size), 1.0)], length, 4 * count, seed)
    seen = torch.cat([windows[number]["input_ids"] for number in range(epoch * count, (epoch + 1) * count)])
    assert len(set(seen.tolist())) == len(seen) == count * length > size - length
    for number in range(epoch * count, (epoch + 1) * count):
        window = windows[number]["input_ids"]
        assert torch.equal(window, (window[0] + torch.arange(length)) % size)


def test_epochs_differ_in_phase_and_order():
    windows = TrainingWindows([(numbers(1000), 1.0)], 10, 300, seed=3)
    epochs = [[windows.place(number)[1] for number in range(start, start + 100)] for start in (0, 100, 200)]
    assert len({start % 10 for epoch in epochs for start in epoch}) > 1
    assert epochs[0] != sorted(epochs[0])
    assert all(first != second for first, second in pairwise(epochs))


@given(seed=st.integers(0, 2**32), other=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_an_item_depends_on_seed_and_number_alone(seed, other):
    streams = [(numbers(500), 1.0), (numbers(90), 0.3)]
    windows = TrainingWindows(streams, 8, 400, seed)
    order = list(range(400))
    np.random.default_rng(0).shuffle(order)
    jumbled = {number: windows[number]["input_ids"] for number in order}
    longer = TrainingWindows(streams, 8, 4000, seed)
    assert all(torch.equal(jumbled[number], longer[number]["input_ids"]) for number in range(400))
    different = TrainingWindows(streams, 8, 400, other)
    same = all(torch.equal(jumbled[number], different[number]["input_ids"]) for number in range(400))
    assert same == (seed == other)


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), length=st.integers(1, 400))
@settings(deadline=None)
def test_sources_are_mixed_in_proportion_at_every_moment(weights, length):
    windows = TrainingWindows([(numbers(40), weight) for weight in weights], 4, length)
    taken = Counter()
    for number in range(length):
        taken[windows.place(number)[0]] += 1
        for source, weight in enumerate(weights):
            share = weight / sum(weights) * (number + 1)
            assert abs(taken[source] - share) < source + 1 + 1e-3


def test_each_source_goes_through_its_own_windows():
    first, second = numbers(100, "first"), TokenStream.from_tokens(np.arange(1000, 1050))
    windows = TrainingWindows([(first, 2.0), (second, 1.0)], 10, 15)
    seen = torch.cat([windows[number]["input_ids"] for number in range(15)]).tolist()
    assert sorted(seen) == [*range(100), *range(1000, 1050)]


def test_documents_reset():
    stream = TokenStream.from_text(["abc", "de", "fghij"], byte_tokenizer())
    windows = TrainingWindows([(stream, 1.0)], 13, 3, document_reset=True, with_index=True, with_segments=True)
    for number in range(3):
        item = windows[number]
        start = windows.place(number)[1]
        position = 0
        for at in range(13):
            token = (start + at) % 13
            fresh = at == 0 or token in (0, 4, 7)
            position = 0 if fresh else position + 1
            assert item["position_ids"][at] == position
            assert item["labels"][at] == (-100 if fresh else item["input_ids"][at])
            assert item["index"][at] == token
            document = "text" if token < 4 else "text#2" if token < 7 else "text#3"
            assert windows.segment(int(item["segments"][at])) == (document, "", "text")


@st.composite
def carried(draw):
    """Windows of one to three streams that lanes read, and the shares of the streams."""
    length, lanes = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(2 * length * lanes, 40 * length), min_size=1, max_size=3))
    weights = draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    streams = [(numbers(size), weight) for size, weight in zip(sizes, weights, strict=True)]
    windows = TrainingWindows(streams, length, draw(st.integers(1, 300)), draw(st.integers(0, 99)), lanes=lanes)
    return windows, [weight / sum(weights) for weight in weights]


@given(reading=carried())
@settings(deadline=None)
def test_lanes_go_on_where_they_stood_or_say_that_they_do_not(reading):
    windows, _ = reading
    length, order = windows.sequence_length, list(range(len(windows)))
    np.random.default_rng(0).shuffle(order)
    items = {number: windows[number] for number in order}  # resuming begins anywhere
    assert windows.run_windows >= 2
    for number, item in items.items():
        source, start = windows.place(number)
        size = len(windows.streams[source])
        assert torch.equal(item["input_ids"], (start + torch.arange(length)) % size)
        before = number // windows.lanes % windows.run_windows
        assert torch.equal(item["position_ids"], before * length + torch.arange(length))
        if before:
            assert windows.place(number - windows.lanes) == (source, (start - length) % size)


@given(reading=carried())
@settings(deadline=None)
def test_lanes_read_disjoint_runs_and_keep_the_shares(reading):
    windows, weights = reading
    runs = [len(stream) // (windows.run_windows * windows.sequence_length) for stream in windows.streams]
    taken, seen = Counter(), {}
    for number in range(len(windows)):
        (source, _), before = windows.place(number), number // windows.lanes % windows.run_windows
        taken[source] += 1
        for other, weight in enumerate(weights):
            bound = (other + 1) * (windows.run_windows + 2) + 1e-3
            assert abs(taken[other] - weight * (number + 1)) < bound
        if not before:  # a run begins
            rank = sum(source == first for first, _ in seen)
            seen[source, rank] = windows.place(number)[1]
    for source, count in enumerate(runs):
        for epoch in range(3):
            ranks = range(epoch * count, (epoch + 1) * count)
            starts = [seen[source, rank] for rank in ranks if (source, rank) in seen]
            size, length = len(windows.streams[source]), windows.run_windows * windows.sequence_length
            covered = [(start + at) % size for start in starts for at in range(length)]
            assert len(covered) == len(set(covered))


def test_one_stream_feeds_every_lane_an_equal_part():
    windows = TrainingWindows([(numbers(1003), 1.0)], 10, 400, lanes=4)
    assert windows.run_windows == 25
    epoch = torch.cat([windows[number]["input_ids"] for number in range(100)])
    assert len(set(epoch.tolist())) == 1000


def test_documents_reset_in_lanes():
    stream = TokenStream.from_text(["abc", "de", "fghijklm"], byte_tokenizer())
    windows = TrainingWindows([(stream, 1.0)], 3, 40, document_reset=True, lanes=2)
    assert windows.run_windows == 2
    for lane in range(2):
        for step in range(20):
            item = windows[2 * step + lane]
            start = windows.place(2 * step + lane)[1]
            if step % 2 == 0:
                position = -1
            for at in range(3):
                first = (start + at) % 16 in (0, 4, 7)
                position = 0 if first else position + 1
                assert item["position_ids"][at] == position
                assert item["labels"][at] == (-100 if position == 0 else item["input_ids"][at])


def test_items_are_batched_by_the_default_collator():
    windows = TrainingWindows([(numbers(64), 1.0)], 8, 6, with_index=True)
    batches = list(DataLoader(windows, batch_size=3, collate_fn=default_data_collator))
    assert [batch["input_ids"].shape for batch in batches] == [(3, 8), (3, 8)]
    assert all(value.dtype == torch.int64 for batch in batches for value in batch.values())
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])
    assert len(windows) == 6
    with pytest.raises(IndexError):
        windows[6]


def test_requests_that_are_wrong():
    with pytest.raises(UserError, match="numbers has 7 tokens, less than one window of 8"):
        TrainingWindows([(numbers(7), 1.0)], 8, 1)
    with pytest.raises(UserError, match="positive"):
        TrainingWindows([(numbers(9), 0.0)], 8, 1)
    with pytest.raises(UserError, match="nothing to train on"):
        TrainingWindows([], 8, 1)
    with pytest.raises(UserError, match="at least 2"):
        TrainingWindows([(numbers(9), 1.0)], 1, 1)
    with pytest.raises(UserError, match=r"few has 63 tokens, less than two windows of 8 for each of the 4 lanes"):
        TrainingWindows([(numbers(63, "few"), 1.0)], 8, 1, lanes=4)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
@settings(deadline=None)
def test_slices_across_chunks(sizes, data):
    whole = np.arange(sum(sizes), dtype=np.int32)
    chunks = np.split(whole, np.cumsum(sizes)[:-1])
    table = numbers(max(len(whole), 1)).segments
    stream = TokenStream(chunks, lambda: table, chunks, index_start=50)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert stream.tokens(start, stop).tolist() == whole[start:stop].tolist()
    assert stream.tokens(start, stop).dtype == np.int32
    assert stream.index(start, stop).tolist() == list(range(50 + start, 50 + stop))
    assert stream.bytes_of(start, stop) == whole[start:stop].sum()
    with pytest.raises(IndexError):
        stream.tokens(start, len(whole) + 1)


def test_documents_of_a_stream_in_memory():
    stream = TokenStream.from_text(["abc", "", b"\xff"], byte_tokenizer(), name="page")
    assert stream.documents == [(0, 4, "page"), (4, 5, "page#2"), (5, 7, "page#3")]
    assert stream.bytes_of(0, 7) == 4
    assert TokenStream.from_tokens([1, 2, 3]).documents == [(0, 3, "tokens")]


def test_tags_say_document_section_and_kind_alike_in_every_stream():
    table = SegmentTable.from_segments([
        Segment(0, "Hamlet", "Act 1", "verse"), Segment(4, "Hamlet", "Act 1", "prose"), Segment(7, "Lear", "", "verse"),
    ])  # fmt: skip
    tagged = TokenStream([np.arange(10, dtype=np.int32)], lambda: table)
    other = TokenStream([np.arange(20, dtype=np.int32)], lambda: SegmentTable.from_segments([Segment(0, *lear)]))
    lear = ("Lear", "", "verse")
    windows = TrainingWindows([(tagged, 1.0), (other, 1.0)], 10, 8, with_tags=True, with_segments=True)
    seen = set()
    for number in range(8):
        item = windows[number]
        assert item["tags"].shape == (10, 3)
        assert item["tags"].dtype == torch.int64
        for codes, segment in zip(item["tags"].tolist(), item["segments"].tolist(), strict=True):
            assert codes == [tag_code(name) for name in windows.segment(segment)]
        seen.add(windows.place(number))
    assert {source for source, _ in seen} == {0, 1}
    assert len({start for source, start in seen if source == 0}) > 1  # around the ring too
    names = ["Hamlet", "Lear", "Act 1", "", "verse", "prose"]
    assert len({tag_code(name) for name in names}) == len(names)
    assert all(-(2**63) <= tag_code(name) < 2**63 for name in names)
    assert tag_code("Lear") == -2436340275145767243  # of every run


def test_names_of_many_documents_stay_outside_of_python():
    names, alike = pa.array([f"texts.jsonl:{number}" for number in range(20_000)]), pa.array(["text"] * 20_000)
    starts = np.arange(20_000)
    tracemalloc.start()
    table = SegmentTable.from_arrow(starts, names, alike, alike)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert table[7] == Segment(7, "texts.jsonl:7", "text", "text")
    assert most < 200_000  # a string of Python takes some 60 bytes
