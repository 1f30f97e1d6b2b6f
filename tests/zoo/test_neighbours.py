"""Neighbours mix in what followed the most similar states, and change nothing else."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from dyadlm import zoo
from dyadlm.causal_lm import require_causal
from dyadlm.errors import UserError
from dyadlm.zoo.neighbours import add_neighbours

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
TEXT = torch.randint(0, 259, (97,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    pytest.importorskip("faiss")
    return zoo.build("llama", length=32, width=32, layers=1).eval()


@torch.no_grad()
def test_what_was_read_before_is_known(model):
    window = TEXT[None, :32]
    plain = model(window).logits[0]
    store = add_neighbours(model, TEXT, length=32, neighbours=1, share=0.5)
    logits = model(window).logits[0]
    expected = 0.5 * plain[:-1].softmax(-1) + 0.5 * torch.nn.functional.one_hot(window[0, 1:], 259)
    torch.testing.assert_close(logits[:-1].exp(), expected, atol=1e-5, rtol=1e-4)
    assert cross_entropy(logits[:-1], window[0, 1:]) < math.log(2.01)
    store.remove()
    assert torch.equal(model(window).logits[0], plain)


@torch.no_grad()
def test_neighbours_are_those_at_the_least_distance(model):
    hidden = torch.cat([model.model(TEXT[None, at : at + 32]).last_hidden_state[0] for at in (0, 32, 64)])
    asked = torch.randint(0, 259, (1, 20), generator=torch.Generator().manual_seed(1))
    plain, states = model(asked).logits[0].softmax(-1), model.model(asked).last_hidden_state[0]
    store = add_neighbours(model, TEXT, length=32, neighbours=4, share=0.3)
    distance, place = torch.cdist(states, hidden).square().topk(4, largest=False)
    near = torch.zeros_like(plain)
    near.scatter_add_(1, TEXT[1:][place], torch.softmax(-distance / store.temperature, -1))
    torch.testing.assert_close(model(asked).logits[0].exp(), 0.7 * plain + 0.3 * near, atol=1e-4, rtol=1e-3)


def test_a_model_with_neighbours_is_causal(model):
    add_neighbours(model, TEXT, length=32)
    require_causal(model, "a model with neighbours")


def test_wrong_requests(model):
    with pytest.raises(UserError, match="at least two tokens"):
        add_neighbours(model, TEXT[:1])
    with pytest.raises(UserError, match="a share between 0 and 1"):
        add_neighbours(model, TEXT, share=2.0)
