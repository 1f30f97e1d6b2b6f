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
PARTS = {"convolution": ["tower_convolution", "mlp_convolution"]}


def test_convolutions_of_zero_are_none_and_new_ones_are_zero():
    fields = {**SMALL, "semantic_levels": ["word"]}
    without, mixed = make_model(**fields), DyadForCausalLM(DyadConfig(**fields, mixers=["convolution"])).double().eval()
    new = mixed.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert len(new) == 4
    assert all("convolution" in name for name in new)
    assert torch.equal(mixed(text_ids(2, 40)).logits, without(text_ids(2, 40)).logits)


@pytest.mark.parametrize(("mixer", "part"), [(mixer, part) for mixer, parts in PARTS.items() for part in parts])
def test_a_leak_in_any_part_is_caught(mixer, part):
    model = make_model(**VARIANTS[mixer])

    def early(module, args, output):
        rolled = (output[0] if isinstance(output, tuple) else output).roll(-1, 1)
        return (rolled, *output[1:]) if isinstance(output, tuple) else rolled

    model.model.layers[0].get_submodule(part).register_forward_hook(early)
    for check in (assert_causal, assert_no_gradient_from_later):
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


def test_mixers_that_do_not_exist_or_come_twice_are_refused():
    for mixers, message in ((["attention"], "mixers is 'attention'"), (["convolution"] * 2, "names something twice")):
        with pytest.raises(UserError, match=message):
            DyadConfig(mixers=mixers)
