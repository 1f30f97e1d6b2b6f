"""What followed each of the last few tokens before, in tables of fixed size, and how far it is believed.

For each length n a table holds, for contexts of the last n tokens, the likeliest followers with their counts. From the
shortest length to the longest, the distribution q of a context that was seen before is mixed into the prediction:

    p ← (1 - w) p + w q        w = sigmoid(one number for the length, how often it was seen, and how many followed)

These numbers are learned while reading. A token is predicted before anything is learned of it, so that nothing leaks,
and the mixture of distributions is a distribution. It is a bounded form of prediction by partial matching (Cleary and
Witten 1984) with learned escapes, around any model (compare the neural cache, Grave et al. 2017, arXiv 1612.04426).

Dimension letters: T tokens, V vocabulary, L lengths, S sets, W ways, F followers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from dyadlm.errors import UserError
from dyadlm.memory import kernel

Array: TypeAlias = np.ndarray
MOST_BYTES = 2**32
# Vocabularies up to this size are of bytes or characters: a word takes several tokens.
SMALL_VOCABULARY = 512
SCOPES = ("stream", "document")


@dataclass(frozen=True)
class MemoryOptions:
    """lengths: of the contexts, in tokens, ascending. entries: of each table, a power of two. ways: of each set.

    followers: kept of each context. fade: what is left of the counts of a context's other followers when one comes.
    rate: of learning how far each context is believed; 0: nothing is learned. scope: `stream`: what is remembered lives
    on from document to document; `document`: a document begins with an empty memory.
    """

    lengths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    entries: int = 16_384
    ways: int = 4
    followers: int = 4
    fade: float = 0.9
    rate: float = 0.2
    scope: str = "stream"

    def __post_init__(self) -> None:
        ascending = list(self.lengths) == sorted({length for length in self.lengths if length >= 1})
        for holds, what in (
            (ascending and 1 <= len(self.lengths) <= 16 and self.lengths[-1] <= 64, "lengths ascend from 1 to 64"),
            (self.entries >= 1 and self.entries.bit_count() == 1, "entries are a power of two"),
            (self.entries >= self.ways, f"there are at least as many entries as ways ({self.ways})"),
            (self.ways >= 1 and self.ways.bit_count() == 1, "ways are a power of two"),
            (1 <= self.followers <= MOST_FOLLOWERS, f"followers lie between 1 and {MOST_FOLLOWERS}"),
            (0 < self.fade <= 1, "fade lies above 0 and at most at 1"),
            (0 <= self.rate <= 10, "rate lies between 0 and 10"),
            (self.scope in SCOPES, f"its scope is one of {', '.join(SCOPES)}"),
            (self._table_bytes() <= MOST_BYTES, f"it would take more than {MOST_BYTES >> 30} GiB; give fewer entries"),
        ):
            if not holds:
                raise UserError(f"There is no memory of this kind: {what}.")

    def _table_bytes(self) -> int:
        """Of tags, worth, followers and counts."""
        return len(self.lengths) * self.entries * (8 + 4 + 8 * self.followers)

    @classmethod
    def of_vocabulary(cls, size: int, entries: int | None = None, scope: str | None = None) -> "MemoryOptions":
        """For a model with so many tokens: of pieces of words fewer make a context. None: the default."""
        chosen = {"entries": entries, "scope": scope}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return cls(**given) if size <= SMALL_VOCABULARY else cls(lengths=(1, 2, 3, 4, 5), **given)


class ContextMemory:
    """Tables that remember, and the mixture that uses them. Its size never changes."""

    def __init__(self, options: MemoryOptions | None = None):
        self.options = o = options or MemoryOptions()
        levels, sets = len(o.lengths), o.entries // o.ways
        self._lengths = np.array(o.lengths, np.int64)
        self._bits = np.uint64(sets.bit_length() - 1)
        self._found = np.empty((levels, 2), np.int64)
        bands = (levels, len(kernel.BANDS) + 1, o.followers)
        self._state: dict[str, Array] = {
            "history": np.full(o.lengths[-1], -1, np.int64),
            "tags": np.zeros((levels, sets, o.ways), np.uint64),
            "followers": np.full((levels, sets, o.ways, o.followers), -1, np.int32),
            "counts": np.zeros((levels, sets, o.ways, o.followers), np.float32),
            "worth": np.zeros((levels, sets, o.ways), np.float32),
            "mixer": np.tile(FIRST_BELIEF[None, :, : o.followers], (levels, 1, 1)),
            "slopes": np.full(bands, FIRST_SLOPE),
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(array.nbytes for array in self._state.values())

    def read(self, tokens: Array, nats: Array) -> Array:
        """Read tokens int64 (T,) that a model gave nats (T,) to, NaN where it predicted nothing; returns those of the
        mixture, float32 (T,). Raises ValueError for other shapes."""
        s, o = self._state, self.options
        if np.ndim(tokens) != 1 or np.shape(tokens) != np.shape(nats):
            raise ValueError(f"A memory reads tokens (T,) and nats (T,), not {np.shape(tokens)} and {np.shape(nats)}.")
        mixed = np.empty(len(tokens))
        with np.errstate(over="ignore"):  # the tags are numbers modulo 2^64
            kernel.read(
                np.asarray(tokens, np.int64), np.asarray(nats, np.float64), mixed, s["history"], self._lengths,
                s["tags"], s["followers"], s["counts"], s["worth"], s["mixer"], s["slopes"], self._bits,
                o.fade, o.rate, self._found,
            )  # fmt: skip
        return mixed.astype(np.float32)

    def mix(self, logits: Array) -> Array:
        """Logits (V,) of a model for the next token → log-probabilities of the mixture, float32 (V,)."""
        s = self._state
        shifted = np.asarray(logits, np.float64) - float(np.max(logits))
        probabilities = np.exp(shifted)
        probabilities /= probabilities.sum()
        with np.errstate(over="ignore"):
            kernel.mix(
                probabilities, s["history"], self._lengths, s["tags"], s["followers"], s["counts"], s["mixer"],
                self._bits, self._found,
            )  # fmt: skip
        with np.errstate(divide="ignore"):  # what has no chance stays without
            return np.log(probabilities).astype(np.float32)

    def start_document(self) -> None:
        """No context reaches back over this place. What was remembered and learned stays, if the scope is `stream`."""
        if self.options.scope == "document":
            self._state = ContextMemory(self.options)._state
        self._state["history"][:] = -1

    def copy(self) -> "ContextMemory":
        """Another memory that stands where this one does."""
        other = ContextMemory.__new__(ContextMemory)
        other.__dict__.update(self.__dict__)
        other._found = self._found.copy()
        other._state = {name: array.copy() for name, array in self._state.items()}
        return other

    def tensors(self) -> dict[str, Array]:
        """All tables by name. Arrays are copies."""
        return {name: array.copy() for name, array in self._state.items()}

    def to_dict(self) -> dict[str, Any]:
        """The options, as JSON can hold them."""
        return asdict(self.options)

    @classmethod
    def from_tensors(cls, options: Mapping[str, Any], tensors: Mapping[str, Array]) -> "ContextMemory":
        """What `to_dict` and `tensors` gave. Raises `UserError` where they are damaged or do not fit each other."""
        try:
            told = MemoryOptions(**{**options, "lengths": tuple(options["lengths"])})
            shape = (len(told.lengths), told.entries // told.ways, told.ways, told.followers)
            if tensors["counts"].shape != shape:  # before tables of that size are made
                raise ValueError(f"counts are {tensors['counts'].shape}, not {shape}")
            memory = cls(told)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"The memory in this state is damaged ({error}); write a new state.") from error
        for name, wanted in memory._state.items():
            found = tensors.get(name)
            if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise UserError(f"The memory in this state is damaged ({name}); write a new state.")
            finite = found.dtype.kind != "f" or bool(np.isfinite(found).all())
            if not finite or (name in ("counts", "worth", "slopes") and (found < 0).any()):
                raise UserError(f"The memory in this state holds values that are no counts ({name}); write a new one.")
            wanted[...] = found
        s = memory._state
        seen = (s["followers"] >= 0).any(-1)
        if ((s["counts"] > 0) != (s["followers"] >= 0)).any() or (seen != (s["tags"] != 0)).any():
            raise UserError("The memory in this state counts followers that it does not name; write a new state.")
        if (s["slopes"] < FIRST_SLOPE).any() or (np.abs(s["mixer"]) > kernel.MOST_BELIEF).any():
            raise UserError("The memory in this state believes too much; it is damaged, write a new one.")
        return memory


def _first_belief() -> Array:
    """How far a context is believed before anything is learned (N, D), as sigmoids of it: more, the more often it was
    seen with one follower alone; little where it had several. As learned on Hamlet, around a model that was not trained
    on it."""
    beliefs = np.full((len(kernel.BANDS) + 1, MOST_FOLLOWERS), -3.0)
    beliefs[:, 0] = [-3.0, -2.3, -1.3, -0.8, -0.1, 0.2, 0.2]
    return beliefs


MOST_FOLLOWERS = 64
FIRST_BELIEF = _first_belief()
# The first steps of learning are not longer than the rate.
FIRST_SLOPE = 1e-2


def nats_under(logits: Array | None, token: int) -> float:
    """Nats of a token under logits (V,) or log-probabilities; NaN where there are none."""
    if logits is None:
        return math.nan
    top = float(np.max(logits))
    return float(np.log(np.exp(np.asarray(logits, np.float64) - top).sum()) + top - float(logits[token]))
