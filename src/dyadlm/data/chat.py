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
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from dyadlm.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED = "chat:"  # how kinds begin that only this module gives
CONVERSATION = "chat:conversation"  # of a passage whose content is messages as JSON
ASSISTANT, OPENING = "chat:assistant", "chat:opening"

# For tokenizers without a template. Every turn ends with the token that ends a text.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] + ':\\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}{{ 'assistant:\\n' }}{% endif %}"
)
# The text of the template is made for each message, of all up to it: the time goes with the square of their number.
MOST_MESSAGES = 500
# Stands for a message while it is looked for in the text of the template.
MARK = "\ue000message\ue001"
# Stands for a conversation that goes on.
EARLIER = [{"role": "user", "content": "\ue000user\ue001"}, {"role": "assistant", "content": "\ue000assistant\ue001"}]
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
        if any(0xD800 <= ord(letter) < 0xE000 for letter in content):
            raise UserError(f"{document}: message {number} holds half of a surrogate pair, which is no text.")
        messages.append(told | {"role": _ROLES.get(role, role), "content": content})
    if len(messages) > MOST_MESSAGES:
        raise UserError(f"{document} holds {len(messages)} messages, and at most {MOST_MESSAGES} are read; divide it.")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{document} holds no message of the assistant; there is nothing to learn from it.")
    return messages


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template that data is prepared with: the tokenizer's own, or `DEFAULT_TEMPLATE`."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    return own if isinstance(own, str) and own else DEFAULT_TEMPLATE


class ChatTemplate:
    """The chat template of a tokenizer: messages as text, and that text as tokens, also where a conversation goes on.

    A conversation that goes on is read in parts: `ids` of its first messages, the answer that a model writes,
    `closing`, `ids` of the messages after it, and so on.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._template = tokenizer, template_of(tokenizer)
        self._readings = two_readings(tokenizer) if tokenizer.is_fast else None
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        # An unknown token stands for the text that it was.
        silent = [number for number in special.values() if number != tokenizer.unk_token_id]
        self.special_ids = np.array(sorted(silent), dtype=np.int64)
        self._spelled = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @cached_property
    def closing(self) -> list[int]:
        """The tokens that end an answer."""
        return self._encoded(self.render(EARLIER).rpartition(EARLIER[-1]["content"])[2], [])

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The special token that stands behind an answer, by which a model ends it; none where there is no such."""
        following = self.closing or self.ids([{"role": "user", "content": MARK}], after=True)
        return frozenset(following[:1]) & frozenset(self.special_ids.tolist())

    def ids(
        self, messages: Sequence[dict[str, Any]], document: str = "The conversation", after: bool = False
    ) -> list[int]:
        """The tokens of messages, up to where the assistant begins to answer. after: they follow an answer that was
        closed. What they spell stays text, if the tokenizer is a fast one. Raises `UserError` where the template does
        not take them, writes them in another way after others, or changes one that spells a special token."""
        for message in messages:
            self.require_plain(message, document)
        earlier = EARLIER if after else []
        text, before = self.render([*earlier, *messages], document, opening=True), ""
        if after:
            before = self.render(EARLIER, document)
            self.require_prefix(before, text, document)
        spelling = [number for number, message in enumerate(messages) if self.spells(message["content"])]
        places = [self.place([*earlier, *messages], len(earlier) + number, text, document, True) for number in spelling]
        size = len(before)
        return self._encoded(text[size:], [(start - size, stop - size) for start, stop in places])

    def spells(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return self._spelled.search(text) is not None

    def require_plain(self, message: dict[str, Any], document: str) -> None:
        """Raise `UserError` if a message spells a special token in another field than its content."""
        told = json.dumps({name: value for name, value in message.items() if name != "content"}, ensure_ascii=False)
        if spelled := self._spelled.search(told):
            raise UserError(f"{document}: a message spells {spelled[0]} in another field than its content.")

    def encodings(self, text: str, protected: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Encoding]]:
        """The text of the template in parts: where each begins, and its tokens. protected: spans, (start, stop), that
        stay text."""
        assert self._readings is not None, "of fast tokenizers alone"
        edges = [0, *(edge for span in protected for edge in span), len(text)]
        for number, (begin, end) in enumerate(pairwise(edges)):
            (encoding,) = self._readings[number % 2].encode_batch([text[begin:end]], add_special_tokens=False)
            yield begin, encoding

    def _encoded(self, text: str, protected: Sequence[tuple[int, int]]) -> list[int]:
        if self._readings is None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return [token for _, encoding in self.encodings(text, protected) for token in encoding.ids]

    def place(
        self, messages: Sequence[dict[str, Any]], number: int, text: str, document: str, opening: bool = False
    ) -> tuple[int, int]:
        """Where the content of a message stands in the text of all. Raises `UserError` if the template changes it."""
        told = messages[number]
        marked = [*messages[:number], told | {"content": MARK}, *messages[number + 1 :]]
        head, _, tail = self.render(marked, document, opening).partition(MARK)
        for said in (told["content"], told["content"].strip()):
            if head + said + tail == text:
                return len(head), len(head) + len(said)
        raise UserError(
            f"{document}: a message spells a special token, and the chat template changes the message, so that it "
            "cannot be kept as text; take the token out of the message."
        )

    def render(
        self, messages: Sequence[dict[str, Any]], document: str = "The conversation", opening: bool = False
    ) -> str:
        """The text of messages. opening: with the beginning of an answer. Raises `UserError`, naming the document,
        where the template does not take them."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=opening
                )
            )
        except Exception as error:  # templates raise errors of their own
            raise UserError(
                f"{document}: the chat template does not take these messages ({first_line(error)})."
            ) from error

    def require_prefix(self, before: str, after: str, document: str) -> None:
        """Raise `UserError` unless the text goes on as it was."""
        if not after.startswith(before):
            raise UserError(
                f"{document}: the chat template writes earlier turns anew when another follows, so that it cannot be "
                "told which tokens the assistant says; give a tokenizer with another chat_template."
            )


class ChatEncoder:
    """Turns conversations into tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._end, self._template = tokenizer.eos_token_id, ChatTemplate(tokenizer)

    def encode(self, content: bytes, document: str) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """The tokens of a conversation. content: its messages as JSON.

        Returns ids, int32 (n,), the bytes of text of each, int32 (n,), and where each kind of token begins. The last
        token is not the one that ends a text: whoever writes the document adds that. Raises `UserError` where the
        template does not take the messages, or does not say which tokens are the assistant's.
        """
        text, kinds, protected = self._written(json.loads(content), document)
        ids: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        for begin, encoding in self._template.encodings(text, protected):
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
            starts.append(begin + np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0])
        tokens, places = np.concatenate(ids), np.maximum.accumulate(np.concatenate(starts))
        sizes = _sizes(text, places) * ~np.isin(tokens, self._template.special_ids)
        begins = np.searchsorted(places, [place for place, _ in kinds])
        found = [(int(begin), kind) for begin, (_, kind) in zip(begins, kinds, strict=True) if begin < len(tokens)]
        ended = len(tokens) > 0 and tokens[-1] == self._end
        size = len(tokens) - ended
        return tokens[:size], sizes[:size].astype(np.int32), found

    def _written(
        self, messages: Sequence[dict[str, Any]], document: str
    ) -> tuple[str, list[tuple[int, str]], list[tuple[int, int]]]:
        """The text of the template, where each kind begins in it, and what of it is to stay text, as (start, stop)."""
        template = self._template
        kinds: list[tuple[int, str]] = []
        protected: list[tuple[int, int]] = []
        before = ""
        for number, message in enumerate(messages):
            template.require_plain(message, document)
            after = template.render(messages[: number + 1], document)
            opened = before
            if message["role"] == "assistant":
                opened = self._opened(messages[: number + 1], before, after, document)
                if len(opened) > len(before):
                    kinds.append((len(before), OPENING))
            template.require_prefix(opened, after, document)
            kinds.append((len(opened), f"{RESERVED}{message['role']}"))
            if template.spells(message["content"]):
                protected.append(template.place(messages[: number + 1], number, after, document))
            before = after
        return before, kinds, protected

    def _opened(self, messages: Sequence[dict[str, Any]], before: str, after: str, document: str) -> str:
        """The text up to where the last message begins to answer. before, after: the text without and with it."""
        template = self._template
        if len(messages) > 1:
            opened = template.render(messages[:-1], document, opening=True)
            template.require_prefix(before, opened, document)
            return opened
        # transformers renders no empty conversation: the opening is that of an answer to a question.
        question = [{"role": "user", "content": MARK}]
        asked = template.render(question, document)
        opening = template.render(question, document, opening=True)[len(asked) :].lstrip()
        head, found, _ = after.partition(opening)
        return head + found if found and messages[0]["content"].strip() not in head else before


class ChatTurns:
    """A conversation turn by turn: the tokens of each turn, without those of the turns before it.

    end_tokens: the ids of special tokens that end an answer, by the template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system: str | None = None):
        """system: a message of the system before the first turn. Raises `UserError` where the chat template does not
        take the messages, or writes later turns in another way than earlier ones."""
        self._template = template = ChatTemplate(tokenizer)
        self._head = [] if system is None else [{"role": "system", "content": system}]
        marks = [MARK.replace("message", f"message{number}") for number in range(5)]
        spoken = [{"role": "assistant" if number % 2 else "user", "content": mark} for number, mark in enumerate(marks)]
        texts = [template.render(self._head + spoken[:size], opening=True) for size in (1, 3, 5)]
        between, found, last = texts[1].partition(marks[1])[2].partition(marks[2])
        written, same = texts[0], bool(found)
        for size in (1, 2):
            written += marks[2 * size - 1] + between + marks[2 * size] + last
            same = same and written == texts[size]
        if not same:
            raise UserError(
                "The chat template of this tokenizer writes later turns in another way than the first ones, so that a "
                "turn cannot be read alone; use `dyadlm repl`, or a tokenizer with another chat_template."
            )
        self.end_tokens = template.end_tokens

    def ids(self, said: str, first: bool) -> list[int]:
        """The tokens from the end of the last answer (which ends there) to the beginning of the next. first: whether
        there is no answer yet. What is said stays text: it becomes no special token."""
        turn = {"role": "user", "content": said}
        if first:
            return self._template.ids([*self._head, turn])
        return [*self._template.closing, *self._template.ids([turn], after=True)]


def two_readings(tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokenizer, Tokenizer]:
    """Two copies of a tokenizer: special tokens are read as such in the text of a template, and spelled out in what
    messages say."""
    as_tokens, as_text = (Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) for _ in range(2))
    for backend in (as_tokens, as_text):
        backend.no_truncation()
        backend.no_padding()
    as_tokens.encode_special_tokens, as_text.encode_special_tokens = False, True
    return as_tokens, as_text


def _sizes(text: str, starts: np.ndarray) -> np.ndarray:
    """Bytes of text that tokens stand for, (n,), by the character at which each begins, (n,), in ascending order; of
    tokens in one character the last has them."""
    edges = np.concatenate([[0], np.cumsum([len(letter.encode("utf-8", "surrogatepass")) for letter in text])])
    sizes: np.ndarray = np.diff(edges[np.concatenate([[0], starts[1:]])], append=edges[-1]).astype(np.int32)
    return sizes


def as_json(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """What `ChatEncoder.encode` reads."""
    return json.dumps(messages, default=str).encode()
