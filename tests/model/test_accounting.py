"""Predictions from the configuration equal the real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.accounting import forward_flops, parameters, state_bytes, training_flops_per_token
from dyadlm.model import PRESETS
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions

from .conftest import VARIANTS

SHAPES = [
    {},
    {"tie_word_embeddings": False, "level_feature": "transport+pair"},
    {"level_alignment": "prefix", "level_rank": [3, 4, 5, 6, 7, 8]},
    {"level_alignment": "block", "transport_space": "model", "level_feature": "transport+centroid"},
    {"level_alignment": ["sliding", "dual", "prefix", "block", "sliding", "dual"], "level_feature": "transport"},
    {"level_alignment": "sliding", "transport_space": "model", "level_feature": "transport+pair"},
    {"planner": "stack", "level_feature": "pair"},
    *({"num_levels": 7, **variant} for variant in VARIANTS.values()),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_equal_the_model(shape):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_levels": 6}
    config = DyadConfig(**{**sizes, **shape})
    model = DyadForCausalLM(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    for length in (1, 50, 64):
        ids = torch.randint(0, 259, (1, length))
        with FlopCounterMode(display=False) as counter:
            cache = model.eval()(ids, use_cache=True).past_key_values
        assert counter.get_total_flops() == forward_flops(config, length)
        assert cache.state_bytes() == state_bytes(config)
    if config.planner != "none":
        model.accompany("planner", PlannerLessons(model, PlannerOptions()))
    with FlopCounterMode(display=False) as counter:
        model.train()(ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == pytest.approx(64 * training_flops_per_token(config, 64), rel=0.02)


def test_long_segments_are_counted_too():
    """Tiles of tiles, and tiles of those."""
    config = DyadConfig(hidden_size=8, num_hidden_layers=1, num_levels=2, semantic_levels=["word"], level_rank=2)
    for length in (33, 1025):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            DyadForCausalLM(config).eval()(torch.randint(0, 259, (1, length)))
        assert counter.get_total_flops() == forward_flops(config, length)


def test_one_token_computes_the_chosen_levels_alone():
    config = DyadConfig(hidden_size=32, selector="topk", selector_count=1, selector_heads=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        DyadForCausalLM(config).eval()(torch.tensor([[65]]))
    assert counter.get_total_flops() < forward_flops(config, 1)


@pytest.mark.parametrize(("preset", "size"), [("tiny", 1e6), ("paper", 1e6), ("small", 1e7), ("base", 1.2e8)])
def test_presets_have_the_size_they_promise(preset, size):
    config = DyadConfig.from_preset(preset)
    with torch.device("meta"):
        model = DyadForCausalLM(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    assert 0.8 * size <= parameters(config) <= 1.2 * size
    assert set(PRESETS) == {"tiny", "paper", "small", "base"}
