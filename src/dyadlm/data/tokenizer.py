"""Tokenizers: the byte tokenizer of this project, any fast Hugging Face tokenizer, and how data is encoded.

Policy, the same for every tokenizer: encoding text adds no special tokens, and no text ever becomes one (a file
that contains "<|end|>" yields its seven characters); a prepared stream ends every document with the
end-of-document token; the beginning token is the context of the first token when a text is scored or generated
from nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dyadlm.errors import UserError

PAD_TOKEN, BEGIN_TOKEN, END_TOKEN = "<|pad|>", "<|begin|>", "<|end|>"
NUM_BYTES = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer: ids 0..255 are the bytes; 256 `<|pad|>`, 257 `<|begin|>` (bos), 258 `<|end|>` (eos).

    Lossless on every text. It adds no special tokens, and a text that spells one stays text
    (`split_special_tokens`), so the specials enter by their ids only. For bytes that are no UTF-8 see
    `encode_bytes` and `decode_bytes`.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD_TOKEN, BEGIN_TOKEN, END_TOKEN)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
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


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer called "byte", that of a local folder, or that of a Hugging Face name.

    Raises `UserError` if there is none. Code that comes with a tokenizer is never run.
    """
    if name_or_path == "byte":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the hub, the network and broken files raise errors of many kinds
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"There is no tokenizer {name_or_path!r}: give `byte`, a folder with a tokenizer, or a Hugging Face "
            f"name that can be reached ({reason[0] if reason else type(error).__name__})."
        ) from error


class TextEncoder:
    """Turns the bytes of documents into tokens, under the policy of this module. Safe to share among threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
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
        self.is_byte = self.identity == _byte_identity()
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


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hexadecimal sha256 of all that decides how a fast tokenizer encodes data; equal ones are interchangeable."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "decoder", "model")}
    content["added_tokens"] = sorted((token["id"], token["content"]) for token in backend["added_tokens"])
    content["end"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def _byte_identity() -> str:
    return tokenizer_identity(byte_tokenizer())
