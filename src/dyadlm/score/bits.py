"""From a line to its tokens, and from the surprise at tokens to the bits of the bytes of the line.

Dimension letters: T tokens.
"""

import math
from typing import NamedTuple

import numpy as np

from dyadlm.data.encoding import TextEncoder
from dyadlm.errors import UserError
from dyadlm.score.lines import Line
from dyadlm.score.units import ScoredLine
from dyadlm.score.usual import Usual


class EncodedLine(NamedTuple):
    """A line, its tokens (ids int32 (T,)), and the byte of the line at which each begins (starts int64 (T,))."""

    line: Line
    ids: np.ndarray
    starts: np.ndarray


def encoded_line(encoder: TextEncoder, line: Line) -> EncodedLine:
    """The tokens of a line. Raises `UserError` for bytes that are no text, under a tokenizer of text."""
    try:
        return EncodedLine(line, *encoder.encode(line.content))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{line.document}, line {line.number} is not UTF-8 text, which the tokenizer of this model needs; "
            "convert it (with iconv, say) or use a byte-level model."
        ) from error


def scored_line(encoded: EncodedLine, nats: np.ndarray, usual: Usual) -> ScoredLine:
    """The surprise at each byte of a line whose tokens cost nats (T,); a token that nothing predicted counts as 0 bits.

    usual: of the lines before; it takes this one in.
    """
    bits, firsts = spread(
        np.nan_to_num(nats.astype(np.float64)) / math.log(2), encoded.starts, len(encoded.line.content)
    )
    return ScoredLine(encoded.line, bits, firsts, usual.expected(bits))


def spread(bits: np.ndarray, starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of tokens as bits of bytes: float64 (size,), and the first byte of each token that has bytes, int64.

    starts: int64 (T,), ascending; the last of the tokens that begin at the same byte has its bytes, and the bits of
    all of them are spread over these.
    """
    if not len(starts):
        return np.zeros(size), np.zeros(1, np.int64)
    starts = np.minimum(starts, size - 1)
    firsts = np.flatnonzero(np.diff(starts, prepend=-1))
    own = starts[firsts].copy()
    own[0] = 0
    lengths = np.diff(np.append(own, size))
    return np.repeat(np.add.reduceat(bits, firsts) / lengths, lengths), own
