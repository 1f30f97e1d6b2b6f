"""What mixes tokens beside levels and slots: silent at first, causal, and decoded by torch."""

import logging

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.model.cache import DyadCache
from dyadlm.model.trace import level_contributions, read_on

from .conftest import SMALL, VARIANTS, make_model, text_ids
from .test_causality import assert_causal, assert_no_gradient_from_later

# By mixer: parts of a block, each of which would leak if it saw a token ahead.
PARTS = {
    "convolution": ["tower_convolution", "mlp_convolution"],
    "delta": [f"tower.delta.{part}" for part in ("query", "key", "strength", "decay", "boundary")],
    "outer": ["tower.outer.query", "tower.outer.key"],
}
OF_TOKENS = ["tower.delta.boundary"]  # what tokens alone decide, so that nothing of it has a gradient


def test_convolutions_of_zero_are_none_and_new_ones_are_zero():
    fields = {**SMALL, "semantic_levels": ["word"]}
    without, mixed = make_model(**fields), DyadForCausalLM(DyadConfig(**fields, mixers=["convolution"])).double().eval()
    new = mixed.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert len(new) == 4
    assert all("convolution" in name for name in new)
    assert torch.equal(mixed(text_ids(2, 40)).logits, without(text_ids(2, 40)).logits)


@pytest.mark.parametrize(("mixer", "part"), [(mixer, part) for mixer, parts in PARTS.items() for part in parts])
def test_a_leak_in_any_part_is_caught(mixer, part):
    model, ahead = make_model(**VARIANTS[mixer]), 8 if part in OF_TOKENS else 1

    def early(module, args, output):
        rolled = (output[0] if isinstance(output, tuple) else output).roll(-ahead, 1)
        return (rolled, *output[1:]) if isinstance(output, tuple) else rolled

    model.model.layers[0].get_submodule(part).register_forward_hook(early)
    for check in (assert_causal, *[assert_no_gradient_from_later] * (part not in OF_TOKENS)):
        with pytest.raises(AssertionError):
            check(model)


@pytest.mark.parametrize("mixer", PARTS)
def test_traces_know_what_stands_before_a_chunk(mixer):
    model, ids = make_model(**VARIANTS[mixer]), text_ids(1, 30)
    whole, cache = level_contributions(model, ids), DyadCache()
    parts = [read_on(model, part, cache).contributions for part in ids.split([13, 1, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mixer", PARTS)
def test_torch_decodes_and_the_log_says_why(mixer, caplog):
    model = make_model(torch.float32, preset="tiny", num_levels=2, hidden_size=32, num_hidden_layers=2, mixers=[mixer])
    with caplog.at_level(logging.INFO, "dyadlm.engine"), torch.no_grad():
        text = model.generate(text_ids(1, 20), max_new_tokens=6, do_sample=False)
        expected = text[:, :20]
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, expected)
    assert "mixers" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": ["attention"]}, "mixers is 'attention'"),
        ({"mixers": ["convolution", "convolution"]}, "names something twice"),
        ({"mixers": ["delta"], "planner": "head"}, "delta .mixers. has none; set planner=none"),
    ],
)
def test_mixers_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DyadConfig(**fields)


def test_the_order_in_which_mixers_are_named_says_nothing():
    assert DyadConfig(mixers=["outer", "convolution"]).mixers == ["convolution", "outer"]


def test_heads_forget_at_different_speeds_and_a_boundary_can_make_them_forget():
    """Whether the memory after 60 tokens still holds something of the first 30, at fresh weights."""
    torch.manual_seed(0)
    config = DyadConfig(hidden_size=128, num_hidden_layers=1, num_levels=2, semantic_levels=["word"], mixers=["delta"])
    model, ids = DyadForCausalLM(config).double().eval(), text_ids(1, 60)
    delta, memories = model.model.layers[0].tower.delta, []
    keep = torch.exp(-torch.nn.functional.softplus(delta.decay.bias))
    torch.testing.assert_close(keep, torch.tensor([-1 / 16, -1 / 256]).double().exp(), rtol=1e-5, atol=0)
    for push in (0.0, 40.0):
        torch.nn.init.constant_(delta.boundary.weight, push)
        memories.append(
            [model(ids[:, start:], use_cache=True).past_key_values.layers[0].memory[0] for start in (0, 30)]
        )
    (far, near), (cut, same) = memories
    assert (far - near).abs().max() > 1e-3  # what stood before still counts
    assert (cut - same).abs().max() < 1e-12  # unless the word began later
