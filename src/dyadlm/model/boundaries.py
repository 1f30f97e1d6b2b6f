"""Where the segments of semantic levels begin: rules on the text of a token and of the one before it.

A token's text is read once into a table of marks, so that any tokenizer will do; for bytes the table needs no tokenizer.
What begins at t depends on tokens up to t alone.

Dimension letters: B batch, T time, V vocabulary, S semantic levels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dyadlm.ops.pyramid import Clock

RULES = ("syllable", "word", "sentence", "line", "paragraph")
LEARNED = "learned"
SEMANTIC_LEVELS = (*RULES, LEARNED)
BOUNDARY_COST = 0.03

# Marks of a token, as bits.
ENDS = 1  # the next token begins a segment
STARTS = 2  # the token begins one
STICKS = 4  # the token begins none, though the one before ended one: delimiters stay together
HEAD, TAIL = 8, 16  # a token with HEAD after one with TAIL ends a segment too: a newline after a newline


def token_marks(rule: str, text: str) -> int:
    """The marks of a token with this text under one rule."""
    if not text:
        return 0
    first, last = text[0], text[-1]
    if rule == "syllable":
        return ENDS * (last.lower() in "aeiouy" or not last.isalpha())
    if rule == "word":
        ends, sticks = not last.isalnum(), all(not c.isalnum() for c in text)
        return ENDS * ends | STARTS * (not sticks and not first.isalnum() and first != "'") | STICKS * sticks
    if rule == "sentence":
        return ENDS * (text.rstrip("\"')] ")[-1:] in (".", "!", "?", ":", ";") or "\n\n" in text)
    if rule == "line":
        return ENDS * (last == "\n") | STICKS * (not text.strip("\n"))
    assert rule == "paragraph"
    ends = text.endswith("\n\n")
    return ENDS * ends | STICKS * (not text.strip("\n")) | HEAD * (text == "\n") | TAIL * (last == "\n")


def marks_of(texts: Sequence[str], rules: Sequence[str]) -> Tensor:
    """The marks of a vocabulary: (V, S) uint8."""
    marks = [[token_marks(rule, text) for rule in rules] for text in texts]
    return torch.tensor(marks, dtype=torch.uint8).view(len(texts), len(rules))


def byte_texts(vocab_size: int) -> list[str]:
    """The texts of the byte tokenizer's ids; bytes beyond ASCII are letters of some script, specials have no text."""
    return [chr(byte) if byte < 128 else "é" for byte in range(256)] + [""] * (vocab_size - 256)


class TextState(NamedTuple):
    """What is carried of the text itself, for all blocks: each part a tuple of tensors, empty where not needed."""

    marks: tuple[Tensor, ...] = ()  # of the last token: marks (B, S) uint8, and whether it ended a segment (B, S) bool
    count: tuple[Tensor, ...] = ()  # SegmentCount of the levels
    contexts: tuple[Tensor, ...] = ()  # ContextState of the slots


class Boundaries(nn.Module):
    """The rules over a vocabulary: S of them, those of the levels first."""

    marks: Tensor

    def __init__(self, rules: Sequence[str], vocab_size: int, is_bytes: bool):
        super().__init__()
        self.rules = list(rules)
        texts = byte_texts(vocab_size) if is_bytes else [""] * vocab_size
        self.register_buffer("marks", marks_of(texts, self.rules))

    def read(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the texts of a tokenizer's tokens."""
        size = self.marks.shape[0]
        special = set(tokenizer.all_special_ids)
        texts = [
            "" if token in special or token >= len(tokenizer) else tokenizer.decode([token]) for token in range(size)
        ]
        self.marks.copy_(marks_of(texts, self.rules))

    def forward(self, ids: Tensor, clock: Clock, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids (B, T) int64 → where segments begin (B, T, S) bool, and the state after the chunk."""
        marks = self.marks[ids]
        nothing = marks.new_zeros(marks.shape[0], marks.shape[2])
        mark_before, ended_before = state or (nothing, nothing.bool())
        before = torch.cat([mark_before[:, None], marks[:, :-1]], 1)
        twice = (marks & HEAD > 0) & (before & TAIL > 0) & (clock.index > 0)[..., None]
        ended = (marks & ENDS > 0) | twice
        after = torch.cat([ended_before[:, None], ended[:, :-1]], 1)
        begins = (marks & STARTS > 0) | (after & (marks & STICKS == 0)) | (clock.index == 0)[..., None]
        last = (clock.length - 1)[:, None, None]
        carried = []
        for new, old in ((marks, mark_before), (ended, ended_before)):
            final = new.gather(1, last.clamp(min=0).expand(-1, 1, new.shape[2])).squeeze(1)
            carried.append(torch.where(last[:, 0] >= 0, final, old))
        return begins, tuple(carried)


class BoundaryRouter(nn.Module):
    """A learned boundary: a segment begins where a token's state is unlike the one before (arXiv 2507.07955).

    The chance is (1 - cosine of query_t and key_{t-1}) / 2 and the choice hard. What is made of it is multiplied by how
    sure it was, straight through; a cost keeps the share of beginnings near a rate.
    """

    def __init__(self, width: int, rank: int, rate: float):
        super().__init__()
        self.query = nn.Linear(width, rank, bias=False)
        self.key = nn.Linear(width, rank, bias=False)
        self.rate = rate

    def forward(self, x: Tensor, clock: Clock, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, D), key (B, R) of the token before → begins (B, T) bool, sureness (B, T), cost, the last key."""
        query, keys = self.query(x), self.key(x)
        if key is None:
            key = keys.new_zeros(keys.shape[0], keys.shape[2])
        before = torch.cat([key[:, None], keys[:, :-1]], 1)
        chance = (1 - nn.functional.cosine_similarity(query, before, dim=-1)) / 2
        first = clock.index == 0
        begins = (chance > 0.5) | first
        sure = torch.where(begins, chance, 1 - chance).masked_fill(first, 1.0)
        real = torch.arange(x.shape[1], device=x.device) < clock.length[:, None]
        counted = real.sum().clamp(min=1)
        chosen, likely = (begins & real).sum() / counted, (chance * real).sum() / counted
        span = 1 / self.rate  # the cost of H-Net, 1 where the share of beginnings is 1 / span
        cost = span / (span - 1) * ((span - 1) * chosen * likely + (1 - chosen) * (1 - likely))
        last = (clock.length - 1)[:, None]
        final = keys.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, keys.shape[2])).squeeze(1)
        return begins, sure, BOUNDARY_COST * cost, torch.where(last >= 0, final, key)
