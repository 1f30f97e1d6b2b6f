"""Facts about the mechanisms inside a model, each of which would be false of another mechanism."""

import itertools

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM

from .conftest import SMALL, VARIANTS, make_model, random_ids, text_ids


def fresh(**fields) -> DyadForCausalLM:
    torch.manual_seed(0)
    return DyadForCausalLM(DyadConfig(**{**SMALL, **fields})).double().eval()


def recalled(model, ids) -> torch.Tensor:
    """What the first block's slots bring back at each token (T, D)."""
    seen = []
    hook = model.model.layers[0].slots.register_forward_hook(lambda module, args, out: seen.append(out[0][0]))
    model(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("distance", [1, 5, 100, 1000])
def test_what_was_written_once_is_recalled_at_any_distance(distance):
    """Far fewer contexts lie between than there are slots; one value differs, and one token alone can tell."""
    model = make_model(**SMALL, slot_contexts=[1], slot_layers=[0], slot_entries=64, slot_ways=8, slot_width=3)
    between = (torch.arange(distance) % 5 + 10).tolist()
    ids = torch.tensor([[65, 66, *between, 65], [65, 67, *between, 65]])
    one, other = recalled(model, ids[:1]), recalled(model, ids[1:])
    different = (one - other).abs().amax(-1) > 1e-9
    assert different.nonzero().flatten().tolist() == [distance + 2]  # nowhere but where the context stands again
    again = torch.tensor([[65, 66, *between, 68]])  # another context, whose set may be the same, finds nothing
    nothing = recalled(model, torch.tensor([[68]]))
    assert torch.equal(recalled(model, again)[-1], nothing[-1])


def test_a_decision_holds_until_the_gate_opens_again():
    model = make_model(**SMALL, selector="topk", selector_count=1, decision_slots=True)
    seen = []
    decision = model.model.layers[0].decision
    decision.register_forward_hook(lambda module, args, out: seen.append((args, out[1][0][0])))
    ids = text_ids(1, 40)
    states = []
    cache = None
    for t in range(40):
        cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        (x, routes, *_), state = seen.pop()
        states.append(state)
        opens = decision.gate(x)[0, 0].sigmoid() > 0.5
        for head, open_now in enumerate(opens.tolist()):
            if open_now:
                choice = routes[0, 0, head].argmax()
                assert state[head, : decision.levels].argmax() == choice
            else:
                before = states[-2][head] if t else torch.zeros_like(state[head])
                assert torch.equal(state[head], before)
    moves = [bool((a != b).any()) for a, b in itertools.pairwise(states)]
    assert any(moves)
    assert not all(moves)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "most"), [("topk", 2), ("gumbel", 1), ("everything", 3)])
def test_hard_choices_leave_the_other_levels_at_exactly_zero(name, most, training):
    model = make_model(**VARIANTS[name]).train(training)
    for routes in model(text_ids(2, 50), output_routes=True).routes:
        assert ((routes > 0).sum(-1) <= most).all()
        assert torch.allclose(routes.sum(-1), torch.ones(()).double())


def test_salience_that_says_nothing_changes_nothing():
    """At its start every token weighs exp(0)."""
    fields = {"semantic_levels": ["word"], "level_alignment": ["sliding", "dual", "prefix", "block"]}
    for early in ("zero", "partial", "mask"):
        without, weighed = fresh(early=early, **fields), fresh(early=early, salience=True, **fields)
        weighed.load_state_dict({**weighed.state_dict(), **randomised(without)})
        ids = text_ids(2, 50)
        assert torch.allclose(weighed(ids).logits, without(ids).logits, atol=1e-12, rtol=0)


def randomised(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.state_dict()


def test_an_even_selector_is_none():
    without, dense = fresh(), fresh(selector="dense")
    weights = randomised(without)
    dense.load_state_dict({**dense.state_dict(), **weights})
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.tower.selector.scores.weight.zero_()
    ids = text_ids(2, 50)
    assert torch.allclose(dense(ids).logits, without(ids).logits, atol=1e-12, rtol=0)


def test_routes_and_boundaries_have_their_shapes():
    model = make_model(**VARIANTS["everything"])
    ids = text_ids(2, 30)
    plain, out = model(ids), model(ids, output_routes=True)
    assert plain.routes is plain.boundaries is None
    assert [tuple(routes.shape) for routes in out.routes] == [(2, 30, 2, 10)] * 2
    assert tuple(out.boundaries.shape) == (2, 30, 5 + 2)  # five rules, and the learned one as each block sees it
    assert out.boundaries.dtype == torch.bool
    assert out.boundaries[:, 0].all()
    assert set(out.metrics) == {"cost"}


def test_the_bias_follows_the_load_in_training_alone():
    model = make_model(**{**VARIANTS["topk"], "selector_balance": 0.1})
    biases = [layer.tower.selector.bias.clone() for layer in model.model.layers]
    model(text_ids(2, 30))
    model(text_ids(2, 30))
    assert all(torch.equal(layer.tower.selector.bias, b) for layer, b in zip(model.model.layers, biases, strict=True))
    model.train()
    model(text_ids(2, 30))
    model(text_ids(2, 30))
    for layer, before in zip(model.model.layers, biases, strict=True):
        moved = layer.tower.selector.bias - before
        assert 0.09 < moved.abs().max() < 0.11


def test_rows_of_a_batch_do_not_meet():
    model = make_model(**VARIANTS["everything"])
    ids = torch.cat([text_ids(2, 40), random_ids(1, 40)])
    together = model(ids).logits
    for row in range(3):
        assert torch.allclose(model(ids[row : row + 1]).logits[0], together[row], atol=1e-12)
