"""What a model will cost, from its configuration alone. Tests assert each figure equal to the real model's.

Dimension letters: T time, V vocabulary, D width, L layers, K levels, R rank, F parts of a level's feature.
"""

from dyadlm.model.configuration import DyadConfig
from dyadlm.ops.pyramid import HISTORY, granularity


def parameters(config: DyadConfig) -> int:
    """Trainable numbers, tied weights counted once."""
    width = config.hidden_size
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return embeddings + width + config.num_hidden_layers * _block_parameters(config)


def _block_parameters(config: DyadConfig) -> int:
    width = config.hidden_size
    norms_and_identity = 4 * width
    levels = (1 + len(config.feature_parts)) * sum(config.ranks) * width
    gate = width * (width + 2 * sum(alignment != "sliding" for alignment in config.alignments))
    return norms_and_identity + levels + gate + 3 * width * (config.intermediate_size or 0)


def training_flops_per_token(config: DyadConfig, sequence_length: int) -> float:
    """Floating-point operations of the matrix products of one training step, forward and backward, per token.

    A multiplication and an addition count as two. The pyramid's additions, T log T in number, are not products and are
    not counted; they are a few hundredths of it.
    """
    return 3 * forward_flops(config, sequence_length) / sequence_length


def forward_flops(config: DyadConfig, sequence_length: int) -> int:
    """Floating-point operations of the matrix products over one sequence from a fresh start."""
    time, width, parts = sequence_length, config.hidden_size, len(config.feature_parts)
    in_model_space = config.transport_space == "model"
    products = 0
    for level, (alignment, rank) in enumerate(zip(config.alignments, config.ranks, strict=True)):
        windows = {"sliding": 1, "prefix": 2}.get(alignment, 0) * time  # both windows of a prefix level are projected
        rows = time
        if alignment in ("block", "dual"):
            rows = time // 2 ** granularity(level, alignment) + 1
            windows = rows + (2 if alignment == "dual" else 1)
        products += (parts * rows if in_model_space else windows) * rank + rows * parts * rank
    aged = 2 * sum(alignment != "sliding" for alignment in config.alignments)
    block = products * width + time * width * (width + aged + 3 * (config.intermediate_size or 0))
    return 2 * (config.num_hidden_layers * block + time * width * config.vocab_size)


def state_bytes(config: DyadConfig, bytes_per_number: int = 4) -> int:
    """Bytes of the streaming state of one row: constant in the number of tokens seen."""
    numbers = 0
    sliding = [k for k, alignment in enumerate(config.alignments) if alignment == "sliding"]
    for j in range(max(sliding, default=-1) + 1):
        shared = config.transport_space == "model"
        numbers += 2**j * (config.hidden_size if shared else sum(config.ranks[k] for k in sliding if k >= j))
    deep = [
        k if alignment == "prefix" else granularity(k, alignment)
        for k, alignment in enumerate(config.alignments)
        if alignment != "sliding"
    ]
    numbers += (max(deep, default=-1) + 1) * HISTORY * config.hidden_size
    return config.num_hidden_layers * numbers * bytes_per_number + 8  # and the position, one int64
