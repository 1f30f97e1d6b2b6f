"""What evaluation reads: tokens that know their documents and the bytes of text they stand for."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dyadlm.data.streams import TokenStream


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


def targets_of(stream: Stream, start: int, stop: int) -> np.ndarray | None:
    """Which of the tokens start..stop-1 are scored, bool (stop - start,); None: all. Of conversations only what the
    assistant says is (`TokenStream.targets`)."""
    targets: np.ndarray | None = stream.targets(start, stop) if isinstance(stream, TokenStream) else None
    return targets


def target_bytes(stream: Stream, start: int, stop: int) -> int:
    """Bytes of text that the tokens start..stop-1 stand for, as far as they are scored."""
    targets = targets_of(stream, start, stop)
    if targets is None or not isinstance(stream, TokenStream):
        return stream.bytes_of(start, stop)
    return int(stream.byte_sizes(start, stop)[targets].sum(dtype=np.int64))
