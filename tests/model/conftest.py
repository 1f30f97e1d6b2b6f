"""Small models with random weights everywhere, so that no mechanism is silent as it is at initialisation."""

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_levels": 4, "selector_heads": 2}
SLOTS = {"slot_entries": 16, "slot_ways": 4, "slot_width": 3, "slot_layers": [0, 1]}
VARIANTS: dict[str, dict] = {
    "default": {},
    "pair": {"level_feature": "pair"},
    "sliding": {"level_alignment": "sliding", "early": "partial"},
    "dual": {"level_alignment": ["sliding", *["dual"] * 6], "early": "mask", "level_feature": "transport+pair"},
    "block": {"level_alignment": "block", "level_feature": "transport+centroid"},
    "prefix": {"level_alignment": "prefix", "level_feature": "difference", "early": "mask"},
    "mixed": {
        "level_alignment": ["sliding", "dual", "block", "prefix", "dual", "sliding", "dual"],
        "level_rank": [3, 4, 5, 6, 7, 8, 9],
        "level_feature": "transport",
        "early": "partial",
    },
    "model_space": {
        "level_alignment": ["sliding", "dual", "block", "prefix", "dual", "sliding", "dual"],
        "transport_space": "model",
        "level_feature": "transport+pair",
    },
    "centroid": {"level_feature": "centroid", "dropout": 0.1},
    "semantic": {
        **SMALL,
        "semantic_levels": ["syllable", "word", "sentence", "line", "paragraph"],
        "level_rank": [3, 4, 5, 6, 3, 4, 5, 6, 7],
    },
    "learned": {
        **SMALL,
        "semantic_levels": ["learned", "word"],
        "semantic_memory": 2,
        "forgetting": True,
        "salience": True,
        "level_feature": "transport+pair",
        "early": "mask",
    },
    "learned_alone": {**SMALL, "semantic_levels": ["learned"], "transport_space": "model", "salience": True},
    "salience": {
        **SMALL,
        "level_alignment": ["sliding", "dual", "prefix", "block"],
        "salience": True,
        "early": "partial",
    },
    "topk": {**SMALL, "selector": "topk", "selector_margin": 0.3, "selector_count": 2, "decision_slots": True},
    "entmax": {**SMALL, "selector": "entmax", "decision_slots": True, "level_feature": "difference"},
    "gumbel": {**SMALL, "selector": "gumbel", "selector_margin": 0.2, "selector_balance": 0.0},
    "input": {**SMALL, "selector": "dense", "tower": "input", "semantic_levels": ["word", "learned"], "salience": True},
    "slots": {**SMALL, **SLOTS, "slot_contexts": [1, 2, 3, 4, 6, 8, "word"]},
    "slots_lru": {
        **SMALL,
        **SLOTS,
        "slot_contexts": [1, "code", "word"],
        "slot_evict": "lru",
        "slot_gate": True,
        "slot_layers": [1],
    },
    "ngrams": {**SMALL, "ngram_sizes": [2, 3, 9, "word"], "ngram_entries": 32, "ngram_width": 5},
    "ngrams_slots": {
        **SMALL,
        **SLOTS,
        "semantic_levels": ["word", "line"],
        "slot_contexts": [1, 2, 4],
        "ngram_sizes": [1, 3, 6, "word"],
        "ngram_entries": 23,
        "ngram_width": 2,
    },
    "convolution": {**SMALL, **SLOTS, "mixers": ["convolution"], "slot_contexts": [1, "word"]},
    "delta": {**SMALL, "mixers": ["delta"], "semantic_levels": ["word", "line"], "salience": True},
    "outer": {
        **SMALL,
        "mixers": ["convolution", "delta", "outer"],
        "level_alignment": ["sliding", "dual", "prefix", "block"],
        "semantic_levels": ["word", "line"],
        "salience": True,
    },
    "slots_code": {**SMALL, **SLOTS, "slot_contexts": ["code"], "slot_ways": 2},
    "planner": {
        **SMALL,
        "semantic_levels": ["learned", "word"],
        "semantic_memory": 2,
        "level_rank": [3, 4, 5, 6, 7, 8],
        "level_feature": "transport+pair",
        "planner": "stack",
        "planner_width": 5,
        "planner_futures": 3,
        "artist_sees": "both",
        "pool": "learned",
        "selector": "dense",
        "consensus": 0.9,
    },
    "planner_input": {**SMALL, "tower": "input", "semantic_levels": ["word"], "planner": "head", "consensus": 0.8},
    "everything": {
        **SMALL,
        **SLOTS,
        "semantic_levels": ["syllable", "word", "sentence", "line", "paragraph", "learned"],
        "semantic_memory": 2,
        "salience": True,
        "forgetting": True,
        "selector": "topk",
        "selector_margin": 0.1,
        "decision_slots": True,
        "slot_contexts": [1, 2, "word", "code"],
        "slot_gate": True,
        "ngram_sizes": [2, 5, "word"],
        "ngram_entries": 40,
        "ngram_width": 3,
        "planner": "head",
        "planner_futures": 2,
        "consensus": 0.7,
    },
}


def make_model(
    dtype: torch.dtype = torch.float64, seed: int = 0, preset: str | None = None, **overrides
) -> DyadForCausalLM:
    """A preset, or a model without mechanisms but those told, at width 64 or as told; all of its weights random."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_levels": 7, "vocab_size": 259}
    torch.manual_seed(seed)
    fields = {**sizes, **overrides}
    model = DyadForCausalLM(DyadConfig(**fields) if preset is None else DyadConfig.from_preset(preset, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.to(dtype).eval()


# Of `make quick`: what the presets run.
QUICK = ("semantic", "slots", "salience")


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS])
def variant(request) -> dict:
    """Each alignment, feature, early rule, transport space and mechanism appears in one of these."""
    return VARIANTS[request.param]


TEXT = b"""To be, or not to be: that is the question.

Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune... or so! He said.
  Is it? """


def random_ids(batch: int, time: int, seed: int = 0, vocabulary: int = 259) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, time), generator=torch.Generator().manual_seed(seed))


def text_ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """Bytes of a text that goes round, so that segments begin and contexts come back; no two rows alike."""
    text = torch.tensor(list(TEXT)).repeat(2 + time // len(TEXT))
    return torch.stack([text[(37 * seed + 11 * b) % len(TEXT) :][:time] for b in range(batch)])
