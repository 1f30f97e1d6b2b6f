"""Reading bytes without end, at constant memory, and telling the surprise at each token."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dyadlm.data.tokenizer import TextEncoder
from dyadlm.errors import UserError
from dyadlm.generate.session import Session

# A line longer than this is read in several parts, so that input without line ends stays bounded too.
LONGEST_LINE = 4096
NATS_TO_BITS = 1.0 / np.log(2.0)


class Surprise(NamedTuple):
    """One token read: its number from 0, id, text, surprise, and the means over all tokens so far."""

    position: int
    token: int
    text: str
    nats: float
    mean_nats: float
    bits_per_byte: float


class Listener:
    """Reads text into a session, piece by piece, and keeps the running means."""

    def __init__(self, session: Session, tokenizer: PreTrainedTokenizerBase, prefix_token: int):
        """`prefix_token` is read first, as the context of the first token of the text."""
        self._session = session
        self._encoder = TextEncoder(tokenizer)
        self._tokens, self._nats, self._bytes = 0, 0.0, 0
        session.read([prefix_token])

    def hear(self, content: bytes) -> Iterator[Surprise]:
        """Read bytes; yields the surprise at each token. They are tokenised by themselves.

        Raises `UserError` for bytes that are no text under a tokenizer of text.
        """
        try:
            ids, starts = self._encoder.encode(content)
        except UnicodeDecodeError as error:
            raise UserError(
                "The input is not UTF-8 text, which the tokenizer of this model needs; "
                "convert it (with iconv, say) or use a byte-level model."
            ) from error
        stops = np.append(starts[1:], len(content))
        for token, nats, start, stop in zip(ids, self._session.read(ids), starts, stops, strict=True):
            self._tokens, self._nats, self._bytes = (
                self._tokens + 1,
                self._nats + float(nats),
                self._bytes + stop - start,
            )
            yield Surprise(
                self._tokens - 1,
                int(token),
                content[start:stop].decode(errors="replace"),
                float(nats),
                self._nats / self._tokens,
                float(self._nats * NATS_TO_BITS / max(self._bytes, 1)),
            )


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file as they come, with their ends; long ones in parts that split no character."""
    rest = b""
    while block := file.readline(LONGEST_LINE):
        block = rest + block
        cut = len(block) if block.endswith(b"\n") else _whole_characters(block)
        rest = block[cut:]
        if cut:
            yield block[:cut]
    if rest:
        yield rest


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
