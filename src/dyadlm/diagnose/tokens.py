"""Which bytes each token of a vocabulary stands for."""

import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.probe import NotApplicable

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[bytes]:
    """The bytes of the ids 0 … vocabulary − 1; special ones and ids beyond the tokenizer's stand for none.

    Pieces are read as those of a byte-level or a SentencePiece vocabulary where the tokenizer decodes like one, else as
    text. Other tokenizers (WordPiece) give something else than the text that they were made from: see `spelled_bytes`.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"), ensure_ascii=False)
    symbols = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    byte_level, pieces = '"ByteLevel"' in decoder, "▁" in decoder
    special = set(tokenizer.all_special_ids)
    table = [b""] * vocabulary
    for piece, token in tokenizer.get_vocab().items():
        if token >= vocabulary or token in special:
            continue
        if byte_level and all(character in symbols for character in piece):
            table[token] = bytes(symbols[character] for character in piece)
        elif pieces and (byte := _BYTE.fullmatch(piece)):
            table[token] = bytes([int(byte[1], 16)])
        else:
            table[token] = (piece.replace("▁", " ") if pieces else piece).encode("utf-8", "surrogatepass")
    return table


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, vocabulary: int, text: Sequence[TokenStream]) -> list[bytes]:
    """As `token_bytes`. Raises `NotApplicable` where they are not as many as the text was made from."""
    table = token_bytes(tokenizer, vocabulary)
    for stream in text:
        stop = min(4096, len(stream))
        told, counted = stream.bytes_of(0, stop), sum(len(table[token]) for token in stream.tokens(0, stop).tolist())
        if abs(told - counted) > 0.02 * told + 4:
            raise NotApplicable("the pieces of its tokenizer do not say which bytes they stand for")
    return table
