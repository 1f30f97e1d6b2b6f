"""What evaluation reads: tokens that know their documents and the bytes of text they stand for."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Stream(Protocol):
    """One long sequence of tokens; `dyadlm.data.streams.TokenStream` is one."""

    def __len__(self) -> int: ...

    @property
    def documents(self) -> Sequence[tuple[int, int, str]]:
        """(start, stop, name) of each document, in tokens; together they cover the stream."""

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids start..stop-1, int32 (stop - start,)."""

    def bytes_of(self, start: int, stop: int) -> int:
        """Bytes of text that the tokens start..stop-1 stand for; special tokens count 0."""
