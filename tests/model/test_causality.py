"""What must never break: nothing at or before t depends on what comes after (design, section 10)."""

import math

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.model import PRESETS

from .conftest import make_model, random_ids


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


def assert_causal(model: DyadForCausalLM) -> None:
    ids = random_ids(2, 96)
    torch.manual_seed(3)
    before = model(ids).logits
    for cut in (1, 2, 3, 8, 31, 32, 33, 63, 64, 95):
        changed = ids.clone()
        changed[0, cut:] = (changed[0, cut:] + 101) % 259
        torch.manual_seed(3)  # the same dropout
        after = model(changed).logits
        assert torch.equal(after[0, :cut], before[0, :cut])
        assert torch.equal(after[1], before[1])  # across rows of the batch
        assert not torch.equal(after[0, cut:], before[0, cut:])


def test_no_gradient_reaches_an_earlier_logit_from_a_later_token(variant):
    model = make_model(**variant)
    embedded = model.get_input_embeddings()(random_ids(2, 70)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    for t in (0, 1, 15, 16, 33, 68):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert (gradient[1] == 0).all()
        assert (gradient[0, t] != 0).any()


def test_nothing_crosses_padding_or_a_document_boundary(variant):
    model = make_model(**variant)
    ids = random_ids(1, 60)
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


def copy_forward(batch: int, time: int, distance: int, symbols: int, generator: torch.Generator):
    """`distance` fresh tokens, then their copy, and so on; the fresh ones are unpredictable. Returns ids and labels."""
    blocks = torch.randint(0, symbols, (batch, -(-time // (2 * distance)), 1, distance), generator=generator)
    ids = blocks.expand(-1, -1, 2, -1).reshape(batch, -1)[:, :time]
    fresh = torch.arange(time) // distance % 2 == 0
    return ids, torch.where(fresh, ids, -100)


def summed_gain(model, symbols: int, distance: int | None, steps: int, shift_input: int = 0) -> float:
    """The highest sum of (ln V - loss) over scored tokens while training on fresh streams nobody can predict.

    For a causal model exp of it is a mean-1 martingale: passing 20.7 nats has probability at most 1e-9.
    `shift_input` > 0 shows the model the token so many places ahead: the leak that the test must catch.
    """
    generator = torch.Generator().manual_seed(symbols + (distance or 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    total = highest = 0.0
    for _ in range(steps):
        time = 128 + shift_input
        if distance is None:
            ids = torch.randint(0, symbols, (8, time), generator=generator)
            labels = ids.clone()
        else:
            ids, labels = copy_forward(8, time, distance, symbols, generator)
        shown = ids[:, shift_input:]  # what stands at t + shift_input, as input at t
        labels = labels[:, : shown.shape[1]].clone()
        labels[:, 0] = -100
        logits = model(shown).logits[:, :-1, :symbols]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        count = int((labels[:, 1:] != -100).sum())
        total += count * math.log(symbols) - loss.item()
        highest = max(highest, total)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    return highest


def leak_model(seed: int = 0, **overrides) -> DyadForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128}
    return DyadForCausalLM(DyadConfig.from_preset("tiny", **{**sizes, **overrides}))


@pytest.mark.parametrize("symbols", [8, 256])
@pytest.mark.parametrize("distance", [None, 1, 2, 3, 8, 16, 32])
def test_nobody_gains_on_streams_that_cannot_be_predicted(symbols, distance):
    assert summed_gain(leak_model(), symbols, distance, steps=12) < 20.7


@pytest.mark.parametrize("preset", PRESETS)
def test_nobody_gains_with_any_preset(preset):
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 259}
    model = DyadForCausalLM(DyadConfig.from_preset(preset, **sizes))
    for distance in (None, 2):
        assert summed_gain(model, 8, distance, steps=10) < 20.7


def test_the_leak_test_catches_a_leak():
    """A model shown x_{t+2} gains nothing on uniform tokens but on copy-forward streams; shown x_{t+1}, on both."""
    assert summed_gain(leak_model(), 8, None, steps=60, shift_input=1) > 20.7
    assert summed_gain(leak_model(), 8, 2, steps=60, shift_input=1) > 20.7


def test_the_perturbation_test_catches_a_leak():
    model = make_model()
    forward = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: forward(ids) + 0.1 * forward(ids.flip(1))
    with pytest.raises(AssertionError):
        assert_causal(model)
