"""Models whose every part speaks, and texts with words, sentences and repeated contexts."""

import numpy as np
import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.engine import Engine

TEXT = (
    b"To be, or not to be: that is the question.\n\nWhether 'tis nobler in the mind to suffer\nThe slings and "
    b"arrows of outrageous fortune... or so! He said.\n  Is it? To be, or not to be. \xc3\xa9t\xc3\xa9 \xff\x00 "
)
SMALL = {"hidden_size": 40, "num_hidden_layers": 3, "slot_entries": 64}
# What the engine runs: the presets, few levels, no levels of nodes, no slots, no segments, untied weights, n-grams.
COMPOSITIONS = {
    "tiny": {"preset": "tiny", "slot_layers": [0, 2]},
    "small": {"preset": "small", "slot_layers": [1, 2]},
    "base": {"preset": "base", "slot_layers": [1]},
    "sliding alone": {"preset": "tiny", "num_levels": 3, "slot_layers": [1]},
    "one token contexts": {"preset": "tiny", "slot_contexts": [1, 12], "slot_layers": [1], "slot_ways": 1},
    "word contexts alone": {"preset": "tiny", "slot_contexts": ["word"], "slot_layers": [2], "semantic_levels": []},
    "no slots": {"preset": "small", "slot_contexts": [], "slot_layers": []},
    "no segments": {"preset": "small", "semantic_levels": [], "slot_layers": [1]},
    "untied": {"preset": "tiny", "tie_word_embeddings": False, "slot_layers": [1]},
    "n-grams": {"preset": "tiny", "ngram_sizes": [2, 3, 12, "word"], "ngram_entries": 53, "slot_layers": [1]},
    "n-grams without slots": {
        "preset": "small",
        "slot_contexts": [],
        "slot_layers": [],
        "semantic_levels": [],
        "ngram_sizes": ["word", 1, 4],
        "ngram_entries": 64,
        "ngram_width": 5,
    },
    "memory of a stream": {"preset": "tiny", "slot_scope": "stream", "slot_layers": [1]},
    "slots by use": {"preset": "tiny", "slot_evict": "lru", "slot_layers": [0, 2], "slot_entries": 16, "slot_ways": 4},
}


def make_model(preset: str = "tiny", **fields) -> DyadForCausalLM:
    """A small model with random weights everywhere."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset(preset, **{**SMALL, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def engine_of(model: DyadForCausalLM, **options) -> Engine:
    return Engine(model.config.to_dict(), {name: part.numpy() for name, part in model.state_dict().items()}, **options)


def text(count: int, begin: int = 0) -> np.ndarray:
    return np.frombuffer(TEXT * (2 + (begin + count) // len(TEXT)), np.uint8)[begin : begin + count].astype(np.int64)


@pytest.fixture(params=list(COMPOSITIONS))
def model(request) -> DyadForCausalLM:
    return make_model(**COMPOSITIONS[request.param])
