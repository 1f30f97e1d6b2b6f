"""The planner: its nodes and forecasts by slow loops, who sees what, and nothing of the future in what is scored."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM, UserError
from dyadlm.model.cache import PlannerState
from dyadlm.model.extension import TrainingPass
from dyadlm.model.extras import planning
from dyadlm.model.extras.planning import level_meaning
from dyadlm.ops import make_clock
from dyadlm.ops.consensus import consensus, nucleus
from dyadlm.train.planner import PlannerLessons, reading_order, true_future
from dyadlm.train.settings import PlannerOptions

from .conftest import SMALL, VARIANTS, make_model, text_ids
from .test_streaming import distance

EXACT = 1e-9
WORDS = {**SMALL, "semantic_levels": ["word"], "num_levels": 3, "planner": "head", "planner_width": 4}
PARTS = ("forecast", "last", "previous", "memory", "expected", "proposal", "artist", "far")


def parts(plan) -> dict[str, Tensor]:
    """Everything a plan holds that is a number, by name."""
    return {name: getattr(plan.outlook if hasattr(plan.outlook, name) else plan, name) for name in PARTS}


def prepare_run(model, ids, **inputs):
    return model(ids, output_plan=True, **inputs).plan


def by_loop(model, outlook, starts: list[bool]) -> list[list[dict]]:
    """What each level knows at each token of one row, token by token: by the definition of its nodes."""
    forecasters, config = model.model.forecasters, model.config
    values, begins = outlook.values[0].split(config.ranks, -1), outlook.begins[0]
    levels = []
    for k, own in enumerate(values):
        gates, content = forecasters.entries[k].weight.chunk(2)
        rows, nodes, tokens = [], [], []
        memory, expected = own.new_zeros(config.planner_width), None
        for t, token in enumerate(own):
            if starts[t]:
                nodes, tokens, memory, expected = [], [], torch.zeros_like(memory), None
            came = []
            if k >= len(config.alignments) and begins[t, k] and tokens:
                came, tokens = [torch.stack(tokens).mean(0)], []
            tokens.append(token)
            if k < len(config.alignments) and len(tokens) == 2**k:
                came, tokens = [torch.stack(tokens).mean(0)], []
            before = expected
            for node in came:
                gate = (gates @ node).sigmoid()
                memory = (1 - gate) * memory + gate * (content @ node)
                nodes.append(node)
            last, previous = [torch.zeros_like(token), torch.zeros_like(token), *nodes][:-3:-1]
            expected = last + forecasters.exits[k].weight @ memory
            rows.append({
                "forecast": expected, "last": last, "previous": previous, "memory": memory,
                "complete": bool(came), "judged": bool(came) and len(nodes) > 1, "before": before,
            })  # fmt: skip
        levels.append(rows)
    return levels


def test_nodes_forecasts_and_what_is_held_are_as_defined():
    model, sizes = make_model(**WORDS), (9, 1, 30)
    ids = torch.cat([text_ids(1, n, seed=n) for n in sizes], 1)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    outlook = prepare_run(model, ids, position_ids=positions).outlook
    levels = by_loop(model, outlook, (positions[0] == 0).tolist())
    assert (outlook.judged.sum((0, 1)) > 3).all()
    for k, rows in enumerate(levels):
        for t, row in enumerate(rows):
            for name in ("forecast", "last", "previous"):
                assert distance(getattr(outlook, name)[0, t].split(model.config.ranks)[k], row[name]) < EXACT, name
            assert distance(outlook.memory[0, t].split(4)[k], row["memory"]) < EXACT
            assert outlook.complete[0, t, k] == row["complete"]
            assert outlook.judged[0, t, k] == row["judged"]
            if row["judged"]:
                assert distance(outlook.expected[0, t].split(model.config.ranks)[k], row["before"]) < EXACT


def test_values_are_what_the_last_blocks_bottlenecks_read():
    for tower, layer in (("layer", 1), ("input", 0)):
        model, heard = make_model(**{**WORDS, "tower": tower}), []
        listening = model.model.layers[layer].tower
        listen = listening.read_levels
        listening.read_levels = lambda x, *rest, listen=listen, heard=heard: (heard.append(x), listen(x, *rest))[1]
        outlook = prepare_run(model, text_ids(1, 12)).outlook
        expected = torch.cat([linear(heard[0], bottleneck.weight) for bottleneck in listening.bottlenecks], -1)
        assert distance(outlook.values, expected) < EXACT


def test_a_new_model_expects_that_nothing_changes():
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig(**WORDS)).eval()
    outlook = prepare_run(model, text_ids(2, 40)).outlook
    assert torch.equal(outlook.forecast, outlook.last)
    assert outlook.last.abs().sum() > 0
    assert model.planner.share.sigmoid().tolist() == pytest.approx([1 / 8, 1 / 2, 1 / 4, 1 / 8])


def test_each_forecaster_sees_its_own_level_alone():
    model = make_model(**WORDS)
    clock, ranks = make_clock(1, 24), model.config.ranks
    values = torch.randn(1, 24, sum(ranks), dtype=torch.float64)
    begins = (torch.arange(24) % 5 == 0)[None, :, None]

    def forecasts(values: Tensor) -> tuple[Tensor, ...]:
        outlook, _ = model.model.forecasters(values, begins, clock, PlannerState(), wanted=True)
        return outlook.forecast.split(ranks, -1)

    before = forecasts(values)
    for k in range(len(ranks)):
        changed = [part + (j == k) for j, part in enumerate(values.split(ranks, -1))]
        after = forecasts(torch.cat(changed, -1))
        assert [distance(*pair) > 0 for pair in zip(after, before, strict=True)] == [j == k for j in range(len(ranks))]


@pytest.mark.parametrize("name", ["planner", "planner_input"])
def test_plans_in_chunks_padded_and_packed_are_those_of_the_whole(name):
    model, ids = make_model(**VARIANTS[name]), text_ids(2, 50)
    whole = parts(prepare_run(model, ids))
    for cuts in ([7, 8, 31], range(1, 50)):
        cache, pieces = DyadCache(), []
        for start, stop in zip([0, *cuts], [*cuts, 50], strict=True):
            pieces.append(parts(prepare_run(model, ids[:, start:stop], past_key_values=cache)))
        for part, expected in whole.items():
            assert distance(torch.cat([piece[part] for piece in pieces], 1), expected) < EXACT, part
    padded = torch.cat([torch.full((2, 5), 256), ids], 1)
    mask = (torch.arange(55) >= 5).long().expand(2, -1)
    for part, value in parts(prepare_run(model, padded, attention_mask=mask)).items():
        assert distance(value[:, 5:], whole[part]) < EXACT, part
    packed, positions = torch.cat([text_ids(2, 9, seed=3), ids], 1), torch.cat([torch.arange(9), torch.arange(50)])
    for part, value in parts(prepare_run(model, packed, position_ids=positions[None])).items():
        assert distance(value[:, 9:], whole[part]) < EXACT, part


def test_the_state_goes_on_while_no_plan_is_asked_for():
    model, ids = make_model(**WORDS), text_ids(1, 30)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    late = parts(prepare_run(model, ids[:, 20:], past_key_values=cache))
    for part, expected in parts(prepare_run(model, ids)).items():
        assert distance(late[part], expected[:, 20:]) < EXACT, part


def test_logits_are_the_consensus_in_evaluation_and_the_engineers_in_training():
    model, ids = make_model(**VARIANTS["planner_input"]), text_ids(2, 30)
    agreed = model(ids, labels=ids, output_plan=True)
    engineer = model.train()(ids).logits
    assert model(ids).plan is None
    assert distance(agreed.logits, consensus(engineer, agreed.plan.artist, 0.8)) < EXACT
    assert distance(agreed.logits.exp().sum(-1), torch.ones(2, 30)) < EXACT
    scored = agreed.logits[:, :-1].gather(-1, ids[:, 1:, None])
    assert agreed.loss.item() == pytest.approx(-scored.mean().item())  # a distribution, so it has a likelihood
    model.config.consensus = 0.0
    assert torch.equal(model.eval()(ids).logits, engineer)
    assert distance(agreed.logits, engineer.log_softmax(-1)) > 1e-3
    model.config.consensus = 0.8
    last = model(ids, logits_to_keep=1, output_plan=True)
    assert distance(last.logits, agreed.logits[:, -1:]) < EXACT
    assert last.plan.outlook.last.shape[1] == 30


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_goes_by_consensus(beams):
    model, ids = make_model(**VARIANTS["planner"]), text_ids(2, 12)
    written = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None)
    if beams == 1:
        read = model(written).logits[:, 11:-1]
        assert torch.equal(written[:, 12:], read.argmax(-1))
    model.config.consensus = 0.0
    assert not torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=beams), written)


def test_the_future_is_chosen_by_proposal_and_agreement():
    model = make_model(**VARIANTS["planner"])
    generator = torch.Generator().manual_seed(0)
    engineer, proposal, *artists = torch.randn(5, 1, 20, 12, generator=generator, dtype=torch.float64) * 2
    futures = (proposal / 8).topk(3).indices
    found = model.planner.choose(engineer, proposal / 8, futures, torch.stack(artists, 2), 0.9)
    allowed = nucleus(engineer.log_softmax(-1), 0.9)
    scores = []
    for future, artist in enumerate(artists):
        agreement = (engineer.softmax(-1) * artist.softmax(-1) * allowed).sum(-1)
        scores.append((proposal / 8).softmax(-1).gather(-1, futures[..., future, None]).squeeze(-1) * agreement)
    assert torch.equal(found, torch.stack(scores, -1).argmax(-1))
    assert len(found.unique()) == 3


def test_what_a_coarse_dtype_says_is_added_up_in_a_finer_one():
    model = make_model(**VARIANTS["planner"])
    generator = torch.Generator().manual_seed(0)
    engineer, proposal, *artists = torch.randn(5, 1, 64, 2000, generator=generator).bfloat16() * 2
    proposal = proposal / 64
    futures, artist = proposal.float().topk(3).indices, torch.stack(artists, 2)
    for mass in (0.9, 1.0):
        exact = model.planner.choose(engineer.double(), proposal.double(), futures, artist.double(), mass)
        assert torch.equal(model.planner.choose(engineer, proposal, futures, artist, mass), exact)
        assert len(exact.unique()) == 3


def test_the_artist_speaks_of_the_future_that_was_chosen():
    model, ids = make_model(**VARIANTS["planner"]), text_ids(1, 40)
    model.planner.norm.weight.data.mul_(0.1)  # proposals that are nearly even, so that agreement decides
    plan, hidden = prepare_run(model, ids), model.model(ids).last_hidden_state
    assert torch.equal(plan.futures, plan.proposal.topk(3).indices)
    assert len(plan.choice.unique()) > 1
    chosen = plan.futures.gather(-1, plan.choice[..., None]).squeeze(-1)
    stood_for = level_meaning(model.model, chosen)
    share = torch.repeat_interleave(model.planner.share.sigmoid(), torch.tensor(model.config.ranks))
    node = plan.outlook.forecast * (1 - share) + share * stood_for
    far = model.model.forecasters.again(plan.outlook.memory, node)
    assert distance(plan.far, far) < EXACT
    picture = model.planner.artist(plan.outlook.forecast, far, model.model.embed_tokens(chosen), hidden)
    assert distance(plan.artist, model.lm_head(picture)) < EXACT


def test_a_hypothesis_is_one_more_step_of_the_forecasters():
    """Supposing the node that then comes gives the forecast that is then held."""
    model = make_model(**{**WORDS, "semantic_levels": []})
    outlook = prepare_run(model, text_ids(1, 24)).outlook
    again = model.model.forecasters.again(outlook.memory[:, :-1], outlook.last[:, 1:])
    for k, (supposed, held) in enumerate(
        zip(again.split(model.config.ranks, -1), outlook.forecast[:, 1:].split(model.config.ranks, -1), strict=True)
    ):
        came = outlook.complete[0, 1:, k]
        assert came.sum() >= 6
        assert distance(supposed[0, came], held[0, came]) < EXACT


def test_the_artist_sees_forecasts_alone_unless_it_sees_both():
    for sees, expected in (("forecast", False), ("both", True)):
        model = make_model(**{**WORDS, "artist_sees": sees})
        near, far = torch.randn(2, 1, 3, 1, sum(model.config.ranks), dtype=torch.float64)
        token, hidden = torch.randn(2, 1, 3, 1, 16, dtype=torch.float64)
        pictures = [model.planner.artist(near, far, token, hidden * scale) for scale in (1, 2)]
        assert (distance(*pictures) > 1e-6) is expected
        for changed in ((near + 1, far, token), (near, far + 1, token), (near, far, token + 1)):
            assert distance(model.planner.artist(*changed, hidden), pictures[0]) > 1e-6


@pytest.mark.parametrize("planner", ["head", "stack"])
def test_forecasts_stay_forecasts(planner):
    """They learn from what came alone, and nobody learns through them."""
    model, ids = make_model(**{**WORDS, "planner": planner, "artist_sees": "forecast"}), text_ids(1, 24)
    forecasters = [name for name, _ in model.named_parameters() if ".forecasters." in name]

    def reached(loss: Tensor) -> set[str]:
        model.zero_grad()
        loss.backward(retain_graph=True)
        return {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}

    plan = prepare_run(model, ids)
    assert reached(plan.outlook.expected.square().sum()) == set(forecasters)
    artist = reached(plan.artist.square().sum())
    assert not artist & set(forecasters)
    assert not any(".layers." in name for name in artist)
    assert any("planner.artist" in name for name in artist)
    assert "planner.share" in artist
    proposal = reached(plan.proposal.square().sum())
    assert not proposal & set(forecasters)
    assert any(".layers.1." in name for name in proposal)


# ---- Causality, with everything on and a teacher who sees the future


def taught(name: str) -> DyadForCausalLM:
    """In training, half of the teacher's rows being true."""
    model = make_model(**{**VARIANTS[name], "dropout": 0.1}).train()
    model.accompany("planner", PlannerLessons(model, PlannerOptions(teacher=0.5)))
    model.set_progress(0.25)
    return model


def everything(model, ids, training: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    output = model(ids, labels=ids if training else None, output_plan=True)
    return {"logits": output.logits, **parts(output.plan)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["planner", "planner_input"])
def test_later_tokens_change_nothing_earlier(name, training):
    model, ids = taught(name).train(training), text_ids(2, 40)
    before = everything(model, ids, training)
    for cut in (1, 2, 15, 16, 39):
        changed = ids.clone()
        changed[0, cut:] = (changed[0, cut:] + 101) % 259
        after = everything(model, changed, training)
        for part, value in after.items():
            assert torch.equal(value[0, :cut], before[part][0, :cut]), part
            assert torch.equal(value[1], before[part][1]), part
        assert not torch.equal(after["artist"][0, cut:], before["artist"][0, cut:])


def latest_reader(model, ids, wanted: str, at: int, training: bool) -> int:
    """The last token from which a gradient reaches what is wanted at a position."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    value = everything(model, ids, training)[wanted]
    hook.remove()
    (gradient,) = torch.autograd.grad(value[0, at].square().sum(), seen[0])
    return int(gradient[0].abs().sum(-1).nonzero().max())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wanted", ["logits", "proposal", "artist"])
def test_no_gradient_reaches_them_from_later_tokens(wanted, training):
    model = taught("planner").train(training)
    assert latest_reader(model, text_ids(1, 24), wanted, 11, training) == 11


def leak(model, monkeypatch) -> None:
    """Let the artist see the true future in what is scored, as only its teacher may."""
    draw = planning.draw_plan

    def keep(module, args, output) -> None:
        if output.dim() == 3:  # what is read, not what is proposed
            model.read = (args[0], output)

    def leaky(_, hidden, engineer, outlook):
        plan, (ids, embedded) = draw(model, hidden, engineer, outlook), model.read
        order, clock = reading_order(TrainingPass(ids, ids, None, None, hidden, {}))
        future = true_future(ids, outlook, order, clock, model.config)
        token = torch.cat([embedded[:, 2:], torch.zeros_like(embedded[:, :2])], 1)
        return plan._replace(artist=model.lm_head(model.planner.artist(future.near, future.far, token, hidden)))

    model.get_input_embeddings().register_forward_hook(keep)
    monkeypatch.setattr(planning, "draw_plan", leaky)


def test_an_artist_who_sees_the_true_future_is_caught_by_both(monkeypatch):
    model, ids = make_model(**VARIANTS["planner"]), text_ids(1, 24)
    leak(model, monkeypatch)
    before = everything(model, ids, training=False)
    changed = ids.clone()
    changed[0, 13:] = (changed[0, 13:] + 101) % 259
    after = everything(model, changed, training=False)
    assert not torch.equal(after["logits"][0, :13], before["logits"][0, :13])
    assert torch.equal(after["proposal"][0, :13], before["proposal"][0, :13])
    assert latest_reader(model, ids, "logits", 11, training=False) == 13


def test_an_artist_whose_weight_is_learned_changes_nothing_at_first_and_then_by_its_weight():
    torch.manual_seed(0)
    model, ids = DyadForCausalLM(DyadConfig(**WORDS, pool="learned", consensus=0.9)).eval(), text_ids(2, 24)
    with torch.no_grad():
        output = model(ids, output_plan=True)
        model.config.consensus = 0.0
        engineer = model(ids).logits
    assert torch.equal(output.plan.weight, torch.zeros(2, 24))
    assert torch.equal(output.logits, engineer.log_softmax(-1))
    assert torch.equal(output.logits, output.plan.pool)

    model, ids = make_model(**{**VARIANTS["planner"], "consensus": 0.9}), text_ids(2, 24)
    with torch.no_grad():
        output = model(ids, output_plan=True, output_hidden_states=True)
        model.config.consensus = 0.0
        alone = model(ids, output_plan=True)
        weight = model.planner.belief(output.hidden_states[-1]).squeeze(-1).tanh()
    torch.testing.assert_close(output.plan.weight, weight)
    assert weight.std() > 0.01
    torch.testing.assert_close(output.logits, consensus(alone.logits, output.plan.artist, 0.9, weight))
    assert output.logits.exp().sum(-1).sub(1).abs().max() < EXACT
    # With consensus off the pool is still there, over the whole vocabulary; logits are the engineer's.
    torch.testing.assert_close(alone.plan.pool, consensus(alone.logits, alone.plan.artist, 1.0, weight))


def test_only_the_weight_learns_from_the_pool():
    model, ids = taught("planner"), text_ids(2, 24)
    output = model(ids, labels=ids, output_plan=True)
    (-output.plan.pool.gather(-1, ids[..., None]).mean()).backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {"planner.belief.weight", "planner.belief.bias"}
    assert model.planner.belief.weight.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused():
    for fields, message in (
        ({"planner": "tail"}, "choose one of none, head, stack"),
        ({"planner": "head", "artist_sees": "all"}, "choose one of forecast, both"),
        ({"planner": "head", "pool": "sum"}, "choose one of product, learned"),
        ({"planner": "head", "planner_width": 0}, "planner_width"),
        ({"planner": "head", "planner_futures": 300}, "choose fewer"),
        ({"consensus": 0.9}, "set planner too"),
        ({"planner": "head", "consensus": 1.5}, "consensus"),
        ({"planner": "stack", "transport_space": "model"}, "transport_space=level"),
    ):
        with pytest.raises(UserError, match=message):
            DyadConfig(**fields)


def test_a_model_without_a_planner_has_nothing_of_it():
    model = make_model()
    assert not [name for name in model.state_dict() if "planner" in name or "forecasters" in name]
    output = model(text_ids(1, 9), output_plan=True, use_cache=True)
    assert output.plan is None
    assert not any(name.startswith("planner") for name in output.past_key_values.tensors())
