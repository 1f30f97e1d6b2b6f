"""What evaluation reads: tokens that know their documents and the bytes of text they stand for."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from dyadlm.errors import UserError


class Stream(Protocol):
    """One long sequence of tokens; `dyadlm.data.TokenStream` is one, memory-mapped."""

    def __len__(self) -> int: ...

    @property
    def documents(self) -> Sequence[tuple[int, int, str]]:
        """(start, stop, name) of each document, in tokens; together they cover the stream."""

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids start..stop-1, int32 (stop - start,)."""

    def bytes_of(self, start: int, stop: int) -> int:
        """Bytes of UTF-8 text that the tokens start..stop-1 stand for; special tokens count 0."""


class TextStream:
    """Texts held in memory, one document each, tokenised without special tokens.

    A token whose characters begin at offset c owns the bytes up to the beginning of the next token, so that
    the bytes of any cut add up to the bytes of the text.
    """

    def __init__(self, texts: str | Iterable[str], tokenizer: PreTrainedTokenizerBase):
        """`tokenizer` must be a fast one (it tells offsets). Raises `UserError` if there is no text."""
        ids: list[int] = []
        starts: list[np.ndarray] = []
        self.documents: list[tuple[int, int, str]] = []
        length = 0
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            begin = len(ids)
            ids.extend(encoded["input_ids"])
            starts.append(length + _byte_starts(text, encoded["offset_mapping"]))
            self.documents.append((begin, len(ids), f"text {number + 1}"))
            length += len(text.encode())
        if not ids:
            raise UserError("There is no text to evaluate; give at least one character.")
        self._ids = np.asarray(ids, dtype=np.int32)
        self._starts = np.append(np.concatenate(starts), length)  # (T + 1,) byte offset of each token

    def __len__(self) -> int:
        return len(self._ids)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._ids[start:stop]

    def bytes_of(self, start: int, stop: int) -> int:
        return int(self._starts[stop] - self._starts[start])


def _byte_starts(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Byte offset in `text` at which each token begins; of tokens within one character, the last owns it."""
    at = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    begins = np.asarray([begin for begin, _ in offsets], dtype=np.int64)
    begins[:1] = 0  # what a normaliser strips before the first token is that token's own
    return at[begins]
