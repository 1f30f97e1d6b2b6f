"""Predictions from the configuration equal the real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.accounting import (
    activation_bytes,
    forward_flops,
    parameters,
    state_bytes,
    training_flops_per_token,
)
from dyadlm.errors import UserError
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


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
def test_memory_for_the_backward_pass_is_what_a_real_pass_saves(bfloat16):
    config = DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, slot_entries=64)
    model, saved = DyadForCausalLM(config).train(), {}
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(0, 259, (3, 100))
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model(input_ids=ids, labels=ids)
    assert activation_bytes(config, 3, 100, bfloat16) == sum(
        storage.nbytes() for place, storage in saved.items() if place not in own
    )
    whole, less = (activation_bytes(config, 3, 100, bfloat16, recomputed) for recomputed in (False, True))
    assert 3 * 100 * 32 * 4 * config.num_hidden_layers < less < whole


def test_memory_of_a_model_that_chooses_cannot_be_counted():
    config = DyadConfig(hidden_size=32, selector="topk", selector_count=1, selector_heads=2)
    with pytest.raises(UserError, match="selector"):
        activation_bytes(config, 1, 16)


SIZES = {"tiny": 1e6, "paper": 1e6, "small": 1.16e7, "base": 1.2e8, "large": 3.5e8, "xl": 1.3e9}


@pytest.mark.parametrize(("preset", "size"), SIZES.items())
def test_presets_have_the_size_they_promise(preset, size):
    config = DyadConfig.from_preset(preset)
    with torch.device("meta"):
        model = DyadForCausalLM(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    assert 0.95 * size <= parameters(config) <= 1.05 * size
    assert set(PRESETS) == set(SIZES)


@pytest.mark.parametrize("preset", ["base", "large", "xl"])
def test_a_longer_text_adds_far_levels_and_hardly_any_work(preset):
    """At 32,768 tokens, 16 times the length of the presets: four levels more."""
    short, long = (DyadConfig.from_preset(preset, max_position_embeddings=length) for length in (2048, 32_768))
    added = long.num_hidden_layers * 4 * 4 * long.hidden_size * long.level_rank
    assert len(long.alignments) == len(short.alignments) + 4
    assert added < parameters(long) - parameters(short) < 1.01 * added
    assert parameters(long) < 1.13 * parameters(short)
    assert training_flops_per_token(long, 32_768) < 1.01 * training_flops_per_token(short, 2048)
    assert state_bytes(long) < 1.25 * state_bytes(short)
