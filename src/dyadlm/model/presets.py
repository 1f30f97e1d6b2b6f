"""Named models. Only what defines one stands here; `DyadConfig` derives the rest."""

from typing import Any

# What has been measured to help (docs/experiments.md): meaning beside geometry, tokens that count by their salience,
# and slots that recall. A vocabulary other than bytes needs the text of its tokens (`use_tokenizer`), which training
# provides.
COMPOSITION: dict[str, Any] = {
    "semantic_levels": ["syllable", "word", "sentence", "line"],
    "salience": True,
    "slot_contexts": [2, 3, 4, 6, 8, "word"],
}

PRESETS: dict[str, dict[str, Any]] = {
    # About 1M parameters, bytes: minutes on a laptop's CPU. Far geometric levels add nothing at 256 tokens.
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "max_position_embeddings": 256,
        "num_levels": 4,
        "level_rank": 22,
        **COMPOSITION,
    },
    # The system that the paper describes, in about the parameters of `tiny` (docs/paper.md). What exists while training
    # alone, the twin, the fingerprints and the teacher, is in `dyadlm.train.defaults.PRESET_DEFAULTS`.
    "paper": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "max_position_embeddings": 256,
        "intermediate_size": 256,
        "level_rank": 12,
        "level_feature": "transport+centroid",
        "early": "mask",
        "semantic_levels": ["syllable", "word"],
        "selector": "topk",
        "selector_heads": 16,
        "selector_margin": 0.5,
        "decision_slots": True,
        "slot_contexts": COMPOSITION["slot_contexts"],
        "planner": "stack",
        "planner_width": 16,
        "planner_futures": 4,
        "pool": "learned",
        "consensus": 0.9,
    },
    # About 11.6M parameters. Far geometric levels stay, here and below: at 1,024 tokens they have not been measured.
    "small": {"hidden_size": 288, "num_hidden_layers": 7, "max_position_embeddings": 1024, **COMPOSITION},
    # About 120M parameters.
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "max_position_embeddings": 2048,
        "level_rank": 100,
        **COMPOSITION,
    },
    # About 350M parameters. Here and below a level's rank is an eighth of the width, so that the levels of a block have
    # about as many parameters as its SwiGLU, as in `base`. Neither size has been trained yet.
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "max_position_embeddings": 2048,
        "level_rank": 128,
        **COMPOSITION,
    },
    # About 1.3B parameters.
    "xl": {
        "hidden_size": 2048,
        "num_hidden_layers": 19,
        "max_position_embeddings": 2048,
        "level_rank": 256,
        **COMPOSITION,
    },
}
"""The fields of the configuration, for each preset; `DyadConfig.from_preset` takes them."""
