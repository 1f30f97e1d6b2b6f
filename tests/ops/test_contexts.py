"""Context tags against their definition in Python's integers: whole, chunked, padded and packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.errors import UserError
from dyadlm.ops import make_clock, reference
from dyadlm.ops.contexts import Contexts, context_tags, tag_words, tokens_per_word
from dyadlm.ops.pyramid import next_position


def tags_in_chunks(ids, contexts, vocab_size, *, lengths, starts, begins, cuts):
    """The contexts of rows in chunks that end at `cuts`, put together; and the final state."""
    batch, time = ids.shape
    parts, state, position = [], None, None
    for a, b in zip([0, *cuts], [*cuts, time], strict=True):
        length = (lengths - a).clamp(0, b - a)
        clock = make_clock(batch, b - a, position=position, length=length, starts=starts[:, a:b])
        part, state = context_tags(ids[:, a:b], contexts, vocab_size, clock, word_begins=begins[:, a:b], state=state)
        position = next_position(clock)
        parts.append(part)
    return Contexts(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))), state


def expected(ids, contexts, vocab_size, *, starts, begins):
    """Per token of one row, the tag of each context or None."""
    document, word, tags = [], [], []
    for token, start, begin in zip(ids, starts, begins, strict=True):
        if start:
            document, word = [], []
        document.append(token)
        word.append(begin)
        tags.append([reference.context_at(document, word, context, vocab_size) for context in contexts])
    return tags


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equal_the_definition_however_cut_packed_and_padded(data):
    contexts = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 23, "word"]), min_size=1, max_size=4))
    vocab_size = data.draw(st.sampled_from([1, 2, 65, 256, 2**17, 2**17 + 3, 2**31]))
    time = data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 2**30))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (2, time), generator=generator)
    begins = torch.rand(2, time, generator=generator) < 0.3
    starts = torch.rand(2, time, generator=generator) < 0.1
    lengths = torch.tensor([data.draw(st.integers(0, time)) for _ in range(2)])
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=6))) if time > 1 else []
    options = {"lengths": lengths, "starts": starts, "begins": begins}
    tags, state = tags_in_chunks(ids, contexts, vocab_size, **options, cuts=cuts)
    parts = tag_words(contexts, vocab_size)
    assert tags.words.shape == (2, time, len(contexts), parts)
    for b in range(2):
        length = int(lengths[b])
        first = [t == 0 or bool(starts[b, t]) for t in range(length)]
        wanted = expected(
            ids[b, :length].tolist(), contexts, vocab_size, starts=first, begins=begins[b, :length].tolist()
        )
        for t in range(time):
            for n in range(len(contexts)):
                tag = wanted[t][n] if t < length else None
                assert tags.known[b, t, n] == (tag is not None)
                padded = (-1,) * parts if tag is None else tag + (0,) * (parts - len(tag))
                assert tuple(tags.words[b, t, n].tolist()) == padded
    whole, carried = tags_in_chunks(ids, contexts, vocab_size, **options, cuts=[])
    assert all(torch.equal(x, y) for x, y in zip((*tags, *state), (*whole, *carried), strict=True))


def test_the_state_after_a_document_is_that_of_the_document_alone():
    ids = torch.tensor([[5, 6, 7, 1, 2]])
    begins = torch.tensor([[True, False, False, False, False]])
    starts = torch.tensor([[False, False, False, True, False]])
    _, packed = context_tags(ids, [4, "word"], 8, make_clock(1, 5, starts=starts), word_begins=begins)
    _, alone = context_tags(ids[:, 3:], [4, "word"], 8, make_clock(1, 2), word_begins=begins[:, 3:])
    assert packed.tokens.tolist() == [[-1, 1, 2]]
    assert all(torch.equal(x, y) for x, y in zip(packed, alone, strict=True))


@pytest.mark.parametrize(
    ("contexts", "vocab_size", "words"),
    [([6], 256, 1), ([7], 256, 1), ([8], 256, 2), ([1, 3], 2**17, 1), ([8], 2**17, 3), (["word", 1], 65, 2)],
)
def test_tags_take_as_few_words_as_the_vocabulary_allows(contexts, vocab_size, words):
    assert tag_words(contexts, vocab_size) == words


@pytest.mark.parametrize("vocab_size", [2, 3, 65, 256, 2**17])
def test_the_largest_tag_fits_into_63_bits(vocab_size):
    count = tokens_per_word(vocab_size)
    assert vocab_size**count <= 2**63 < vocab_size ** (count + 1)
    tags, _ = context_tags(torch.full((1, count), vocab_size - 1), [count], vocab_size, make_clock(1, count))
    assert tags.words[0, -1, 0].tolist() == [vocab_size**count - 1]


def test_words_that_differ_in_order_or_repetition_have_tags_of_their_own():
    """All words of up to 6 of two letters, and the Thue-Morse words on which polynomials mod 2^64 fail."""
    words = [[(code >> i) & 1 for i in range(length)] for length in range(1, 7) for code in range(2**length)]
    morse = [bin(i).count("1") % 2 for i in range(2048)]
    words += [morse, [1 - letter for letter in morse]]
    tags = set()
    for word in words:
        begins = torch.zeros(1, len(word), dtype=torch.bool)
        found, _ = context_tags(torch.tensor([word]), ["word"], 2, make_clock(1, len(word)), word_begins=begins)
        tags.add(tuple(found.words[0, -1, 0].tolist()))
    assert len(tags) == len(words)


@pytest.mark.parametrize("context", [0, -1, "sentence", 1.5])
def test_a_context_that_is_none_names_the_remedy(context):
    with pytest.raises(UserError, match="a number of tokens from 1 to 65,536, 'word' or 'code'"):
        tag_words([1, context], 256)
