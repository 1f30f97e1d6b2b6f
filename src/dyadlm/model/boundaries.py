"""Where the segments of semantic levels begin: rules on the text of a token and of those before it.

A token's text is read once into a table of marks, so that any tokenizer will do; bytes need none. Delimiters belong to
the segment that they end. What begins at t depends on tokens up to t alone.

Dimension letters: B batch, T time, V vocabulary, S semantic levels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dyadlm.errors import UserError
from dyadlm.ops.pyramid import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = ("syllable", "word", "sentence", "line", "paragraph")
LEARNED = "learned"
SEMANTIC_LEVELS = (*RULES, LEARNED)

# Marks of a token, as bits.
ENDS = 1  # the next token begins a segment
STARTS = 2  # the token begins one
STICKS = 4  # the token begins none: delimiters stay together, and what they ended is ended by the last of them
HEAD, TAIL = 8, 16  # HEAD after TAIL ends a segment too: a newline after a newline, blanks between them or not

APOSTROPHES = "'’"
STOPS = ".!?:;…。！？"
CLOSERS = "\"'’”)]} \t\r\n"  # what may stand between a stop and the next sentence


def token_marks(rule: str, text: str) -> int:
    """The marks of a token with this text under one rule."""
    if not text:
        return 0
    first, last = text[0], text[-1]
    if rule == "syllable":
        ends, letters = last.lower() in "aeiouy" or not last.isalpha(), any(map(str.isalpha, text))
        return ENDS * ends | STARTS * (letters and not first.isalpha())
    if rule == "word":
        ends, sticks = not _in_word(last), not any(map(_in_word, text))
        return ENDS * ends | STICKS * sticks | STARTS * (not sticks and not _in_word(first))
    newlines = text[len(text.rstrip()) :].count("\n")
    blank = text.isspace()
    before = 0 if blank else text[: len(text) - len(text.lstrip())].count("\n")  # in the token itself
    if rule == "line":
        return ENDS * (newlines > 0) | STICKS * (not text.strip("\r\n")) | STARTS * (before > 0)
    gap = STARTS * (before > 1) | ENDS * (newlines > 1) | HEAD * (blank and newlines > 0) | TAIL * (newlines > 0)
    if rule == "sentence":
        return gap | ENDS * (text.rstrip(CLOSERS)[-1:] in tuple(STOPS)) | STICKS * (not text.strip(STOPS + CLOSERS))
    assert rule == "paragraph"
    return gap | STICKS * blank


def _in_word(character: str) -> bool:
    return character.isalnum() or character in APOSTROPHES


def mirrored(marks: Tensor) -> Tensor:
    """What marks become where the text is read backwards: a token that ended a segment begins one, and the reverse.

    Tokens that stick stay as they are: together, at the end of what comes before them in the order of reading.
    """
    swapped = marks & (HEAD | TAIL) | (marks & ENDS) * STARTS | (marks & STARTS) // STARTS * ENDS
    return torch.where(marks & STICKS > 0, marks, swapped)


def marks_of(texts: Sequence[str], rules: Sequence[str]) -> Tensor:
    """The marks of a vocabulary: (V, S) uint8."""
    marks = [[token_marks(rule, text) for rule in rules] for text in texts]
    return torch.tensor(marks, dtype=torch.uint8).view(len(texts), len(rules))


def byte_texts(vocab_size: int) -> list[str]:
    """The texts of the byte tokenizer's ids; bytes beyond ASCII are letters of some script, specials have no text."""
    return [chr(byte) if byte < 128 else "é" for byte in range(256)] + [""] * (vocab_size - 256)


def token_texts(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[str]:
    """The text of each of a tokenizer's ids as it stands after other text; special ones and ids beyond have none."""
    # Many tokenizers drop the space in front of the first token that they decode: it must not be the first.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def decoded(ids: list[int]) -> str:
        text: str | list[str] = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    before, special = decoded(anchor) if anchor else "", set(tokenizer.all_special_ids)
    texts = []
    for token in range(vocab_size):
        if token in special or token >= len(tokenizer):
            texts.append("")
            continue
        text = decoded([*anchor, token])
        text = text[len(before) :] if text.startswith(before) else decoded([token])
        texts.append(text.replace("\ufffd", "é"))  # part of a character: a letter of some script, as for bytes
    return texts


class TextState(NamedTuple):
    """What is carried of the text itself, for all blocks: each part a tuple of tensors, empty where not needed."""

    marks: tuple[Tensor, ...] = ()  # whether a TAIL stands last, and whether a segment has ended there: (B, S) bool
    counts: tuple[Tensor, ...] = ()  # SegmentCount of the levels
    contexts: tuple[Tensor, ...] = ()  # ContextState of the slots


class Boundaries(nn.Module):
    """The rules over a vocabulary: S of them, those of the levels first."""

    marks: Tensor

    def __init__(self, rules: Sequence[str], vocab_size: int, is_bytes: bool):
        super().__init__()
        self.rules = list(rules)
        texts = byte_texts(vocab_size) if is_bytes else [""] * vocab_size
        self.register_buffer("marks", marks_of(texts, self.rules))
        self.known = is_bytes  # whether the marks were made from the texts of tokens

    @torch.no_grad()
    def read(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take the texts of a tokenizer's tokens."""
        size = self.marks.shape[0]
        self.marks.copy_(marks_of(token_texts(tokenizer, size), self.rules))
        self.known = True

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Follow a vocabulary that grows or shrinks; what is new has no text."""
        self.marks = nn.functional.pad(self.marks, (0, 0, 0, vocab_size - self.marks.shape[0]))

    def forward(
        self, ids: Tensor, clock: Clock, state: tuple[Tensor, ...], backwards: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ids (B, T) int64 → where segments begin (B, T, S) bool, and the state after the chunk.

        backwards: the tokens are those of a text read from its end.

        Raises:
            UserError: the text of the tokens was not given (`use_tokenizer`).
        """
        if not self.known:
            if not bool(self.marks.any()):
                raise UserError(
                    f"The rules of {', '.join(self.rules)} need the text of each token, and this vocabulary is not of "
                    "bytes; call model.use_tokenizer(tokenizer) once before the first pass."
                )
            self.known = True
        marks = mirrored(self.marks[ids]) if backwards else self.marks[ids]
        continues = (clock.index > 0)[..., None]
        sticks = (marks & STICKS > 0) & continues
        if not state:
            nothing = marks.new_zeros(marks.shape[0], marks.shape[2], dtype=torch.bool)
            state = (nothing, nothing)
        tail = marks & TAIL > 0
        tail = _passed_on(tail, sticks & ~tail, state[0])
        ended = (marks & ENDS > 0) | ((marks & HEAD > 0) & tail[:, :-1] & continues)
        ended = _passed_on(ended, sticks & ~ended, state[1])
        begins = (marks & STARTS > 0) | (ended[:, :-1] & (marks & STICKS == 0)) | ~continues
        # Row 0 is the state before the chunk, which stays where no token is real.
        last = clock.length[:, None, None].expand(-1, 1, marks.shape[2])
        return begins, (tail.gather(1, last).squeeze(1), ended.gather(1, last).squeeze(1))


def _passed_on(said: Tensor, passes: Tensor, before: Tensor) -> Tensor:
    """What holds after each token, where some pass on what held before: (B, T, S) bool, (B, S) → (B, 1 + T, S)."""
    row = torch.arange(1, said.shape[1] + 1, device=said.device)[:, None]
    where = torch.where(passes, 0, row).cummax(1).values
    history = torch.cat([before[:, None], said], 1)
    return torch.cat([before[:, None], history.gather(1, where)], 1)
