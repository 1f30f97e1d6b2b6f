"""The memory of contexts: against a slow reference, no leaks, proper distributions, fixed size, states that go on."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm import UserError
from dyadlm.memory import ContextMemory, MemoryOptions, kernel
from dyadlm.memory.context_memory import FIRST_BELIEF, FIRST_SLOPE, nats_under

TEXT = np.frombuffer(b"to be or not to be, that is the question: to be or not to be; to sleep, to dream " * 6, np.uint8)
TOKENS = TEXT.astype(np.int64)
SMALL = MemoryOptions(lengths=(1, 2, 4), entries=4096, ways=4, followers=3)


def reference(options: MemoryOptions, tokens, nats) -> list[float]:
    """The same without bounds: a dictionary of contexts, one token after the other."""
    entries: dict[tuple[int, ...], dict[int, float]] = {}
    mixer = np.tile(FIRST_BELIEF[None, :, : options.followers], (len(options.lengths), 1, 1))
    slopes = np.full_like(mixer, FIRST_SLOPE)
    mixed = []
    for at, token in enumerate(tokens.tolist()):
        chance = math.exp(-nats[at])
        seen = []
        for level, length in enumerate(options.lengths):
            context = tuple(tokens[at - length : at].tolist()) if at >= length else None
            counts = entries.get(context, {}) if context is not None else {}
            if not counts:
                continue
            total = sum(counts.values())
            place = (level, int(np.searchsorted(kernel.BANDS, total, side="right")), len(counts) - 1)
            share = 1 / (1 + math.exp(-mixer[place]))
            told = counts.get(token, 0.0) / total
            seen.append((place, share, told, chance))
            chance = (1 - share) * chance + share * told
        mixed.append(-math.log(chance))
        outer = 1 / chance
        for place, share, told, before in reversed(seen):
            slope = outer * (told - before) * share * (1 - share)
            slopes[place] += slope**2
            mixer[place] += options.rate * slope / math.sqrt(slopes[place])
            outer *= 1 - share
        for length in options.lengths:
            if at < length:
                continue
            counts = entries.setdefault(tuple(tokens[at - length : at].tolist()), {})
            if token not in counts and len(counts) == options.followers:
                del counts[min(counts, key=lambda follower: counts[follower])]
            for follower in counts:
                counts[follower] *= 1 if follower == token else options.fade
            counts[token] = counts.get(token, 0.0) + 1
    return mixed


def some_nats(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 6, count)


def test_it_equals_the_reference():
    nats = some_nats(len(TOKENS))
    mixed = ContextMemory(SMALL).read(TOKENS, nats)
    np.testing.assert_allclose(mixed, reference(SMALL, TOKENS, nats), rtol=1e-4)
    assert mixed[200:].mean() < 0.3 * nats[200:].mean()  # what repeats is remembered


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=120), st.integers(1, 4))
def test_any_text_equals_the_reference(tokens, followers):
    options = MemoryOptions(lengths=(1, 3), entries=1024, ways=8, followers=followers)
    ids, nats = np.array(tokens, np.int64), some_nats(len(tokens))
    np.testing.assert_allclose(ContextMemory(options).read(ids, nats), reference(options, ids, nats), rtol=1e-3)


def test_without_numba_it_is_the_same(monkeypatch):
    compiled = ContextMemory(SMALL).read(TOKENS[:150], some_nats(150))
    if not kernel.COMPILED:
        pytest.skip("numba is not installed")
    for name in ("tag_of", "find", "weigh", "mix", "read"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name).py_func)
    np.testing.assert_allclose(ContextMemory(SMALL).read(TOKENS[:150], some_nats(150)), compiled, rtol=1e-6)


def test_nothing_is_known_of_a_token_before_it_was_read():
    nats = some_nats(len(TOKENS))
    mixed = ContextMemory(SMALL).read(TOKENS, nats)
    for cut in (0, 1, 57, 300):
        other, others = TOKENS.copy(), nats.copy()
        other[cut + 1 :] = np.random.default_rng(cut).integers(0, 256, len(other) - cut - 1)
        others[cut + 1 :] += 1
        assert np.array_equal(ContextMemory(SMALL).read(other, others)[: cut + 1], mixed[: cut + 1])
    assert mixed[0] == np.float32(nats[0])


def test_the_mixture_is_a_distribution_and_what_reading_says_of_each_token():
    memory = ContextMemory(SMALL)
    random = np.random.default_rng(1)
    for at, token in enumerate(TOKENS[:200].tolist()):
        logits = random.normal(0, 3, 256).astype(np.float32)
        mixed = memory.mix(logits)
        assert np.exp(mixed.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
        nats = memory.read(np.array([token]), np.array([nats_under(logits, token)]))
        assert nats[0] == pytest.approx(-mixed[token], rel=1e-4), at


def test_pieces_and_copies_go_on_as_one():
    nats = some_nats(len(TOKENS))
    whole = ContextMemory(SMALL).read(TOKENS, nats)
    memory, parts = ContextMemory(SMALL), []
    for start in range(0, len(TOKENS), 37):
        stop = start + 37
        fork = memory.copy()
        fork.read(np.flip(TOKENS[start:stop]), nats[start:stop])  # leaves the original alone
        parts.append(memory.read(TOKENS[start:stop], nats[start:stop]))
        memory = ContextMemory.from_tensors(memory.to_dict(), memory.tensors())
    assert np.array_equal(np.concatenate(parts), whole)


def test_its_size_never_changes_and_often_seen_contexts_stay():
    memory = ContextMemory(MemoryOptions(lengths=(2,), entries=64, ways=4, followers=2, rate=0))
    size = memory.state_bytes
    random = np.random.default_rng(0)
    often = np.array([1, 2, 3], np.int64)
    for _ in range(60):
        noise = random.integers(10, 100_000, 20)
        memory.read(np.concatenate([often, noise]), np.full(23, 2.0))
    assert memory.state_bytes == size
    memory.read(often[:2], np.full(2, 2.0))
    assert np.exp(memory.mix(np.zeros(200)))[3] > 0.3


def contexts_of(memory: ContextMemory) -> set[int]:
    """The single tokens that a memory of one set knows as contexts."""
    with np.errstate(over="ignore"):
        known = {int(kernel.tag_of(np.array([token]), 1)): token for token in range(1000)}
    return {known[int(tag)] for tag in memory.tensors()["tags"].ravel() if tag}


def test_which_context_has_to_go():
    """Not the one that was seen last, but the one that was seen least; what is not seen again goes in the end."""
    memory = ContextMemory(MemoryOptions(lengths=(1,), entries=4, ways=4))
    often = np.array([1, 2] * 10 + [3], np.int64)
    memory.read(often, np.full(len(often), 2.0))
    memory.read(np.arange(100, 110), np.full(10, 2.0))
    assert {1, 2} <= contexts_of(memory)
    memory.read(np.arange(200, 300), np.full(100, 2.0))
    assert not {1, 2} & contexts_of(memory)


def test_losses_too_large_for_a_chance_stay_finite():
    memory = ContextMemory(SMALL)
    assert memory.read(TOKENS[:1], np.array([800.0]))[0] == 800
    memory.read(TOKENS, some_nats(len(TOKENS)))
    mixed = memory.read(np.array([7]), np.array([900.0]))  # never seen, after a context that was
    assert 900 < mixed[0] < 930


def test_counts_that_fade_are_dropped():
    options = MemoryOptions(lengths=(1,), entries=64, fade=0.5)
    memory = ContextMemory(options)
    text = np.array([1, 5, *[1, 6] * 200], np.int64)
    memory.read(text, np.full(len(text), 2.0))
    again = ContextMemory.from_tensors(memory.to_dict(), memory.tensors())
    assert np.array_equal(again.tensors()["counts"], memory.tensors()["counts"])
    assert 5 not in memory.tensors()["followers"]


@pytest.mark.parametrize(("tokens", "nats"), [((5,), (4,)), ((2, 2), (2, 2)), ((), ())])
def test_other_shapes_are_refused(tokens, nats):
    with pytest.raises(ValueError, match="reads tokens"):
        ContextMemory(SMALL).read(np.zeros(tokens, np.int64), np.zeros(nats))


def test_a_document_begins_without_context_and_remembers():
    memory = ContextMemory(SMALL)
    memory.read(TOKENS, some_nats(len(TOKENS)))
    memory.start_document()
    logits = np.zeros(256)
    np.testing.assert_allclose(memory.mix(logits), np.full(256, -math.log(256)), rtol=1e-5)
    memory.read(TOKENS[:4], np.full(4, 5.0))
    assert memory.mix(logits)[TOKENS[4]] > -1.5


def test_a_memory_of_documents_forgets_where_one_starts():
    memory, fresh = (ContextMemory(MemoryOptions(entries=64, scope="document")) for _ in range(2))
    memory.read(np.arange(40) % 7, np.ones(40))
    memory.start_document()
    assert all((array == fresh.tensors()[name]).all() for name, array in memory.tensors().items())
    assert ContextMemory.from_tensors(memory.to_dict(), memory.tensors()).options.scope == "document"


def test_what_nothing_predicted_is_read_and_not_learned_from():
    memory = ContextMemory(SMALL)
    memory.read(TOKENS[:100], np.full(100, np.nan))
    assert np.array_equal(memory.tensors()["mixer"], ContextMemory(SMALL).tensors()["mixer"])
    assert memory.read(TOKENS[100:101], np.array([3.0]))[0] < 3


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (0, 2)}, "lengths"),
        ({"lengths": (3, 2)}, "lengths"),
        ({"lengths": (65,)}, "lengths"),
        ({"entries": 1000}, "power of two"),
        ({"entries": -4, "ways": -8}, "power of two"),
        ({"entries": 2**28}, "more than 4 GiB"),
        ({"ways": 3}, "ways"),
        ({"scope": "page"}, "scope is one of stream, document"),
        ({"entries": 4, "ways": 8}, "as many entries as ways"),
        ({"followers": 0}, "followers"),
        ({"fade": 0.0}, "fade"),
        ({"rate": -1.0}, "rate"),
    ],
)
def test_odd_options_are_refused(fields, what):
    with pytest.raises(UserError, match=what):
        MemoryOptions(**fields)


def test_one_set_is_enough():
    memory = ContextMemory(MemoryOptions(lengths=(1,), entries=4, ways=4))
    assert np.isfinite(memory.read(TOKENS, some_nats(len(TOKENS)))).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tags", lambda a: a[:, :1]),
        ("counts", lambda a: a - 1),
        ("counts", lambda a: np.where(a == a.max(), np.float32(np.nan), a)),
        ("followers", lambda a: np.full_like(a, -1)),
        ("followers", lambda a: a.astype(np.int64)),
        ("slopes", lambda a: a * 0),
        ("mixer", lambda a: a * np.inf),
        ("mixer", lambda a: a * 100),
    ],
)
def test_damaged_tables_are_refused(name, change):
    memory = ContextMemory(SMALL)
    memory.read(TOKENS, some_nats(len(TOKENS)))
    tensors = memory.tensors()
    with np.errstate(invalid="ignore"):
        tensors[name] = change(tensors[name])
    with pytest.raises(UserError, match=r"damaged|no counts|does not name|believes too much"):
        ContextMemory.from_tensors(memory.to_dict(), tensors)
    for options in ({"lengths": 5}, {"lengths": [1, 2, 4], "entries": 2**24, "followers": 3}):
        with pytest.raises(UserError, match="damaged"):
            ContextMemory.from_tensors(options, memory.tensors())
