"""What mechanisms do is measured as it is defined, by slow loops over the tokens."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.evaluate.inspection import Behaviour, behaviour, level_names, opinions, read_tower
from dyadlm.model import DyadConfig, DyadForCausalLM

TEXT = b"the cat sat. the cat ran. "


def make(**fields) -> DyadForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_levels": 3, "slot_entries": 4096, "selector_heads": 2}
    plain = {"semantic_levels": [], "selector": "none", "slot_contexts": []}  # whatever the preset has
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **plain | sizes | fields)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def test_skills_are_measured_as_defined():
    model = make(planner="head", semantic_levels=["word"])
    seen = behaviour(model, torch.tensor([list(TEXT), list(reversed(TEXT))]))
    outlook, measures, latest = seen.outlook, seen.measures(), seen.skills()
    starts = [0]
    for rank in model.config.ranks:
        starts.append(starts[-1] + rank)
    for level, name in enumerate(["1", "2", "4", "word"]):
        own = slice(starts[level], starts[level + 1])
        missed = stayed = 0.0
        for row in range(2):
            last = math.nan
            for t in range(len(TEXT)):
                if outlook.judged[row, t, level]:
                    came = outlook.last[row, t, own]
                    here = (outlook.expected[row, t, own] - came).square().sum().item()
                    before = (outlook.previous[row, t, own] - came).square().sum().item()
                    missed, stayed, last = missed + here, stayed + before, max(1 - here / before, -1.0)
                if row == 0:
                    assert latest[level, t].item() == pytest.approx(last, rel=1e-4, abs=1e-5, nan_ok=True)
        assert measures[f"skill_{name}"] == pytest.approx(1 - missed / stayed, rel=1e-4)
    unseen = behaviour(make(), torch.tensor([list(TEXT)]))
    assert unseen.skills() is None
    assert not [name for name in unseen.measures() if name.startswith("skill")]
    short = behaviour(model, torch.tensor([[97, 98]])).measures()
    assert {name for name in short if name.startswith("skill")} == {"skill_1"}  # of others nothing came


def test_opinions_are_those_before_the_token_came():
    model, ids = make(planner="head"), torch.tensor(list(TEXT))
    alone = model(ids[None]).logits[0].log_softmax(-1)
    model.config.consensus = 0.8
    both, plan = model(ids[None]).logits[0], model(ids[None], output_plan=True).plan
    found = opinions(model, ids)
    assert list(found) == ["engineer", "artist", "consensus", "proposal"]
    for t, token in enumerate(TEXT):
        for name, said in (("engineer", alone), ("artist", plan.artist[0].log_softmax(-1)), ("consensus", both)):
            expected = said[t - 1, token].item() if t else math.nan
            assert found[name][t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
        expected = plan.proposal[0, t - 2].log_softmax(-1)[token].item() if t > 1 else math.nan
        assert found["proposal"][t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    figures = read_tower(model, byte_tokenizer(), TEXT.decode()).figures()["all"]
    assert figures["artist_nats"] == pytest.approx(-found["artist"][1:].mean().item())
    assert figures["proposal_nats"] == pytest.approx(-found["proposal"][2:].mean().item())
    short = read_tower(model, byte_tokenizer(), "a")
    assert all(said.isnan().all() and len(said) == 1 for said in short.opinions.values())
    assert not [name for name in short.figures()["all"] if name.endswith("_nats")]
    assert not opinions(make(), ids)


def test_routes_are_measured_as_defined():
    model = make(selector="entmax")
    ids = torch.tensor([list(TEXT), list(reversed(TEXT))])
    seen = behaviour(model, ids)
    with torch.no_grad():
        routes = torch.stack(model(input_ids=ids, output_routes=True).routes)
    torch.testing.assert_close(seen.routes, routes)
    layers, rows, time, heads, levels = routes.shape
    entropies, counts, runs, shares = [], [], [], torch.zeros(layers, heads, levels)
    for layer in range(layers):
        for row in range(rows):
            for head in range(heads):
                before = None
                for t in range(time):
                    weights = routes[layer, row, t, head].tolist()
                    entropies.append(-sum(w * math.log(w) for w in weights if w) / math.log(levels))
                    chosen = [w > 0 for w in weights]
                    counts.append(sum(chosen))
                    if chosen != before:
                        runs.append(0)
                    runs[-1] += 1
                    before = chosen
                    shares[layer, head] += torch.tensor(chosen) / (rows * time)
    assert min(counts) < levels
    expected = {
        "commitment": sum(entropies) / len(entropies),
        "levels_chosen": sum(counts) / len(counts),
        "run_length": sum(runs) / len(runs),
        "largest_load": shares.max().item(),
        "smallest_load": shares.min().item(),
    }
    assert seen.measures() == pytest.approx(expected, rel=1e-4)
    assert seen.layer(1).measures()["largest_load"] == pytest.approx(shares[1].max().item(), rel=1e-5)


def test_slots_hit_where_a_context_was_before():
    model = make(slot_contexts=[1, 3], slot_ways=8)
    hits = behaviour(model, torch.tensor([list(TEXT)])).hits
    for context in (1, 3):
        windows = [TEXT[t - context + 1 : t + 1] if t + 1 >= context else None for t in range(len(TEXT))]
        # What ended at t - 1 is written at t, before t is read.
        expected = [window is not None and window in windows[:t] for t, window in enumerate(windows)]
        assert hits[str(context)][0].tolist() == expected
    assert behaviour(make(slot_contexts=[1, "code"]), torch.tensor([list(TEXT)])).hits == {}


@pytest.mark.parametrize("tower", ["layer", "input"])
def test_segments_are_those_that_the_model_tells(tower):
    model = make(semantic_levels=["learned", "word"], slot_contexts=["word"], tower=tower)
    ids = torch.tensor([list(TEXT)])
    seen = behaviour(model, ids)
    with torch.no_grad():
        boundaries = model(input_ids=ids, output_routes=True).boundaries
    assert torch.equal(seen.segments["word"], boundaries[None, ..., 0])
    own = 2 if tower == "layer" else 1
    assert torch.equal(seen.segments["learned"], boundaries[..., 1 : 1 + own].permute(2, 0, 1))
    found = seen.measures()
    assert found["segment_length_word"] == pytest.approx(len(TEXT) / boundaries[..., 0].sum().item())
    begun = seen.segments["learned"].sum().item()
    assert found["segment_length_learned"] == pytest.approx(own * len(TEXT) / begun)


def test_words_for_slots_alone_are_no_level():
    seen = behaviour(make(semantic_levels=["line"], slot_contexts=["word"]), torch.tensor([list(TEXT)]))
    assert list(seen.segments) == ["line"]
    assert list(seen.hits) == ["word"]


def test_models_without_mechanisms_have_no_measures():
    ids = torch.tensor([list(TEXT)])
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for model in (llama, make()):
        assert behaviour(model, ids) == Behaviour(None, {}, {})
        assert behaviour(model, ids).measures() == {}


def test_a_reading_names_its_levels_and_tells_all_layers():
    model = make(semantic_levels=["word"], selector="topk", selector_count=2)
    assert level_names(model.config) == ["1", "2", "4", "word"]
    reading = read_tower(model, byte_tokenizer(), TEXT.decode())
    assert "".join(reading.pieces) == TEXT.decode()
    assert reading.contributions.shape == (2, 4, len(TEXT))
    figures = reading.figures()
    assert figures["all"]["levels_chosen"] == 2.0
    assert [set(layer) for layer in figures["layers"]] == [
        {"commitment", "levels_chosen", "run_length", "largest_load", "smallest_load"}
    ] * 2
    assert reading.notes == []
