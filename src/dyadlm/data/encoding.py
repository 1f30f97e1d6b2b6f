"""How data is encoded, for any fast tokenizer, and the byte tokenizer by hand.

Policy, the same for every tokenizer: encoding data adds no special tokens, and no text of data ever becomes one (a
file that contains "<|end|>" yields its seven characters); a prepared stream ends every document with the
end-of-document token; the beginning token is the context of the first token when a text is scored or generated
from nothing. Prompts are what the tokenizer itself makes of them, as in transformers: "<|end|>" is the token there,
which chat templates and trainers of other libraries rely on.

Nothing here imports transformers or torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dyadlm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN, BEGIN_TOKEN, END_TOKEN = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL_TOKENS = (PAD_TOKEN, BEGIN_TOKEN, END_TOKEN)
NUM_BYTES = 256
_SPELLED = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")
AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | ByteTokenizer"
PAD_ID, BEGIN_ID, END_ID = NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2


def byte_backend() -> Tokenizer:
    """The byte tokenizer of the `tokenizers` library: ids 0..255 are the bytes, then `SPECIAL_TOKENS`."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend


class ByteTokenizer:
    """The byte tokenizer as a session uses it, without transformers. Tokens are those of `byte_tokenizer`.

    split_special_tokens: whether a text that spells a special token stays text, as in models of version 0.1.
    """

    is_fast = True
    name_or_path = "byte"
    pad_token_id, bos_token_id, eos_token_id = PAD_ID, BEGIN_ID, END_ID

    def __init__(self, split_special_tokens: bool = False):
        self.split_special_tokens = split_special_tokens

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """For `TextEncoder` and `tokenizer_identity`."""
        return byte_backend()

    def __len__(self) -> int:
        return NUM_BYTES + len(SPECIAL_TOKENS)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`input_ids`: the bytes of the text, and the special tokens that it spells. None is added."""
        pieces = [text] if self.split_special_tokens else _SPELLED.split(text)
        ids: list[int] = []
        for piece in pieces:
            if piece in SPECIAL_TOKENS and not self.split_special_tokens:
                ids.append(NUM_BYTES + SPECIAL_TOKENS.index(piece))
            else:
                ids += piece.encode(errors="surrogateescape")
        return {"input_ids": ids}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of some tokens; what is no UTF-8 becomes U+FFFD."""
        if skip_special_tokens:
            return decode_bytes(tokens).decode(errors="replace")
        spelled = (bytes([t]) if t < NUM_BYTES else SPECIAL_TOKENS[t - NUM_BYTES].encode() for t in map(int, tokens))
        return b"".join(spelled).decode(errors="replace")


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (the table of GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(NUM_BYTES)]


def encode_bytes(content: bytes) -> np.ndarray:
    """The ids of the byte tokenizer for any bytes, int32 (len(content),)."""
    return np.frombuffer(content, dtype=np.uint8).astype(np.int32)


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The bytes that ids of the byte tokenizer stand for; special tokens stand for none."""
    return bytes(token for token in map(int, ids) if token < NUM_BYTES)


class TextEncoder:
    """Turns the bytes of documents into tokens, under the policy of this module. Safe to share among threads."""

    def __init__(self, tokenizer: AnyTokenizer):
        """Raises `UserError` if the tokenizer is not a fast one or has no end-of-sequence token."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no fast version; choose one that saves tokenizer.json."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token to end documents with; "
                "set its eos_token and save it again."
            )
        self.end_id: int = tokenizer.eos_token_id
        self.identity = tokenizer_identity(tokenizer)
        self.is_byte = self.identity == byte_identity()
        # A copy of our own: calls of the original may change its truncation, padding and treatment of specials.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def encode(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 (n,), and the byte of `content` at which each token begins, int64 (n,).

        Of tokens within one character the last owns its bytes. Raises `UnicodeDecodeError` if the tokenizer is
        one of text and `content` is no UTF-8.
        """
        if self.is_byte:
            return encode_bytes(content), np.arange(len(content), dtype=np.int64)
        text = content.decode()
        # A batch, even of one, leaves Python's lock to other threads; `encode` would hold it.
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int32)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
        starts = np.concatenate([[0], np.cumsum(sizes)])[offsets]
        starts[:1] = 0  # what a normaliser strips before the first token is that token's own
        return ids, np.maximum.accumulate(starts)


def tokenizer_identity(tokenizer: AnyTokenizer) -> str:
    """A hexadecimal sha256 of all that decides how a fast tokenizer encodes data; equal ones are interchangeable."""
    return backend_identity(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.eos_token_id)


def backend_identity(backend: Mapping[str, Any], end: Any) -> str:
    """As above, of the content of a `tokenizer.json`. end: the id of the token that ends documents."""
    content = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "decoder", "model")}
    content["added_tokens"] = sorted((token["id"], token["content"]) for token in backend["added_tokens"])
    content["end"] = end
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def byte_identity() -> str:
    """`tokenizer_identity` of the byte tokenizer."""
    return tokenizer_identity(ByteTokenizer())


def prefix_token(tokenizer: AnyTokenizer) -> int:
    """What stands before the first token of a text: beginning of sequence, else end, as in lm-eval.

    Raises `UserError` if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("The tokenizer has no token for the beginning or the end of a text; give it a bos_token.")
