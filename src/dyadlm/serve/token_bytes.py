"""The bytes that each token of a tokenizer stands for."""

import json
import re

from dyadlm.data.encoding import AnyTokenizer, byte_symbols

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class TokenBytes:
    """`of(token)` gives bytes: of byte-level vocabularies (GPT-2, Llama 3) and of those with byte fallback (Llama 2)
    exactly, of others the UTF-8 of the token's text."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = {} if backend is None else json.loads(backend.to_str())
        self._symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        self._byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
        self._marks_spaces = "\u2581" in json.dumps(content.get("decoder"), ensure_ascii=False)
        self._added = {token["id"]: token["content"] for token in content.get("added_tokens", ())}
        self._backend = backend

    def of(self, token: int) -> bytes:
        """The bytes of a token; empty for an id without one."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The token as text; what is no whole character is U+FFFD."""
        return self.of(token).decode(errors="replace")

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = None if self._backend is None else self._backend.id_to_token(token)
        if piece is None:
            text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return str(text).encode(errors="replace")
        if self._byte_level and all(symbol in self._symbols for symbol in piece):
            return bytes(self._symbols[symbol] for symbol in piece)
        if found := _BYTE.match(piece):
            return bytes([int(found[1], 16)])
        return (piece.replace("\u2581", " ") if self._marks_spaces else str(piece)).encode()
