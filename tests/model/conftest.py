"""Small models with random weights everywhere, so that no mechanism is silent as it is at initialisation."""

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM

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
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, preset: str = "tiny", **overrides) -> DyadForCausalLM:
    """A preset narrowed to width 64 (or as told), all of its weights random."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_levels": 7, "vocab_size": 259}
    torch.manual_seed(seed)
    model = DyadForCausalLM(DyadConfig.from_preset(preset, **{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.to(dtype).eval()


@pytest.fixture(params=list(VARIANTS))
def variant(request) -> dict:
    """Each alignment, feature, early rule and transport space appears in one of these."""
    return VARIANTS[request.param]


def random_ids(batch: int, time: int, seed: int = 0, vocabulary: int = 259) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, time), generator=torch.Generator().manual_seed(seed))
