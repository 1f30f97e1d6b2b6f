"""Facts about the mechanisms inside a model, each of which would be false of another mechanism."""

import copy
import itertools
import pickle

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.model.slots import plan_slots
from dyadlm.model.trace import level_contributions, without_level
from dyadlm.ops import make_clock
from dyadlm.ops.contexts import context_tags
from dyadlm.ops.slots import EVICTIONS, slot_read

from .conftest import SLOTS, SMALL, VARIANTS, make_model, random_ids, text_ids


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


@pytest.mark.parametrize("evict", EVICTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_no_collision_brings_back_a_wrong_value_in_a_vocabulary_of_131072(seed, evict):
    """Told from the tokens themselves: what is read stood right after the context that stands here now."""
    contexts, generator = [1, 2, 3, 4, 6, 8, "word"], torch.Generator().manual_seed(seed)
    config = DyadConfig(vocab_size=2**17, slot_contexts=contexts, slot_entries=16, slot_ways=4, slot_evict=evict)
    # Tokens far apart and next to each other, in phrases that come back changed here and there.
    tokens = torch.cat([torch.arange(8), torch.arange(2**16, 2**16 + 8), torch.arange(2**17 - 8, 2**17)])
    phrase, time = torch.randint(0, 24, (14,), generator=generator), 400
    changed = torch.rand(time, generator=generator) < 0.06
    ids = tokens[torch.where(changed, torch.randint(0, 24, (time,), generator=generator), phrase.repeat(30)[:time])]
    begins = ids % 3 == 0
    clock = make_clock(1, time)
    tags, _ = context_tags(ids[None], contexts, config.vocab_size, clock, word_begins=begins[None])
    lookup = plan_slots(tags, clock, config, None)
    read = slot_read(torch.arange(time)[None, :, None, None], lookup)[0, :, :, 0].tolist()
    text, starts = ids.tolist(), (begins | (torch.arange(time) == 0)).tolist()

    def context(end: int, kind: int | str) -> list[int]:
        begin = end - kind if isinstance(kind, int) else max(t for t in range(end) if starts[t])
        return text[begin:end] if begin >= 0 else []

    for n, kind in enumerate(contexts):
        found = lookup.found[0, :, n].nonzero().flatten().tolist()
        for t in found:
            assert context(read[t][n], kind) == context(t + 1, kind) != []
            assert read[t][n] <= t
        assert 20 < len(found) < time - 20  # contexts come back, and others have taken the place of some


def test_what_writing_costs_is_a_mean_over_tokens_and_not_over_padding():
    fields = {**SMALL, **SLOTS, "slot_contexts": [1, "word"], "slot_gate": True}
    model, ids = make_model(**fields), text_ids(2, 30)
    whole = model(ids[:, :17]).metrics["cost"]
    assert not torch.allclose(model(ids).metrics["cost"], whole, rtol=1e-3)  # what else there is would count
    for place in (slice(0, 17), slice(13, 30)):
        mask, padded = torch.zeros(2, 30, dtype=torch.long), torch.full((2, 30), 256)
        mask[:, place], padded[:, place] = 1, ids[:, :17]
        assert torch.allclose(model(padded, attention_mask=mask).metrics["cost"], whole, rtol=1e-12)


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


@pytest.mark.parametrize("name", ["topk", "gumbel", "everything"])
def test_recomputed_activations_correct_the_bias_once(name):
    """Gradient checkpointing runs each block twice a step: biases and losses stay those of one run, to the bit."""
    results = []
    for recomputed in (False, True):
        model = make_model(torch.float32, **{**VARIANTS[name], "selector_balance": 0.05}).train()
        if recomputed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name
        optimizer, passes, losses = torch.optim.SGD(model.parameters(), lr=0.1), [], []
        model.model.layers[0].tower.selector.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        torch.manual_seed(7)
        for step in range(3):
            model.set_progress((step + 1) / 3)  # at 0, topk still takes all levels
            ids = text_ids(2, 40, seed=step)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        biases = torch.stack([layer.tower.selector.bias for layer in model.model.layers])
        assert len(passes) == (6 if recomputed else 3)
        # The load of the last step is still to come: two corrections so far.
        assert biases.abs().max() == pytest.approx(0.1)
        results.append((biases, torch.stack(losses)))
    for once, twice in zip(*results, strict=True):
        assert torch.equal(once, twice)


def test_rows_of_a_batch_do_not_meet():
    model = make_model(**VARIANTS["everything"])
    ids = torch.cat([text_ids(2, 40), random_ids(1, 40)])
    together = model(ids).logits
    for row in range(3):
        assert torch.allclose(model(ids[row : row + 1]).logits[0], together[row], atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_be_pickled_and_copied(name):
    """As `torch.save(model)` and processes that are spawned do."""
    model, ids = make_model(torch.float32, **VARIANTS[name]), text_ids(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301 - our own
            assert torch.equal(twin(ids).logits, expected)


def test_what_levels_add_is_traced_without_dropout_and_the_mode_stays():
    model, ids = make_model(torch.float32, dropout=0.5).train(), text_ids(1, 20)
    first = level_contributions(model, ids)
    assert model.training
    assert torch.equal(first, level_contributions(model, ids))
    assert torch.equal(first, level_contributions(model.eval(), ids))
    assert not model.training
    with pytest.raises(ValueError, match="one text at a time"):
        level_contributions(model, text_ids(2, 20))
    with pytest.raises(ValueError, match="no level 99"):
        without_level(model, 99)
