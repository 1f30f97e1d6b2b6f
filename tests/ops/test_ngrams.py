"""Rows of hashed n-grams against their definition in Python's integers: whole, chunked, padded and packed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import make_clock, reference
from dyadlm.ops.contexts import token_history
from dyadlm.ops.ngrams import ngram_rows
from dyadlm.ops.pyramid import next_position


def rows_in_chunks(ids, sizes, entries, *, lengths, starts, begins, cuts, contexts=()):
    """Of chunks that end at `cuts`, put together. contexts: others that ask for a history, as slots do."""
    time, parts, state, position = ids.shape[1], [], None, None
    for a, b in zip([0, *cuts], [*cuts, time], strict=True):
        length = (lengths - a).clamp(0, b - a)
        clock = make_clock(len(ids), b - a, position=position, length=length, starts=starts[:, a:b])
        asked = list(dict.fromkeys([*contexts, *sizes]))
        history, state = token_history(ids[:, a:b], asked, clock, word_begins=begins[:, a:b], state=state)
        parts.append(ngram_rows(history, sizes, entries, clock))
        position = next_position(clock)
    return torch.cat(parts, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_the_definition_however_cut_packed_and_padded(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 6, 11, "word"]), min_size=1, max_size=4, unique=True))
    entries = data.draw(st.sampled_from([1, 2, 7, 64, 10_007, 2**33]))
    vocab_size = data.draw(st.sampled_from([2, 256, 2**17, 2**31]))
    time = data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    ids = torch.randint(0, vocab_size, (2, time), generator=generator)
    begins = torch.rand(2, time, generator=generator) < 0.3
    starts = torch.rand(2, time, generator=generator) < 0.1
    lengths = torch.tensor([data.draw(st.integers(0, time)) for _ in range(2)])
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=6))) if time > 1 else []
    contexts = data.draw(st.sampled_from([(), (8,), (1, "word")]))
    options = {"lengths": lengths, "starts": starts, "begins": begins, "contexts": contexts}
    found = rows_in_chunks(ids, sizes, entries, **options, cuts=cuts)
    assert found.shape == (2, time, len(sizes))
    for b in range(2):
        document, word = [], []
        for t in range(time):
            if t >= lengths[b]:
                assert (found[b, t] == -1).all()
                continue
            if t and starts[b, t]:
                document, word = [], []
            document.append(int(ids[b, t]))
            word.append(bool(begins[b, t]))
            for table, size in enumerate(sizes):
                row = reference.ngram_row(document, word, size, entries)
                assert found[b, t, table] == (-1 if row is None else row + table * entries)


def test_orders_and_lengths_are_told_apart():
    """Of few tokens in a large table, no two different n-grams share a row."""
    clock, begins = make_clock(1, 3), torch.tensor([[True, False, False]])
    texts = torch.cartesian_prod(*[torch.arange(6)] * 3)
    seen = {3: set(), "word": set()}
    for text in texts:
        history, _ = token_history(text[None], [3, "word"], clock, word_begins=begins)
        rows = ngram_rows(history, [3, "word"], 2**40, clock)[0, -1]
        seen[3].add(int(rows[0]))
        seen["word"].add(int(rows[1]))
    assert {name: len(rows) for name, rows in seen.items()} == {3: 216, "word": 216}


def test_rows_are_spread_evenly():
    """Of 2^16 different pairs in 256 rows, each row has 256 of them give or take six standard deviations."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    clock = make_clock(len(pairs), 2)
    history, _ = token_history(pairs, [2], clock)
    counts = ngram_rows(history, [2], 256, clock)[:, 1, 0].bincount(minlength=256)
    assert (counts - 256).abs().max() < 6 * 16
