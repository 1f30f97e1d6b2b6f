"""Named sizes. Only what defines a size stands here; `DyadConfig` derives the rest."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # About 1M parameters, bytes: minutes on a laptop's CPU.
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 256},
    # About 10M parameters.
    "small": {"hidden_size": 288, "num_hidden_layers": 7, "max_position_embeddings": 1024},
    # About 120M parameters.
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "max_position_embeddings": 2048},
}
