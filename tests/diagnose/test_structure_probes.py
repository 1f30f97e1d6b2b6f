"""The probes of structure on real models and on what they cannot read; their estimators against definitions."""

import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.diagnose import PROBES, Budget, HuggingFaceSubject, Material, ProbeResult
from dyadlm.diagnose.oracles import Shown, independent, material_of, uniform
from dyadlm.diagnose.probes.drift import _hsic, _kernel
from dyadlm.diagnose.probes.identity import _area, _cosines, _Sample
from dyadlm.diagnose.probes.window import _fit
from dyadlm.diagnose.run import ask
from dyadlm.diagnose.statistics import percentiles, redrawn
from dyadlm.evaluate.linear_probe import fitted_on, ridge, ridge_classes
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.trace import level_contributions
from dyadlm.train.fingerprint import Fingerprint

pytestmark = pytest.mark.slow

STRUCTURE = ["octave", "window", "diffuse", "drift", "decay", "select", "identity"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 259}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
WORDS = [
    "to",
    "be",
    "or",
    "not",
    "that",
    "is",
    "the",
    "question",
    "whether",
    "nobler",
    "in",
    "mind.",
    "suffer.",
    "slings\n",
]


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))


def everything() -> DyadForCausalLM:
    config = DyadConfig(
        **SMALL,
        num_levels=4,
        level_alignment=["sliding", "dual", "prefix", "block"],
        max_position_embeddings=128,
        semantic_levels=["syllable", "word", "sentence", "line", "paragraph", "learned"],
        semantic_memory=2,
        salience=True,
        forgetting=True,
        selector="topk",
        selector_heads=2,
        selector_count=2,
        selector_margin=0.1,
        decision_slots=True,
        slot_contexts=[1, 2, "word", "code"],
        ngram_sizes=[2, "word"],
        ngram_entries=32,
        slot_entries=32,
        slot_ways=4,
        slot_width=4,
        slot_gate=True,
    )
    model = DyadForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=4, num_experts_per_tok=2))


def mamba() -> Mamba2ForCausalLM:
    return Mamba2ForCausalLM(
        Mamba2Config(**SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2, chunk_size=32)
    )


MODELS = {"llama": llama, "everything": everything, "mixtral": mixtral, "mamba": mamba}


def subject(name: str) -> HuggingFaceSubject:
    torch.manual_seed(0)
    return HuggingFaceSubject(MODELS[name](), byte_tokenizer(), name)


@pytest.fixture(scope="module")
def text() -> Material:
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(WORDS, size=75)) for _ in range(12)]
    return Material([TokenStream.from_text(documents, byte_tokenizer())], None, "words")


@pytest.fixture(scope="module")
def asked(text):
    """What a probe finds of a model: asked once."""
    return functools.cache(
        lambda probe, name: ask(PROBES[probe](), subject(name), text, Budget(tokens=0.05, batch_tokens=2048))
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("probe", STRUCTURE)
def test_a_probe_reads_a_real_model(probe, name, asked):
    result = asked(probe, name)
    assert not result.failed
    if probe == "diffuse" and name in ("everything", "mamba"):
        assert "attention" in result.not_applicable
        assert not result.readings
        return
    assert not result.not_applicable
    assert result.sentence.endswith(".")
    assert result.settings
    for reading in result.readings.values():
        assert math.isfinite(reading.value)
        if reading.interval is not None:
            assert reading.interval[0] - 1e-9 <= reading.value <= reading.interval[1] + 1e-9
    for curve in result.curves.values():
        assert len(curve.x) == len(curve.y) > 0
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    again = ProbeResult.from_dict(stored)
    assert dataclasses.replace(again, curves={}, settings={}) == dataclasses.replace(result, curves={}, settings={})


def test_what_a_probe_finds_depends_on_what_the_model_shows(asked):
    found = {
        (probe, name): asked(probe, name).readings
        for probe, name in itertools.product(["octave", "select", "identity"], ["llama", "everything", "mixtral"])
    }
    levels = subject("everything").levels
    assert list(levels) == ["1", "2", "4", "8", "syllable", "word", "sentence", "line", "paragraph", "learned"]
    assert {f"without_{level}" for level in levels} <= set(found["octave", "everything"])
    assert not any(name.startswith("without_") for name in found["octave", "llama"])
    assert "entropy" not in found["select", "llama"]
    assert {"sharpness"} == set(found["select", "llama"])
    assert {"entropy", "same_next", "same_by_load", "unused", "sharpness"} <= set(found["select", "mixtral"])
    assert {"entropy", "same_next", "sharpness"} <= set(found["select", "everything"])
    assert not any(name.startswith("index_") for name in found["identity", "llama"])
    assert found["identity", "llama"]["token_embedding"].value > 0.9


@pytest.mark.parametrize("probe", STRUCTURE)
def test_fast_says_what_it_left_out(probe, text):
    result = ask(PROBES[probe](), subject("llama"), text, Budget(tokens=0.3, fast=True))
    assert result.readings
    assert result.left_out


@pytest.mark.parametrize("probe", ["window", "drift", "decay"])
def test_without_hidden_states_a_probe_is_not_applicable(probe):
    result = ask(PROBES[probe](), uniform(16), independent(16, 64, 320), Budget())
    assert "hidden states" in result.not_applicable


def test_without_anything_to_read_select_is_not_applicable():
    assert "no routes" in ask(PROBES["select"](), uniform(16), independent(16, 8, 320), Budget()).not_applicable


@pytest.mark.parametrize("probe", STRUCTURE)
@pytest.mark.parametrize("reason", ["short context", "short text"])
def test_too_little_is_said(probe, reason):
    def even(ids):
        return [torch.ones(len(ids), 1, ids.shape[1], ids.shape[1])]

    tokens = torch.eye(16)
    shown = Shown(16, "shown", hidden=lambda ids: [tokens[ids]] * 2, attention=even, routes=lambda ids: [tokens[ids]])
    shown.context = 4 if reason == "short context" else None
    material = independent(16, 4, 320 if reason == "short context" else 7)
    result = ask(PROBES[probe](), shown, material, Budget())
    assert result.not_applicable
    assert not result.failed


def test_tokens_that_stand_for_no_text_have_no_bits_per_byte():
    result = ask(PROBES["octave"](), uniform(300), material_of([np.full(2000, 299)], "specials"), Budget())
    assert "per byte" in result.not_applicable


def test_octave_takes_the_longest_context_that_documents_fill():
    result = ask(PROBES["octave"](), uniform(16), independent(16, 4, 100), Budget(tokens=0.1))
    assert result.settings["contexts"][-1] == 64
    assert "64" in result.left_out


def test_swaps_that_move_a_boundary_are_no_yoking():
    def counted(ids):
        """How many segments have begun: a swap is felt after it if and only if it makes or unmakes a beginning."""
        begun = (ids == 0).cumsum(1)[..., None].float()
        return [begun, begun]

    model = Shown(4, "counts", hidden=counted, bounds=lambda ids: {"own": ids == 0})
    result = ask(PROBES["window"](), model, independent(4, 32, 256), Budget())
    assert result.readings
    assert "yoking_own" not in result.readings


def test_attention_that_is_no_distribution_is_refused():
    shown = Shown(8, "linear", attention=lambda ids: [torch.ones(len(ids), 1, ids.shape[1], ids.shape[1])])
    assert "sum to 1" in ask(PROBES["diffuse"](), shown, independent(8, 4, 256), Budget()).not_applicable


# ---- What the adapter shows


def test_a_silenced_level_says_nothing_and_the_others_what_they_said():
    model = subject("everything")
    ids = torch.tensor([list(b"To be, or not to be. That\n\nis the question")])
    before = model.logits(ids)
    spoken = level_contributions(model.model, ids)
    assert (spoken.amax(-1) > 0).all()
    for level in range(len(model.levels)):
        quiet = model.without_level(level)
        others = [k for k in range(len(model.levels)) if k != level]
        said = level_contributions(quiet.model, ids)
        assert (said[:, level] == 0).all()
        torch.testing.assert_close(said[0, others], spoken[0, others])
        assert not torch.equal(quiet.logits(ids), before)
    assert torch.equal(model.logits(ids), before)
    assert model.without_level(len(model.levels)) is None
    assert subject("llama").without_level(0) is None


@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_the_lens_makes_the_logits_of_what_the_last_norm_reads(name):
    gpt = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4)
    model = subject(name) if name in MODELS else HuggingFaceSubject(GPT2LMHeadModel(gpt), None)
    read = []
    norm, _ = model._head
    norm.register_forward_hook(lambda module, inputs, said: read.append(inputs[0].detach()))
    ids = torch.randint(0, 256, (2, 16))
    logits = model.logits(ids)
    torch.testing.assert_close(model.lens(read[0]), logits)


def test_a_head_that_does_more_than_project_is_not_recognised():
    config = Gemma2Config(**SMALL, **HEADS, head_dim=8, final_logit_softcapping=0.05)
    model = HuggingFaceSubject(Gemma2ForCausalLM(config), None)
    assert model.lens(torch.zeros(1, 4, 32)) is None


def test_a_blend_ends_in_both_texts():
    model = subject("llama")
    ids, other = torch.randint(0, 256, (2, 3, 16))
    ends = [model.blend(ids, other, torch.full((3,), share)) for share in (0.0, 1.0)]
    for end, meant in zip(ends, (ids, other), strict=True):
        torch.testing.assert_close(end, model.logits(meant)[:, -1])
    each = model.blend(ids, other, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(each[:2], torch.stack([ends[0][0], ends[1][1]]))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("futures", [1, 2])
def test_only_the_embedding_of_the_text_is_changed(futures, batch):
    """Not that of the proposals, of which consensus depends."""
    torch.manual_seed(0)
    config = DyadConfig(**SMALL, num_levels=3, planner="head", planner_futures=futures, consensus=0.9)
    model = DyadForCausalLM(config)
    with torch.no_grad():  # nothing is silent, as at first the forecasters are
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    model = HuggingFaceSubject(model, byte_tokenizer(), fingerprint=Fingerprint(config, tags=False))
    ids, other = torch.randint(0, 256, (2, batch, 16))
    for share, meant in ((0.0, ids), (1.0, other)):
        torch.testing.assert_close(model.blend(ids, other, torch.full((batch,), share)), model.logits(meant)[:, -1])
    index = torch.arange(16).expand(batch, -1)
    embedded = model.model.model.embed_tokens(ids) + model.fingerprint.index(index)
    with torch.no_grad():
        expected = model.model(inputs_embeds=embedded).logits
    torch.testing.assert_close(model.fingerprinted(ids, index), expected)


def test_routes_of_experts_are_the_chosen_ones():
    model = subject("mixtral")
    ids = torch.randint(0, 256, (2, 16))
    routes = model.routes(ids)
    assert [tuple(route.shape) for route in routes] == [(2, 16, 1, 4)] * 2
    for route in routes:
        torch.testing.assert_close(route.sum(-1), torch.ones(2, 16, 1))
        assert ((route > 0).sum(-1) == 2).all()


# ---- Estimators against their definitions


def test_hsic_is_the_mean_over_different_tokens():
    count = 6
    x, y = (_kernel(torch.randn(count, 3)) for _ in range(2))
    total = number = 0
    for i, j, q, r in itertools.permutations(range(count), 4):
        total += x[i, j] * y[i, j] + x[i, j] * y[q, r] - 2 * x[i, j] * y[i, q]
        number += 1
    assert _hsic(x, y) == pytest.approx(float(total / number), abs=1e-12)


def test_the_area_under_the_curve_counts_pairs():
    random = np.random.default_rng(0)
    scores, positive = random.integers(5, size=40).astype(float), random.random(40) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert _area(scores, positive) == pytest.approx(np.mean(pairs))


def test_cosines_are_of_tokens_of_different_windows():
    windows, own = 64, torch.randint(0, 8, (64 * 16,))
    turned = (own + torch.randint(0, 8, (windows,)).repeat_interleave(16)) % 8  # alike within a window alone
    states = torch.eye(8)[turned].view(windows, 16, 8)
    found = _cosines(_Sample([states], own, own, own, np.arange(windows)))
    assert found["cosine_same_token"].value == pytest.approx(0.5, abs=0.03)
    kept = _Sample([torch.eye(8)[own].view(windows, 16, 8)], own, own, own.flip(0), np.arange(windows))
    assert _cosines(kept)["cosine_same_token"].value == 1.0
    assert _cosines(kept)["cosine_same_next"].value == pytest.approx(0.5, abs=0.03)


def test_ridge_solves_the_smaller_system_and_means_the_same():
    wide, targets, asked = torch.randn(20, 30), torch.randn(20, 2), torch.randn(5, 30)
    x = (wide - wide.mean(0)) / wide.std(0, correction=0)
    gram = x.T @ x + 0.01 * 20 * torch.eye(30)
    weights = torch.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
    meant = (asked - wide.mean(0)) / wide.std(0, correction=0) @ weights + targets.mean(0)
    torch.testing.assert_close(ridge(wide, targets, asked), meant.double(), rtol=1e-3, atol=1e-3)
    again = ridge(wide[:, :10].repeat_interleave(3, 1), targets, asked[:, :10].repeat_interleave(3, 1))
    few = ridge(wide[:, :10], targets, asked[:, :10], penalty=0.01 / 3)  # three copies of a feature share its weight
    torch.testing.assert_close(again, few)


def test_a_constant_feature_says_nothing():
    labels = torch.tensor([0, 1, 1, 1])
    assert ridge_classes(torch.ones(4, 3), labels, torch.tensor([[1.0] * 3, [7.0] * 3]), 2).tolist() == [1, 1]


def test_no_document_is_both_fitted_and_tested():
    documents = np.array([0, 0, 1, 3, 3, 4, 4, 4])
    assert fitted_on(documents).tolist() == [True] * 5 + [False] * 3
    assert fitted_on(np.zeros(4, dtype=int)).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize(
    ("response", "has_scale"),
    [
        (lambda lag: np.exp(-lag / 20), True),
        (lambda lag: np.exp(-lag / 500), False),
        (lambda lag: (1.0 + lag) ** -0.7, False),
        (lambda lag: 64 / (64 + lag), False),
        (lambda lag: np.exp(lag / 50), False),
        (lambda lag: 1.0 * (lag < 4), False),
    ],
)
def test_an_exponential_alone_has_a_time_scale(response, has_scale):
    fit = _fit(response(np.arange(128.0))[None], 63.0)
    assert fit.has_scale.tolist() == [has_scale]
    if has_scale:
        assert fit.scale == pytest.approx(20)


def test_what_is_redrawn_begins_with_the_whole_and_keeps_documents_together():
    values, documents = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), np.array([5, 5, 9])
    sums = redrawn(values, documents)
    assert sums[0].tolist() == [7.0, 70.0]
    assert set(sums[:, 0]) == {6.0, 7.0, 8.0}  # twice the one document, both, twice the other
    assert set(redrawn(values, np.zeros(3))[:, 0]) == {3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0}
    assert percentiles(redrawn(values[:1], documents[:1])[:, 0]) is None
    assert percentiles(sums[:, 0]) == (6.0, 8.0)
