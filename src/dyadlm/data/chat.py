"""Conversations: a chat template turns messages into text, and only what the assistant says is a target.

A record with a list of messages (`messages`: role and content; or `conversations`: from and value) is one document. Its
tokens carry the kind `chat:ROLE`. The opening of each of the assistant's turns, which a program writes before the model
answers, has the kind `chat:opening`. With the default template and the byte tokenizer:

    user:⏎Hi<|end|>⏎assistant:⏎Hello<|end|>
    chat:user      chat:opening  chat:assistant

Special tokens of the template become tokens. What a message spells stays text, so that no message ends its own turn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from dyadlm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED = "chat:"  # how kinds begin that only this module gives
CONVERSATION = "chat:conversation"  # of a passage whose content is messages as JSON
ASSISTANT, OPENING = "chat:assistant", "chat:opening"

# Of tokenizers that have none. Every turn ends with the token that ends a text.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] + ':\\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nassistant:\\n' }}{% endif %}"
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def is_target(kind: str) -> bool:
    """Whether tokens of a kind are to be learned and scored: all but those of other speakers than the assistant."""
    return not kind.startswith(RESERVED) or kind == ASSISTANT


def has_messages(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a conversation."""
    return any(isinstance(record.get(name), list) for name in ("messages", "conversations"))


def messages_of(record: Mapping[str, Any], document: str) -> list[dict[str, Any]]:
    """The messages of a record, with role and content. Raises `UserError` where they are none."""
    given = record.get("messages") if isinstance(record.get("messages"), list) else record.get("conversations")
    messages = []
    for number, message in enumerate(given or [], start=1):
        if not isinstance(message, Mapping):
            raise UserError(f"{document}: message {number} is no object with role and content.")
        told = {name: value for name, value in message.items() if value is not None}
        role, content = told.pop("role", told.pop("from", None)), told.pop("content", told.pop("value", ""))
        if isinstance(content, list):  # parts, of which text is one kind
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = None if None in parts else "".join(map(str, parts))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{document}: message {number} has no role and content that are text.")
        messages.append(told | {"role": _ROLES.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{document} holds no message of the assistant; there is nothing to learn from it.")
    return messages


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template that data is prepared with: the tokenizer's own, or `DEFAULT_TEMPLATE`."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    return own if isinstance(own, str) and own else DEFAULT_TEMPLATE


class ChatEncoder:
    """Turns conversations into tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._template = tokenizer, template_of(tokenizer)
        # Two copies: special tokens are read as such in the text of the template, and spelled out in messages.
        self._as_tokens, self._as_text = (Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) for _ in range(2))
        for backend in (self._as_tokens, self._as_text):
            backend.no_truncation()
            backend.no_padding()
        self._as_tokens.encode_special_tokens, self._as_text.encode_special_tokens = False, True
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = np.array(sorted(special.values()), dtype=np.int64)
        self._spelled = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def encode(self, content: bytes, document: str) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """The tokens of a conversation. content: its messages as JSON.

        Returns ids, int32 (n,), the bytes of text of each, int32 (n,), and where each kind of token begins. The last
        token is not the one that ends a text: whoever writes the document adds that.
        """
        ids: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        kinds: list[tuple[int, str]] = []
        for kind, text, said in self._pieces(json.loads(content), document):
            kinds.append((sum(map(len, ids)), kind))
            for part, backend in self._parts(text, said, document):
                (encoding,) = backend.encode_batch([part], add_special_tokens=False)
                tokens = np.asarray(encoding.ids, dtype=np.int32)
                ids.append(tokens)
                sizes.append(_sizes(part, encoding.offsets) * ~np.isin(tokens, self._special_ids))
        tokens, lengths = np.concatenate(ids), np.concatenate(sizes).astype(np.int32)
        ended = len(tokens) > 0 and tokens[-1] == self._tokenizer.eos_token_id
        return tokens[: len(tokens) - ended], lengths[: len(tokens) - ended], kinds

    def _pieces(self, messages: Sequence[dict[str, Any]], document: str) -> Iterator[tuple[str, str, str]]:
        """(kind, text of the template, what the message says in it) from turn to turn."""
        before = ""
        for number, message in enumerate(messages):
            after = self._render(messages[: number + 1], document)
            opened = before
            if message["role"] == "assistant":
                opened = self._render(messages[:number], document, opening=True) if number else before
                self._require_prefix(before, opened, document)
                if len(opened) > len(before):
                    yield OPENING, opened[len(before) :], ""
            self._require_prefix(opened, after, document)
            yield f"{RESERVED}{message['role']}", after[len(opened) :], message["content"]
            before = after

    def _render(self, messages: Sequence[dict[str, Any]], document: str, opening: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=opening
                )
            )
        except Exception as error:  # templates raise errors of their own
            reason = str(error).strip().splitlines()[:1]
            raise UserError(
                f"{document}: the chat template does not take these messages "
                f"({reason[0] if reason else type(error).__name__})."
            ) from error

    def _require_prefix(self, before: str, after: str, document: str) -> None:
        if not after.startswith(before):
            raise UserError(
                f"{document}: the chat template writes earlier turns anew when another follows, so that it cannot be "
                "told which tokens the assistant says; give a tokenizer with another chat_template."
            )

    def _parts(self, text: str, said: str, document: str) -> Iterator[tuple[str, Tokenizer]]:
        """The text whole, as at inference, unless the message spells a special token."""
        if not self._spelled.search(said):
            yield text, self._as_tokens
            return
        at = text.find(said := said if said in text else said.strip())
        if at < 0:
            raise UserError(
                f"{document}: a message spells a special token, and the chat template changes the message, so that it "
                "cannot be kept as text; take the token out of the message."
            )
        for part, backend in (
            (text[:at], self._as_tokens),
            (said, self._as_text),
            (text[at + len(said) :], self._as_tokens),
        ):
            if part:
                yield part, backend


def _sizes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes of text that tokens stand for, (n,), by where each begins; of tokens in one character the last has them."""
    edges = np.concatenate([[0], np.cumsum([len(letter.encode("utf-8", "surrogatepass")) for letter in text])])
    starts = edges[np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]]
    starts[:1] = 0
    return np.diff(np.maximum.accumulate(starts), append=edges[-1]).astype(np.int32)


def as_json(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """What `ChatEncoder.encode` reads."""
    return json.dumps(messages, default=str).encode()
