"""What the engine can run: the shape of a model, read off the fields of its configuration.

Dimension letters: D width, L layers, K geometric levels, S semantic levels, R rank, N tables of slots, W ways,
M numbers that a slot keeps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dyadlm.errors import UserError

BYTE_VOCABULARY = 259
# What the scratch memory of the compiled step has room for.
MOST_LEVELS, MOST_SEMANTIC, MOST_CONTEXTS, MOST_TAG_PARTS = 24, 8, 32, 2
# Marks of tokens, as in `dyadlm.model.boundaries`.
ENDS, STARTS, STICKS, HEAD, TAIL = 1, 2, 4, 8, 16
# Of the hash of contexts, as in `dyadlm.ops.contexts`.
PHI = np.uint64(0x9E3779B97F4A7C15)
SEED_0, SEED_1 = np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344)
MIX_0, MIX_1 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
LARGEST_HALF = 65_504.0  # of float16, as in `dyadlm.ops.slots`
SLIDING_WIDTH = 8  # `hybrid` is sliding up to here, dual beyond

# What has to stand in the configuration, what it is where nothing is said, and what it is called if it is another.
REQUIRED: tuple[tuple[str, Any, Any, str], ...] = (
    ("level_feature", "product+pair", "product+pair", "its level_feature is not product+pair"),
    ("transport_space", "level", "level", "its transport_space is not level"),
    ("tower", "layer", "layer", "its levels are read once from the input"),
    ("semantic_memory", 1, 1, "its semantic levels show two segments"),
    ("salience", True, False, "its tokens all count alike (salience)"),
    ("forgetting", False, False, "its segments forget"),
    ("selector", "none", "none", "it has a selector"),
    ("decision_slots", False, False, "it has decision slots"),
    ("planner", "none", "none", "it has a planner"),
    ("early", "zero", "zero", "its early windows are not zero"),
    ("slot_gate", False, False, "its slots have a gate"),
    ("mixers", [], [], "it has mixers beside its levels"),
)


@dataclass(frozen=True)
class Shape:
    """The sizes that a step needs. Levels are the sliding ones, then the dual ones, then the semantic ones."""

    width: int
    layers: int
    inner: int
    vocabulary: int
    eps: float
    sliding: int
    levels: int
    rules: tuple[str, ...]  # of the semantic levels, then what slots and n-grams alone need
    semantic: int
    rank: int
    contexts: tuple[int, ...]  # numbers of tokens; 0 is the open word
    slot_layers: tuple[int, ...]
    sets: int
    ways: int
    slot_width: int
    slot_values: str  # float32 or float16
    lru: bool  # a context has one entry, which comes to the front when it is written again
    keeps_slots: bool  # tables live on from document to document
    tied: bool
    ngrams: tuple[int, ...]  # numbers of tokens; 0 is the open word
    ngram_entries: int
    ngram_width: int

    @property
    def dual(self) -> int:
        """Number of dual levels."""
        return self.levels - self.sliding

    @property
    def depth(self) -> int:
        """Levels of the block tree."""
        return self.levels - 1 if self.dual else 0

    @property
    def token_levels(self) -> int:
        """Levels that change at every token."""
        return self.sliding + self.semantic

    @property
    def longest(self) -> int:
        """Tokens after which a segment is cut."""
        return int(2 ** (self.levels + self.semantic))

    @cached_property
    def fits(self) -> int:
        """Whole tokens that fit into one part of a tag."""
        count = 1
        while max(self.vocabulary, 2) ** (count + 1) <= 2**63:
            count += 1
        return count

    @cached_property
    def tag_parts(self) -> int:
        """Parts of a tag, 64 bits each."""
        return max((2 if c == 0 else -(-c // self.fits) for c in self.contexts), default=1)

    @cached_property
    def history(self) -> int:
        """Tokens before the newest that contexts and n-grams need."""
        return max((c for c in (*self.contexts, *self.ngrams) if c), default=1) - 1

    @cached_property
    def remembers(self) -> bool:
        """Whether the last tokens and the open word are kept."""
        return bool(self.contexts or self.ngrams)

    @cached_property
    def needs_word(self) -> bool:
        """Whether the hash of the open word is kept."""
        return 0 in self.contexts or 0 in self.ngrams


def unsupported(fields: Mapping[str, Any]) -> str | None:
    """Why the engine cannot run a model with these fields, as the end of a sentence; None if it can.

    Raises:
        UserError: fields that no model can have, as in a damaged config.json.
    """
    try:
        return _unsupported(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"The configuration of the model is damaged ({type(error).__name__}: {error}).") from error


def _unsupported(fields: Mapping[str, Any]) -> str | None:
    for name, wanted, default, reason in REQUIRED:
        if fields.get(name, default) != wanted:
            return reason
    alignments = _alignments(fields)
    sliding = sum(alignment == "sliding" for alignment in alignments)
    if alignments != ["sliding"] * sliding + ["dual"] * (len(alignments) - sliding) or not sliding:
        return "its levels are not sliding and then dual"
    rank = fields.get("level_rank")
    if isinstance(rank, list) and len(set(rank)) > 1:
        return "its levels have several ranks"
    if "learned" in (fields.get("semantic_levels") or ()):
        return "it has a learned boundary"
    if "code" in (fields.get("slot_contexts") or ()):
        return "its slots are addressed by a learned code"
    shape = shape_of(fields)
    if shape.tag_parts > MOST_TAG_PARTS:
        return "its slot contexts are too long"
    if shape.semantic > MOST_SEMANTIC or len(shape.contexts) > MOST_CONTEXTS or shape.levels > MOST_LEVELS:
        return "it has more levels or slot contexts than the engine holds"
    return None


def shape_of(fields: Mapping[str, Any]) -> Shape:
    """The shape of a supported model.

    Raises:
        UserError: fields that no model can have, as in a damaged config.json.
    """
    try:
        shape = _read_shape(fields)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"The configuration of the model is damaged ({type(error).__name__}: {error}).") from error
    sizes = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "num_levels": shape.levels,
        "level_rank": shape.rank,
        "slot_entries": shape.sets,
        "slot_ways": shape.ways,
        "slot_width": shape.slot_width,
        "ngram_entries": shape.ngram_entries,
        "ngram_width": shape.ngram_width,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
            raise UserError(f"The configuration of the model is damaged: {name} is {fields.get(name)!r}.")
    for name, holds in {
        "slot_entries": shape.sets & (shape.sets - 1) == 0
        and shape.sets * shape.ways == fields.get("slot_entries", 1024),
        "slot_layers": set(shape.slot_layers) <= set(range(shape.layers))
        and len(set(shape.slot_layers)) == len(shape.slot_layers),
        "slot_evict": fields.get("slot_evict", "ring") in ("ring", "lru"),
        "slot_values": shape.slot_values in ("float32", "float16"),
        "slot_contexts": all(0 <= context < 2**16 for context in shape.contexts),
        "ngram_sizes": all(0 <= size < 2**16 for size in shape.ngrams),
        "semantic_levels": all(isinstance(rule, str) for rule in shape.rules),
        "rms_norm_eps": isinstance(shape.eps, float | int) and math.isfinite(shape.eps) and shape.eps >= 0,
        "tie_word_embeddings": isinstance(fields.get("tie_word_embeddings", True), bool),
    }.items():
        if not holds:
            raise UserError(f"The configuration of the model is damaged: {name} is {fields.get(name)!r}.")
    return shape


def _read_shape(fields: Mapping[str, Any]) -> Shape:
    alignments, rank = _alignments(fields), fields["level_rank"]
    semantic = tuple(fields.get("semantic_levels") or ())
    contexts = tuple(fields.get("slot_contexts") or ())
    ngrams = tuple(fields.get("ngram_sizes") or ())
    rules = semantic + (("word",) if "word" in (*contexts, *ngrams) and "word" not in semantic else ())
    ways = fields.get("slot_ways", 8)
    return Shape(
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        inner=fields["intermediate_size"],
        vocabulary=fields["vocab_size"],
        eps=fields.get("rms_norm_eps", 1e-6),
        sliding=sum(alignment == "sliding" for alignment in alignments),
        levels=len(alignments),
        rules=rules,
        semantic=len(semantic),
        rank=rank[0] if isinstance(rank, list) else rank,
        contexts=_sizes(contexts),
        slot_layers=tuple(fields.get("slot_layers") or ()) if contexts else (),
        sets=fields.get("slot_entries", 1024) // ways,
        ways=ways,
        slot_width=fields.get("slot_width", 16),
        slot_values=fields.get("slot_values", "float32"),
        lru=fields.get("slot_evict", "ring") == "lru",
        keeps_slots=fields.get("slot_scope", "document") == "stream",
        tied=bool(fields.get("tie_word_embeddings", True)),
        ngrams=_sizes(ngrams),
        ngram_entries=fields.get("ngram_entries", 16_384),
        ngram_width=fields.get("ngram_width", 24),
    )


def _sizes(contexts: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(0 if context == "word" else _positive(context) for context in contexts)


def _positive(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{number!r} is no number of tokens")
    return number


def _alignments(fields: Mapping[str, Any]) -> list[str]:
    levels, alignment = fields.get("num_levels"), fields.get("level_alignment", "hybrid")
    if not isinstance(levels, int) or not 1 <= levels < 64:
        raise UserError(f"The configuration of the model is damaged: num_levels is {levels!r}.")
    if alignment == "hybrid":
        return ["sliding" if 2**k <= SLIDING_WIDTH else "dual" for k in range(levels)]
    return [alignment] * levels if isinstance(alignment, str) else list(alignment)


def log2_longest(shape: Shape) -> float:
    """By what the logarithm of a segment's length is divided."""
    return math.log2(shape.longest)
