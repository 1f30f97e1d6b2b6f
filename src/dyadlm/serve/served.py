"""A model as it is served: its name, its tokenizer, its rows and the thread that reads for all requests."""

import re
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyadlm.data.chat import ChatTemplate
from dyadlm.data.encoding import TextEncoder, prefix_token
from dyadlm.errors import UserError
from dyadlm.serve.errors import ApiError
from dyadlm.serve.rows import BatchedRows, Row, Rows, SeparateRows
from dyadlm.serve.scheduler import Scheduler
from dyadlm.serve.settings import Limits
from dyadlm.serve.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ServedModel:
    """name: by which requests ask for it. sessions: whether its state has constant size and can be kept. slots: whether
    it has any. chat: whether its tokenizer has a chat template. vocabulary: tokens that it knows. identity: of its
    weights, for saved sessions.
    """

    def __init__(self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", limits: Limits):
        """model: in torch, in evaluation mode. Raises `UserError` for a model that sees the future."""
        from dyadlm.causal_lm import require_causal, vocabulary_size
        from dyadlm.engine.bridge import decoder_of
        from dyadlm.generate.torch_reader import TorchReader
        from dyadlm.model import DyadForCausalLM
        from dyadlm.model.empty_state import identity_of

        require_causal(model, name)
        self.name, self.model, self.tokenizer, self.created = name, model, tokenizer, int(time.time())
        self.sessions = isinstance(model, DyadForCausalLM)
        self.slots = self.sessions and bool(model.config.slot_contexts)
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._template = ChatTemplate(tokenizer) if self.chat else None
        self.parameters = int(model.num_parameters())
        self.vocabulary = min(vocabulary_size(model), len(tokenizer))
        reader = TorchReader(model)
        self.end_tokens, self.context = reader.end_tokens, reader.room  # tokens that it can read, None: any number
        self.token_bytes = TokenBytes(tokenizer)
        self.identity = identity_of(model) if isinstance(model, DyadForCausalLM) else ""
        decoder = decoder_of(model) if isinstance(model, DyadForCausalLM) else None
        self.rows: Rows
        if decoder is not None:
            self.rows = BatchedRows(decoder.engine)
        else:
            self.rows = SeparateRows(model, vocabulary_size(model))
        self.scheduler = Scheduler(self.rows, limits.streams, limits.queue, name)
        self.state_bytes = self.rows.nbytes(self._warmed()) if self.sessions else None

    def described(self) -> dict[str, Any]:
        """For `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dyadlm",
            "sessions": self.sessions,
            "chat": self.chat,
            "parameters": self.parameters,
            "state_bytes": self.state_bytes,
        }

    def prompt_ids(self, text: str, begins: bool) -> np.ndarray:
        """The tokens of a prompt, int64 (T,). Where a document begins with nothing, the token that stands there."""
        ids = self.tokenizer(text, add_special_tokens=begins)["input_ids"]
        return self.checked_ids(ids, begins)

    def checked_ids(self, ids: Sequence[int], begins: bool) -> np.ndarray:
        """Token ids of a request, int64 (T,). Raises `ApiError` for one outside the vocabulary, and for more
        than the model can read."""
        found = np.asarray(ids, np.int64).reshape(-1)
        if len(found) and not 0 <= found.min() <= found.max() < self.vocabulary:
            raise ApiError(400, f"Tokens of this model are numbers from 0 to {self.vocabulary - 1}.", param="prompt")
        if self.context is not None and len(found) > self.context:
            raise ApiError(
                400,
                f"This model reads at most {self.context:,} tokens, but there are {len(found):,}; give a shorter text.",
                param="prompt",
                code="context_length_exceeded",
            )
        if not len(found) and begins:
            found = np.array([prefix_token(self.tokenizer)], np.int64)
        return found

    @cached_property
    def encoder(self) -> TextEncoder:
        """For texts that are scored. Raises `UserError` for a tokenizer that is not a fast one."""
        return TextEncoder(self.tokenizer)

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises `ApiError` where the model has none."""
        if self._template is None:
            raise ApiError(
                400,
                f"The model {self.name} has no chat template; use /v1/completions, or a model that was trained on "
                "conversations.",
                param="messages",
                code="no_chat_template",
            )
        return self._template

    def chat_ids(self, messages: list[dict[str, Any]], after: bool) -> np.ndarray:
        """The tokens of messages, up to the beginning of the answer. after: they follow an answer. Raises `ApiError`
        where the model has no template, or it does not take the messages."""
        try:
            ids = self.chat_template.ids(messages, after=after)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        return self.checked_ids(ids, not after)

    def _warmed(self) -> Row:
        """A row that has read one token; the engine's step is compiled by then."""
        row = self.rows.start()
        self.rows.read(row, np.array([prefix_token(self.tokenizer)]), False)
        return row


def names_of(models: Sequence[str]) -> dict[str, str]:
    """The name of each model by its path or Hugging Face name: the last part of a path. Raises `UserError` for the same
    name twice."""
    named: dict[str, str] = {}
    for model in models:
        name = Path(model).resolve().name if Path(model).exists() else model
        name = re.sub(r"[^A-Za-z0-9._/-]", "-", name) or "model"
        if name in named.values():
            raise UserError(f"Two models are called {name}; give folders of different names.")
        named[model] = name
    return named
