"""What must never break: nothing at or before t depends on what comes after."""

import dataclasses
import math

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.model import PRESETS, text, tower
from dyadlm.model.extras import gated_slots, selector
from dyadlm.model.levels import segments
from dyadlm.ops import segments as segment_ops
from dyadlm.ops import selection
from dyadlm.ops import slots as slot_ops
from dyadlm.ops.pyramid import take

from .conftest import VARIANTS, make_model, text_ids


def narrowed(preset: str, **overrides) -> DyadForCausalLM:
    return make_model(preset=preset, **{"num_levels": None, **overrides})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("training", [False, True])
def test_later_tokens_change_no_earlier_logit_in_presets(preset, training):
    model = narrowed(preset, dropout=0.2 if training else 0.0).train(training)
    assert_causal(model)


@pytest.mark.parametrize("training", [False, True])
def test_later_tokens_change_no_earlier_logit_in_variants(variant, training):
    assert_causal(make_model(**variant).train(training))


def seeded(model: DyadForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits with the same dropout and noise each time; no pass corrects the selectors' bias by the one before."""
    torch.manual_seed(3)
    for layer in model.model.layers:
        if hasattr(layer.tower, "selector") and layer.tower.selector.chooses:
            layer.tower.selector.load.zero_()
    return model(ids).logits


def assert_causal(model: DyadForCausalLM) -> None:
    ids = text_ids(2, 96)
    before = seeded(model, ids)
    for cut in (1, 2, 3, 8, 31, 32, 33, 63, 64, 95):
        changed = ids.clone()
        changed[0, cut:] = (changed[0, cut:] + 101) % 259
        after = seeded(model, changed)
        assert torch.equal(after[0, :cut], before[0, :cut])
        assert torch.equal(after[1], before[1])  # across rows of the batch
        assert not torch.equal(after[0, cut:], before[0, cut:])


def test_no_gradient_reaches_an_earlier_logit_from_a_later_token(variant):
    assert_no_gradient_from_later(make_model(**variant))


def assert_no_gradient_from_later(model: DyadForCausalLM) -> None:
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(text_ids(2, 70)).logits
    embedded = seen[0]  # a planner embeds its proposals, too
    for t in (0, 1, 15, 16, 33, 68):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert (gradient[1] == 0).all()
        assert (gradient[0, t] != 0).any()


def test_nothing_crosses_padding_or_a_document_boundary(variant):
    model = make_model(**variant)
    ids = text_ids(1, 60)
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    before = model(ids, position_ids=positions).logits
    changed = ids.clone()
    changed[:, :25] = (changed[:, :25] + 7) % 259
    assert torch.equal(model(changed, position_ids=positions).logits[:, 25:], before[:, 25:])
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[:, 10:14] = 0
    before = model(ids, attention_mask=mask).logits
    changed = ids.clone()
    changed[:, 10:14] = 99
    after = model(changed, attention_mask=mask).logits
    keep = mask[0].bool()
    assert torch.equal(after[:, keep], before[:, keep])


DISTANCES = (None, 1, 2, 3, 8, 16, 32)  # None: uniform; else fresh tokens, then their copy, so far apart


def unpredictable(distance: int | None, time: int, symbols: int, generator: torch.Generator):
    """Fresh tokens that nobody can predict, and, at a distance, their copies. Returns ids and labels (1, time).

    Copies are told, not asked: a model that is shown x_{t+2} gains nothing on uniform tokens, but here it does.
    """
    if distance is None:
        ids = torch.randint(0, symbols, (1, time), generator=generator)
        return ids, ids
    blocks = torch.randint(0, symbols, (1, -(-time // (2 * distance)), 1, distance), generator=generator)
    ids = blocks.expand(-1, -1, 2, -1).reshape(1, -1)[:, :time]
    return ids, torch.where(torch.arange(time) // distance % 2 == 0, ids, -100)


def highest_gains(model, symbols: int, steps: int, warm_up: int, time: int = 128) -> dict[int | None, float]:
    """The highest running sum of (ln V - loss) over the scored tokens of each kind of stream, while training on all.

    Every token is new and scored before the step that learns from it, so for a causal model exp of the sum is a mean-1
    martingale: passing LIMIT nats has probability at most 1e-9. The sum starts after a warm-up, in which early steps
    would sink it below what a late leak could climb.
    """
    generator = torch.Generator().manual_seed(symbols)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals, highest = dict.fromkeys(DISTANCES, 0.0), dict.fromkeys(DISTANCES, 0.0)
    for step in range(steps):
        streams = [unpredictable(distance, time, symbols, generator) for distance in DISTANCES]
        ids, labels = (torch.cat(parts) for parts in zip(*streams, strict=True))
        logits = model(ids).logits[:, :-1, :symbols]
        losses = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
        scored = labels[:, 1:] != -100
        for row, distance in enumerate(DISTANCES):
            if step >= warm_up:
                totals[distance] += (math.log(symbols) - losses[row][scored[row]]).sum().item()
                highest[distance] = max(highest[distance], totals[distance])
        optimizer.zero_grad()
        (losses.sum() / scored.sum()).backward()
        optimizer.step()
    return highest


LIMIT = 20.7
SCHEDULE = {"steps": 120, "warm_up": 60}


def leak_model(**overrides) -> DyadForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128}
    return DyadForCausalLM(DyadConfig(**{**sizes, **overrides}))


@pytest.mark.parametrize("symbols", [8, 256])
@pytest.mark.slow
def test_nobody_gains_on_streams_that_cannot_be_predicted(symbols):
    assert max(highest_gains(leak_model(), symbols, **SCHEDULE).values()) < LIMIT


@pytest.mark.slow
def test_nobody_gains_with_every_mechanism():
    """In training mode: choices by load, learned boundaries and gates, all of them learning.

    No plan is drawn then; beside a planner that learns, and by consensus, the floor is in tests/train/test_leaks.py.
    """
    model = leak_model(**{**VARIANTS["everything"], "hidden_size": 32, "num_levels": 6, "slot_entries": 64})
    assert max(highest_gains(model.train(), 8, **SCHEDULE).values()) < LIMIT


@pytest.mark.parametrize("preset", ["small", "base"])
@pytest.mark.slow
def test_nobody_gains_with_the_wide_levels_of_the_larger_presets(preset):
    """Long enough for the widest level to speak; their ranks follow from the width, which leaks do not ask for."""
    model = DyadForCausalLM(DyadConfig.from_preset(preset, hidden_size=32, num_hidden_layers=2, level_rank=None))
    widest = 2 ** (model.config.num_levels - 1)
    assert max(highest_gains(model, 8, steps=45, warm_up=25, time=widest + 64).values()) < LIMIT


@pytest.mark.slow
def test_the_floor_catches_blocks_shown_to_all_their_own_tokens(monkeypatch):
    """The reading of the paper that design 2 warns of."""

    def leaky(values, nodes, j, clock, delay=0):
        time = clock.index.shape[1]
        repeated = values.unsqueeze(2).expand(-1, -1, 2**j, -1).flatten(1, 2)
        last = repeated[:, -1:].expand(-1, 2**j, -1)
        return torch.cat([repeated, last], 1)[:, 2**j : 2**j + time]

    monkeypatch.setattr(tower, "broadcast", leaky)
    assert highest_gains(leak_model(), 8, **SCHEDULE)[None] > LIMIT


@pytest.mark.slow
def test_the_floor_catches_slots_that_hold_what_is_still_to_come(monkeypatch):
    """With every mechanism; x_{t+1} is what slots find at t."""
    read_ahead(monkeypatch)
    model = leak_model(**{**VARIANTS["everything"], "num_levels": 2, "semantic_levels": ["word", "learned"]})
    assert highest_gains(model.train(), 8, steps=30, warm_up=15, time=64)[None] > LIMIT


@pytest.mark.slow
def test_the_floor_catches_a_glimpse_two_tokens_ahead():
    """x_{t+2} shown to the head at t: nothing is gained on uniform tokens, much on their copies."""
    model = leak_model()
    embed, norm = model.get_input_embeddings(), model.model.norm
    shown = []
    embed.register_forward_hook(lambda module, args, output: shown.append(output))

    def glimpse(module, args, output):
        return output + 4 * torch.nn.functional.pad(shown.pop()[:, 2:], (0, 0, 0, 2))

    norm.register_forward_hook(glimpse)
    gains = highest_gains(model, 8, **SCHEDULE)
    assert gains[None] < LIMIT
    assert gains[1] > LIMIT


def read_ahead(monkeypatch) -> None:
    """A slot is read before it is written: at t, what will follow the context that stands at t."""

    def found(values, lookup, state=None):
        following = torch.arange(1, values.shape[1] + 1).clamp(max=values.shape[1] - 1)
        column = following[:, None].expand_as(lookup.column)
        lookup = dataclasses.replace(lookup, column=column, found=torch.ones_like(lookup.found))
        return slot_ops.slot_read(values, lookup, state)

    monkeypatch.setattr(gated_slots, "slot_read", found)


def whole_segments(monkeypatch) -> None:
    """A segment is summed backwards, from its end."""

    def summed(x, widths, plan, running, log_keep=None):
        return segment_ops.segment_sums(x, widths, plan, running, log_keep).roll(-1, 1)

    monkeypatch.setattr(segments, "segment_sums", summed)


def weights_over_the_chunk(monkeypatch) -> None:
    """Salience as a softmax over time."""

    def weights(self, x):
        return [part._replace(sums=part.sums / part.sums.mean(1, keepdim=True)) for part in weighed(self, x)]

    weighed = tower.Tower.weights
    monkeypatch.setattr(tower.Tower, "weights", weights)


def tokens_chosen_by_levels(monkeypatch) -> None:
    """Scores against those of the other tokens of the chunk, as where experts choose their tokens."""

    def chosen(scores, *args, **options):
        return selection.select(scores - scores.mean(1, keepdim=True), *args, **options)

    monkeypatch.setattr(selector, "select", chosen)


def decided_ahead(monkeypatch) -> None:
    """A decision is remembered before it is made."""
    monkeypatch.setattr(selector, "take", lambda rows, where: take(rows, (where + 1).clamp(max=rows.shape[1] - 1)))


PATCHES = (read_ahead, whole_segments, weights_over_the_chunk, tokens_chosen_by_levels, decided_ahead)
PARTS = {  # what a part of the first block says, and how many tokens early
    "tower.salience": 1, "tower.forgetting": 1, "tower.selector.scores": 1, "tower.router.key": 2, "decision.gate": 1,
    "slots.code": 1, "slots.gate": 40, "mlp_norm": 1,
}  # fmt: skip


@pytest.mark.parametrize("leak", [*PATCHES, *PARTS], ids=lambda leak: getattr(leak, "__name__", leak))
def test_a_leak_in_any_mechanism_is_caught(leak, monkeypatch):
    """By the perturbation and by the gradient test alike, with every mechanism on."""
    model = make_model(**VARIANTS["everything"])
    if leak in PATCHES:
        leak(monkeypatch)
    else:
        part, ahead = model.model.layers[0].get_submodule(leak), PARTS[leak]
        part.register_forward_hook(lambda module, args, output: output.roll(-ahead, 1))
    for check in (assert_causal, assert_no_gradient_from_later):
        with pytest.raises(AssertionError):
            check(model)


@pytest.mark.parametrize("ahead", [1, 2])
def test_ngrams_of_tokens_to_come_are_caught(ahead, monkeypatch):
    """By perturbation; what is hashed has no gradient."""

    def early(*arguments):
        return ngram_rows(*arguments).roll(-ahead, 1)

    ngram_rows = text.ngram_rows
    model = make_model(**VARIANTS["ngrams"])
    assert_causal(model)
    monkeypatch.setattr(text, "ngram_rows", early)
    with pytest.raises(AssertionError):
        assert_causal(model)


def test_the_perturbation_test_catches_a_leak():
    model = make_model()
    forward = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: forward(ids) + 0.1 * forward(ids.flip(1))
    with pytest.raises(AssertionError):
        assert_causal(model)
