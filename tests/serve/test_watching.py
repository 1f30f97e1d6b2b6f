"""What is told of each token: the same in chunks as token by token, and equal to what the model itself says."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm.data.encoding import ByteTokenizer
from dyadlm.engine.bridge import decoder_of
from dyadlm.errors import UserError
from dyadlm.generate import Sampling
from dyadlm.model.trace import level_contributions, slot_hits
from dyadlm.serve import watching
from dyadlm.serve.watching import Watcher

from ..engine.conftest import make_model as make_engine_model
from ..model.conftest import VARIANTS, make_model

TEXT = "the cat sat on the mat. The cat ate; the rat sat.\n\nOn the mat the cat sat, é"


SHORT = "the cat sat. The cat sat;\n\nOn it, é"


def all_of(chunks):
    return [moment for moments in chunks for moment in moments]


def watched(model, chunk, ids, monkeypatch, **options):
    monkeypatch.setattr(watching, "CHUNK", chunk)
    watcher = Watcher(model, ByteTokenizer(), **options)
    return watcher, all_of(watcher.read(ids))


def alike(one, other):
    assert [(m.index, m.token, m.text, m.segments, m.slots, m.read) for m in one] == [
        (m.index, m.token, m.text, m.segments, m.slots, m.read) for m in other
    ]
    for a, b in zip(one, other, strict=True):
        assert a.bits == (None if b.bits is None else pytest.approx(b.bits, abs=1e-6))
        assert a.entropy == pytest.approx(b.entropy, abs=1e-6)
        assert [level.norm for level in a.levels] == pytest.approx([level.norm for level in b.levels], abs=1e-9)
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_tell_what_single_tokens_tell(name, monkeypatch):
    model = make_model(**VARIANTS[name]).eval()
    ids = list(SHORT.encode())
    _, slow = watched(model, 1, ids, monkeypatch)
    for chunk in (7, 1000):
        alike(watched(model, chunk, ids, monkeypatch)[1], slow)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_equals_the_model_itself(name, monkeypatch):
    model = make_model(**VARIANTS[name]).eval()
    ids = list(TEXT.encode())
    _, moments = watched(model, 11, ids, monkeypatch)
    row = torch.tensor([ids])
    with torch.no_grad():
        output = model(input_ids=row, use_cache=False, output_routes=True)
    likely = output.logits[0].float().log_softmax(-1) / math.log(2)
    assert moments[0].bits is None
    assert [m.bits for m in moments[1:]] == pytest.approx(
        (-likely[:-1].gather(-1, row[0, 1:, None])).flatten().tolist(), abs=1e-4
    )
    lengths = level_contributions(model, row[0]).mean(0).T
    assert torch.allclose(torch.tensor([[level.norm for level in m.levels] for m in moments]).double(), lengths)
    names = [n for n in model.config.semantic_levels or () if n != "learned"]
    for place, own in enumerate(names):
        assert [own in m.segments for m in moments] == output.boundaries[0, :, place].tolist()
    for table, hit in slot_hits(model, row).items():
        assert [next(s.hit for s in m.slots if s.table == table) for m in moments] == hit[0].tolist()


def replayed(ids, length, sets, ways, evict):
    """The slow form: tables as lists, newest first; for each token how many tokens ago its context stood, or None."""
    from dyadlm.ops.contexts import context_tags
    from dyadlm.ops.pyramid import make_clock
    from dyadlm.ops.slots import slot_sets

    clock = make_clock(1, len(ids))
    contexts, _ = context_tags(torch.tensor([ids]), [length], 259, clock)
    places = slot_sets(contexts.words, sets)[0, :, 0].tolist()
    tables, found = {}, []
    for t in range(len(ids)):
        if t >= length:  # the context that ended at t - 1 is written with the value of t
            row = tables.setdefault(places[t - 1], [])
            key = tuple(ids[t - length : t])
            if evict == "lru":
                row[:] = [entry for entry in row if entry[0] != key]
            row.insert(0, (key, t))
            del row[ways:]
        key = tuple(ids[t + 1 - length : t + 1])
        row = tables.get(places[t], []) if t + 1 >= length else []
        when = next((at for own, at in row if own == key), None)
        found.append(None if when is None else t + 1 - when)
    return found


@pytest.mark.parametrize("evict", ["ring", "lru"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_distances_equal_those_of_tables_kept_by_hand(evict, chunk, monkeypatch):
    fields = {**VARIANTS["slots"], "slot_contexts": [1, 2, 3], "slot_entries": 8, "slot_ways": 2, "slot_evict": evict}
    model = make_model(**fields).eval()
    ids = [ord(letter) for letter in (TEXT + TEXT[::2]) * 2]
    _, moments = watched(model, chunk, [i % 7 + 65 for i in ids], monkeypatch)
    for place, length in enumerate(model.config.slot_contexts):
        slow = replayed([i % 7 + 65 for i in ids], length, 4, 2, evict)
        assert [m.slots[place].distance for m in moments] == slow
        assert any(slow)


def test_a_repeated_text_is_recalled_from_its_period(monkeypatch):
    model = make_model(**VARIANTS["slots"]).eval()
    _, moments = watched(model, 6, list(b"abcdeabcdeabcde"), monkeypatch)
    assert [s.distance for s in moments[-1].slots if s.table == "4"] == [5]


def test_a_session_goes_on_with_known_distances_and_without(monkeypatch):
    model = make_model(**VARIANTS["slots"]).eval()
    ids = list(TEXT.encode())
    _, whole = watched(model, 1000, ids, monkeypatch)
    watcher, first = watched(model, 1000, ids[:30], monkeypatch)
    state = {"logits": watcher.logits, "tokens": watcher.tokens}
    _, rest = watched(model, 9, ids[30:], monkeypatch, state=watcher.state.copy(), times=watcher.times, **state)
    alike(first + rest, whole)
    _, blind = watched(model, 9, ids[30:], monkeypatch, state=watcher.state.copy(), **state)
    assert [s.hit for m in blind for s in m.slots] == [s.hit for m in rest for s in m.slots]
    pairs = [
        (b.distance, a.distance)
        for m, n in zip(blind, rest, strict=True)
        for b, a in zip(m.slots, n.slots, strict=True)
    ]
    assert all(b in (None, a) for b, a in pairs), "a distance is exact or not told"
    assert any(b is None and a is not None for b, a in pairs)


def test_writing_reads_what_it_writes(monkeypatch):
    model = make_model(**VARIANTS["slots"]).eval()
    watcher = Watcher(model, ByteTokenizer())
    begun = all_of(watcher.read(watcher.encode("the cat ")))
    written = all_of(watcher.write(12, Sampling(temperature=0.8, seed=3)))
    assert [m.index for m in begun + written] == list(range(20))
    assert not any(m.read for m in written)
    _, again = watched(model, 1000, [m.token for m in begun + written], monkeypatch)
    assert [m.bits for m in begun[1:] + written] == pytest.approx([m.bits for m in again[1:]], abs=1e-5)
    other = Watcher(model, ByteTokenizer())
    all_of(other.read(other.encode("the cat ")))
    assert [m.token for m in all_of(other.write(12, Sampling(temperature=0.8, seed=3)))] == [m.token for m in written]


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_the_engine_writes_what_torch_writes(most, monkeypatch):
    model = make_engine_model()
    assert decoder_of(model) is not None
    written = []
    for engine in (True, False):
        if not engine:
            monkeypatch.setattr(watching, "decoder_of", lambda model: None)
        watcher = Watcher(model, ByteTokenizer())
        all_of(watcher.read(watcher.encode("the cat ")))
        written.append(all_of(watcher.write(most, Sampling(temperature=0.7, seed=5))))
        assert watcher.tokens == 8 + len(written[-1])
    one, other = written
    assert [(m.index, m.token, m.segments, m.slots) for m in one] == [
        (m.index, m.token, m.segments, m.slots) for m in other
    ]
    assert len(one) == most
    assert [m.bits for m in one] == pytest.approx([m.bits for m in other], abs=1e-3)


@pytest.mark.parametrize("engine", [True, False])
def test_an_end_of_text_ends_and_is_not_read(engine, monkeypatch):
    model = make_engine_model()
    watcher = Watcher(model, ByteTokenizer())
    all_of(watcher.read(list(b"the cat ")))
    free = [m.token for m in all_of(watcher.write(30, Sampling(seed=2)))]
    model.generation_config.eos_token_id = free[6]
    before = free[: free.index(free[6])]
    if not engine:
        monkeypatch.setattr(watching, "decoder_of", lambda model: None)
    watcher = Watcher(model, ByteTokenizer())
    all_of(watcher.read(list(b"the cat ")))
    assert [m.token for m in all_of(watcher.write(30, Sampling(seed=2)))] == before
    assert watcher.tokens == 8 + len(before)


def test_state_stays_and_text_adds_up(monkeypatch):
    model = make_model(**VARIANTS["slots"]).eval()
    _, moments = watched(model, 10, list(TEXT.encode()), monkeypatch)
    assert "".join(m.text for m in moments) == TEXT
    assert len({m.state_bytes for m in moments}) == 1
    assert moments[-1].state_bytes > 0
    assert all(m.ms > 0 for m in moments)
    assert all(sum(p for _, p in m.top) <= 1 + 1e-6 and len(m.top) == 10 for m in moments)


def test_a_model_of_others_is_watched_without_levels():
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=258,
    )
    watcher = Watcher(LlamaForCausalLM(config).eval(), ByteTokenizer())
    moments = all_of(watcher.read(list(b"hello"))) + all_of(watcher.write(3, Sampling(seed=1)))
    assert [m.index for m in moments] == list(range(8))
    assert not any(m.levels or m.segments or m.slots for m in moments)
    sizes = [m.state_bytes for m in moments]
    assert sizes[-1] > sizes[0], "the cache of a transformer grows"


def test_parts_of_characters_have_names():
    model = make_model().eval()
    watcher = Watcher(model, ByteTokenizer(), top=259)
    names = {name for name, _ in next(iter(watcher.read([65])))[0].top}
    assert {"A", " ", "\n", "<0xC3>", "<|end|>"} <= names
    assert len(names) == 259


def test_what_cannot_be_is_refused():
    watcher = Watcher(make_model().eval(), ByteTokenizer())
    with pytest.raises(UserError, match="nothing to continue from"):
        all_of(watcher.write(1, Sampling()))
    with pytest.raises(UserError, match="259 tokens"):
        all_of(watcher.read([259]))
