"""Reading bytes without end, at constant memory, and telling the surprise at each token."""

import math
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import BinaryIO, NamedTuple

import numpy as np

from dyadlm.data.encoding import AnyTokenizer, TextEncoder
from dyadlm.errors import UserError
from dyadlm.generate.session import Session

# A line longer than this is read in several parts, so that input without line ends stays bounded too.
LONGEST_LINE = 4096
# Bytes that are taken at once from a source where so many are waiting: few at first, so that rows come soon.
FIRST_WAITING, MOST_WAITING = 4096, 65536


class Surprise(NamedTuple):
    """One token read: its number from 0, its id and text, its surprisal, and the means over all so far."""

    position: int
    token: int
    text: str
    bits: float
    mean_nats: float
    bits_per_byte: float


class Listener:
    """Reads text into a session, piece by piece, and keeps the running means.

    tokens: read so far. mean_nats: per token. bits_per_byte: over the bytes they stand for.
    """

    def __init__(self, session: Session, tokenizer: AnyTokenizer, prefix_token: int | None):
        """prefix_token: read first, as the context of the first token of a text; None where the session goes on.

        Where nothing predicts the first token (after loading a state), it is read and not counted.
        """
        self._session = session
        self._encoder = TextEncoder(tokenizer)
        self._nats, self._bytes = 0.0, 0
        self.tokens = 0
        if prefix_token is not None:
            session.read([prefix_token])

    @property
    def mean_nats(self) -> float:
        return self._nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        return self._nats / math.log(2) / max(self._bytes, 1)

    def hear(self, *lines: bytes) -> Iterator[Surprise]:
        """Read lines; yields the surprise at each token. Each line is tokenised by itself, all are read at once.

        Raises `UserError` for bytes that are no text under a tokenizer of text.
        """
        ids, texts = [], []
        for content in lines:
            try:
                tokens, starts = self._encoder.encode(content)
            except UnicodeDecodeError as error:
                raise UserError(
                    "The input is not UTF-8 text, which the tokenizer of this model needs; "
                    "convert it (with iconv, say) or use a byte-level model."
                ) from error
            bounds = [*starts.tolist(), len(content)]
            ids.append(tokens)
            texts += [content[begin:end] for begin, end in pairwise(bounds)]
        if not texts:
            return
        tokens = np.concatenate(ids)
        unpredicted = not self._session.predicts
        surprises = zip(tokens.tolist(), self._session.read(tokens).tolist(), texts, strict=True)
        for token, nats, text in islice(surprises, int(unpredicted), None):
            self.tokens, self._nats, self._bytes = self.tokens + 1, self._nats + nats, self._bytes + len(text)
            yield Surprise(
                self.tokens - 1,
                token,
                text.decode(errors="replace"),
                nats / math.log(2),
                self.mean_nats,
                self.bits_per_byte,
            )


def waiting_lines(file: BinaryIO) -> Iterator[list[bytes]]:
    """The lines of a file, with their ends, in lists of what was there at once: one line of a slow source, many of a
    fast one. Nothing waits for more to come than the end of its line. Long lines come in parts that split no character.
    """
    rest, size = b"", FIRST_WAITING
    while block := file.read1(size):  # type: ignore[attr-defined]  # of what is buffered; BinaryIO is older
        *complete, rest = (rest + block).split(b"\n")
        found = [part for line in complete for part in parts_of(line + b"\n")]
        *long, rest = parts_of(rest)
        size = min(2 * size, MOST_WAITING)
        if found or long:
            yield [*found, *long]
    if rest:
        yield [rest]


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file as they come, with their ends; long ones in parts that split no character."""
    for found in waiting_lines(file):
        yield from found


def parts_of(line: bytes) -> list[bytes]:
    """A line in parts of at most `LONGEST_LINE` bytes, cut between characters; the last may be empty."""
    parts = []
    while len(line) > LONGEST_LINE:
        cut = _whole_characters(line[:LONGEST_LINE])
        parts.append(line[:cut])
        line = line[cut:]
    return [*parts, line]


def _whole_characters(block: bytes) -> int:
    """Length of `block` without the UTF-8 character that its end cuts through, if any."""
    for back in range(1, min(4, len(block) + 1)):
        byte = block[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            wide = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(block) - back if back < wide else len(block)
        if byte < 0x80:
            break
    return len(block)
