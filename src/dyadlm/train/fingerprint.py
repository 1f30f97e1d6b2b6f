"""Fingerprints: where each token stands in the corpus, and in what, shown in training at times and never after.

Dimension letters: B batch, T time, N tokens that show their fingerprint, D width.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dyadlm.data.batches import ChangedWindows
from dyadlm.model import DyadConfig
from dyadlm.model.extension import AuxiliaryModule, TrainingPass
from dyadlm.train.options import FingerprintOptions

# Bits of the digits of a number, the lowest first; 64 in all, so that all numbers of 64 bits have digits of their own.
# The low digits of an index are wide, for they tell neighbours apart; only a large corpus uses the high ones.
INDEX_BITS = (10, 9, 9, 8, 8, 7, 7, 6)
# Codes of tags are hashes, which use all digits alike.
TAG_BITS = (8,) * 8
TAGS = ("document", "section", "kind")
# Size of a fresh fingerprint beside that of a token's embedding.
INITIAL_SIZE = 0.1
# Told apart by it from whatever else draws from (seed, number).
DRAWS = int.from_bytes(b"shown")


def digits(numbers: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
    """The digits of numbers in the mixed radix 2^bits[0], 2^bits[1], …, the lowest first, each int64 (...).

    numbers: int64 (...), or uint64: a bijection from all their values onto the digits, if the bits are 64 in all.
    """
    numbers = numbers.view(torch.int64)  # a negative number is the unsigned one of the same bits
    found, shift = [], 0
    for width in bits:
        found.append((numbers >> shift) & ((1 << width) - 1))
        shift += width
    return found


class DigitEmbedding(nn.Module):
    """A vector for every number of 64 bits: each digit has a table of its own, and their entries add up."""

    def __init__(self, bits: tuple[int, ...], width: int):
        super().__init__()
        self.bits = bits
        self.tables = nn.ModuleList(nn.Embedding(1 << digit, width) for digit in bits)

    def forward(self, numbers: Tensor) -> Tensor:
        """numbers (N,) int64 → (N, D)."""
        first, *rest = (table(digit) for table, digit in zip(self.tables, digits(numbers, self.bits), strict=True))
        vectors: Tensor = first
        for vector in rest:
            vectors = vectors + vector
        return vectors


class Fingerprint(AuxiliaryModule):
    """Embeds the global index of the tokens, and beside it their document, section and kind.

    It reads, of what the collator sends: `index` (B, T) int64; with tags, `tags` (B, T, 3) int64; and `shown` (B, T)
    bool, without which all tokens show theirs. Without `index` nothing is added, and it is never predicted.

    What is shown is not scaled up by how rarely it is: that is done so that a layer expects, without dropout, what it
    met on average with it. Here the model is used with nothing shown, which is just what it met most of the time.
    """

    def __init__(self, config: DyadConfig, tags: bool):
        """config: of the model. tags: whether document, section and kind are embedded beside the index."""
        super().__init__()
        self.index = DigitEmbedding(INDEX_BITS, config.hidden_size)
        self.tags = nn.ModuleList(DigitEmbedding(TAG_BITS, config.hidden_size) for _ in TAGS if tags)
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        for table in tables:
            nn.init.normal_(table.weight, std=INITIAL_SIZE * config.initializer_range / len(tables) ** 0.5)

    def embed(self, extra: dict[str, Tensor]) -> Tensor | None:
        """(B, T, D): the fingerprints of the tokens that show theirs, and exactly 0 for the others."""
        if "index" not in extra:
            return None
        shown = _shown(extra)
        # Only what is shown is computed; tables are part of the graph even if nothing is, as DDP expects.
        vectors = self.index(extra["index"][shown])
        if self.tags:
            for embed, codes in zip(self.tags, extra["tags"][shown].unbind(-1), strict=True):
                vectors = vectors + embed(codes)
        added: Tensor = vectors.new_zeros(*shown.shape, vectors.shape[-1])
        added[shown] = vectors
        return added

    def losses(self, lesson: TrainingPass) -> dict[str, Tensor]:
        """`fingerprint_shown`: the share of tokens that showed theirs."""
        return {"fingerprint_shown": _shown(lesson.extra).float().mean()} if "index" in lesson.extra else {}


def _shown(extra: dict[str, Tensor]) -> Tensor:
    return extra.get("shown", torch.ones_like(extra["index"], dtype=torch.bool))


class FingerprintedWindows(ChangedWindows):
    """The windows of `base` with `shown` (T,) bool: which of their tokens show their fingerprints.

    The draw for a window depends on (seed, number) alone: it is no matter of the model's dropout, of processes, of how
    a step is cut, or of where a run was resumed. The last part of the windows, the cooldown, shows none.
    """

    def __init__(self, base: Dataset[dict[str, Tensor]], options: FingerprintOptions, seed: int):
        super().__init__(base)
        self.options = options
        self.seed = seed
        self._warm = round(len(self) * (1 - options.cooldown))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        item = self.base[number]
        random = np.random.default_rng([DRAWS, self.seed, number])
        sequence = number < self._warm and random.random() >= self.options.dropout
        tokens = random.random(len(item["input_ids"])) >= self.options.token_dropout
        return item | {"shown": torch.from_numpy(tokens & sequence)}
