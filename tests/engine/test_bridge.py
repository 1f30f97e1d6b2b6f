"""A torch model decodes through the engine with the same tokens, and its state moves both ways."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.engine.bridge import fast_decoding, refusal

TEXT = b"To be, or not to be: that is the question.\n\nWhether 'tis nobler in the mind to suffer\nThe slings. " * 3


def make_model(**fields) -> DyadForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 2, "slot_entries": 64, **fields}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def model() -> DyadForCausalLM:
    return make_model()


def ids(count: int, rows: int = 1) -> torch.Tensor:
    return torch.stack([torch.tensor(list(TEXT[11 * row :][:count])) for row in range(rows)])


def count_steps(monkeypatch) -> list[int]:
    from dyadlm.engine import bridge

    seen: list[int] = []
    step = bridge.Decoder.step
    monkeypatch.setattr(bridge.Decoder, "step", lambda self, *rest: (seen.append(1), step(self, *rest))[1])
    return seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}])
def test_generate_gives_the_tokens_of_torch(model, rows, sampling, monkeypatch):
    """Also for rows of several lengths, padded on the left."""
    prompt, mask = ids(40, rows), torch.ones(rows, 40, dtype=torch.long)
    for row in range(1, rows):
        prompt[row, : 5 * row], mask[row, : 5 * row] = 256, 0
    options = {"max_new_tokens": 40, "attention_mask": mask, "eos_token_id": None, **sampling}
    steps = count_steps(monkeypatch)
    torch.manual_seed(1)
    fast = model.generate(prompt, **options)
    assert len(steps) == 39  # the first new token comes with the prompt
    torch.manual_seed(1)
    monkeypatch.setattr("dyadlm.engine.bridge.refusal", lambda model: "the test says so")
    assert torch.equal(fast, model.generate(prompt, **options))
    assert len(steps) == 39


def test_state_moves_both_ways_inside_a_document(model):
    """Torch reads, the engine reads, torch reads on, and the state is saved: all as torch alone."""
    tokens = ids(120)
    with torch.no_grad():
        alone = model(tokens, use_cache=True)
        cache, parts = DyadCache(), []
        parts.append(model(tokens[:, :37], past_key_values=cache, use_cache=True).logits)
        with fast_decoding(model):
            parts += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(37, 74)]
        assert cache.rows is not None
        assert (cache.batch_size, cache.get_seq_length()) == (1, 74)
        parts.append(model(tokens[:, 74:100], past_key_values=cache, use_cache=True).logits)
        assert cache.rows is None
        with fast_decoding(model):
            parts += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(100, 120)]
    scale = alone.logits.std()
    assert ((torch.cat(parts, 1) - alone.logits).abs().max() / scale) < 1e-5
    found, expected = cache.tensors(), alone.past_key_values.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_copies_are_independent(model):
    tokens = ids(60)
    with torch.no_grad(), fast_decoding(model):
        cache = model(tokens[:, :30], use_cache=True).past_key_values
        model(tokens[:, 30:31], past_key_values=cache)
        twin = cache.copy()
        first = model(tokens[:, 31:32], past_key_values=cache).logits
        model(tokens[:, 40:41], past_key_values=cache)
        assert torch.equal(first, model(tokens[:, 31:32], past_key_values=twin).logits)


def test_changed_weights_are_seen(model):
    prompt = ids(30)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    before = model.generate(prompt, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    after = model.generate(prompt, **options)
    assert not torch.equal(before, after)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert torch.equal(before, model.generate(prompt, **options))


def test_a_state_follows_changed_weights():
    """What dual levels add is kept in the engine's state, by the weights that made it."""
    model, tokens = make_model(num_levels=6), ids(80)
    told = []
    for fast in (True, False):
        torch.manual_seed(3)
        copy = make_model(num_levels=6)
        with torch.no_grad():
            cache = copy(tokens[:, :60], use_cache=True).past_key_values
            with fast_decoding(copy) if fast else nullcontext():
                copy(tokens[:, 60:61], past_key_values=cache)
            for layer in copy.model.layers:
                for up in layer.tower.up_nodes.values():
                    up.weight.mul_(-1)
            with fast_decoding(copy) if fast else nullcontext():
                told.append(copy(tokens[:, 61:62], past_key_values=cache).logits)
    assert len(model.model.layers[0].tower.up_nodes) > 0
    assert ((told[0] - told[1]).abs().max() / told[1].std()) < 1e-5


def test_what_asks_for_more_than_logits_is_read_by_torch(model):
    with torch.no_grad(), fast_decoding(model):
        cache = model(ids(20), use_cache=True).past_key_values
        output = model(ids(1), past_key_values=cache, use_cache=True, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        restarted = model(ids(1), past_key_values=cache, position_ids=torch.zeros(1, 1, dtype=torch.long))
        assert restarted.past_key_values.position.item() == 1


def test_a_token_outside_the_vocabulary_is_an_error(model):
    with torch.no_grad(), fast_decoding(model):
        cache = model(ids(20), use_cache=True).past_key_values
        for token in (259, -1):
            with pytest.raises(IndexError):
                model(torch.tensor([[token]]), past_key_values=cache)


def test_reasons_for_torch_are_named_in_the_log(model, caplog):
    assert refusal(model) is None
    assert "training" in (refusal(model.train()) or "")
    assert "float64" in (refusal(make_model().double()) or "")
    watched = make_model()
    watched.model.norm.register_forward_hook(lambda *rest: None)
    assert "hooks" in (refusal(watched) or "")
    assert isinstance(watched.model.norm, nn.Module)
    with caplog.at_level(logging.INFO, "dyadlm.engine"):
        make_model(selector="dense", selector_heads=4).generate(ids(8), max_new_tokens=2, do_sample=False)
    assert "selector" in caplog.text
