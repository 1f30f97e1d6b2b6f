"""Any causal language model of transformers: how many tokens it can read, and how it reads on where it stopped.

Models name and keep their states differently, and some lose them where more than one token follows. So each model is
tried once on a few tokens, and is read on in the way that gives what reading at once gives.

Dimension letters: B texts, T tokens, V vocabulary.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dyadlm.errors import UserError
from dyadlm.model import DyadForCausalLM

# What transformers calls a state, by family.
STATE_NAMES = ("past_key_values", "cache_params", "past_buckets_states", "state", "mems")
# What models of others raise where they cannot go on.
FAULTS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)

# How a model reads on: any number of tokens at once, one by one, or not at all (it reads everything again).
Continues = Literal["in pieces", "token by token", "from the beginning"]

# Tokens that a model is tried on, half of them read on from a state.
TRIED = 48
# Largest difference of logits, in standard deviations, that rounding explains, in float32 and per unit of rounding.
ROUNDED, ROUNDED_UNITS = 5e-4, 16
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|pos(ition)?s?_embed\w*|position_embeddings?)$")

log = logging.getLogger("dyadlm")
_known: WeakKeyDictionary[PreTrainedModel, Continues] = WeakKeyDictionary()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of tokens the model has embeddings for (the logits may not have more)."""
    return int(cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0])


def context_of(model: PreTrainedModel) -> int | None:
    """The most tokens that a model was made for; None where there is no limit.

    Where positions are learned it cannot read more (`position_limit`); others can, at some loss.
    """
    if isinstance(model, DyadForCausalLM):
        return None
    made_for = getattr(model.config, "max_position_embeddings", None)
    made_for = made_for if isinstance(made_for, int) and made_for > 0 else None
    limit = position_limit(model)
    return min((length for length in (made_for, limit) if length is not None), default=None)


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a model with learned positions can read at all; None for others.

    Some count from behind the padding on (RoBERTa), or from 2 (OPT, BART).
    """
    if isinstance(model, DyadForCausalLM):
        return None
    limits = [
        module.num_embeddings - max(getattr(module, "offset", 0), 0 if (pad := module.padding_idx) is None else pad + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name)
    ]
    return min(limits, default=None)


def continues(model: PreTrainedModel) -> Continues:
    """How the model reads on. It is found out once, on a few tokens, and changes nothing in the model."""
    if isinstance(model, DyadForCausalLM):
        return "in pieces"
    if model not in _known:
        was_training = model.training
        model.train(False)
        try:
            _known[model] = _find_out(model)
        finally:
            model.train(was_training)
        if _known[model] != "in pieces":
            log.info("A %s model reads on %s.", model.config.model_type, _known[model])
    return _known[model]


@torch.no_grad()
def require_causal(model: PreTrainedModel, name: str) -> None:
    """Raise `UserError` if a later token changes an earlier logit: BERT and XLNet, say, read both ways unless they are
    set up otherwise, and their loss on the tokens that follow means nothing."""
    if isinstance(model, DyadForCausalLM):
        return
    length = min(TRIED // 2, context_of(model) or TRIED)
    ids = torch.randint(vocabulary_size(model), (1, length), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % vocabulary_size(model)
    was_training = model.training
    model.train(False)
    try:
        before, after = (model(input_ids=read.to(model.device), use_cache=False).logits for read in (ids, other))
    except FAULTS:
        return  # too short for it, or of another kind; what it is asked for next says more
    finally:
        model.train(was_training)
    if float((before - after)[:, :-1].abs().max() / before.std().clamp_min(1e-12)) > _rounding(model):
        raise UserError(
            f"{name} is not causal: its logits change with tokens that come later, so that its loss means nothing; "
            f"see `dyadlm audit {name}`, and check its configuration (is_decoder)."
        )


@torch.no_grad()
def _find_out(model: PreTrainedModel) -> Continues:
    length = min(TRIED, context_of(model) or TRIED)
    generator = torch.Generator().manual_seed(0)
    # Two texts: RWKV-4 of transformers reads one on from its state, and mixes up several.
    ids = torch.randint(vocabulary_size(model), (2, length), generator=generator).to(model.device)
    whole = model(input_ids=ids, use_cache=False).logits.float()
    half = length // 2

    def missed(edges: Sequence[int]) -> float:
        """How far from `whole` the logits of pieces are, in standard deviations; infinite if there can be none."""
        state = first_state(model)
        logits = []
        try:
            for start, stop in pairwise(edges):
                output = model(input_ids=ids[:, start:stop], use_cache=True, **state)
                if output.logits.shape[:2] != (2, stop - start):
                    return torch.inf
                logits.append(output.logits.float())
                state = state_of(model, output)
                if not state:
                    return torch.inf
        except FAULTS:
            return torch.inf
        return float((torch.cat(logits, 1) - whole).abs().max() / whole.std().clamp_min(1e-12))

    if half < 2:
        return "from the beginning"
    one_by_one = missed([0, half, *range(half + 1, length + 1)])
    if missed([0, half, length]) <= max(ROUNDED, min(3 * one_by_one, _rounding(model))):
        return "in pieces"
    return "token by token" if one_by_one <= _rounding(model) else "from the beginning"


def _rounding(model: PreTrainedModel) -> float:
    return max(ROUNDED, ROUNDED_UNITS * torch.finfo(model.dtype).eps)


class RecurrentCache(DynamicCache):
    """The cache of a model none of whose layers attends: no layer counts positions, and none needs them."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def first_state(model: PreTrainedModel) -> dict[str, Any]:
    """What to hand over with the first tokens of a text that is read on, by the names that `forward` takes; empty where
    the model begins by itself. The cache that transformers makes for layers that do not attend cannot count them."""
    if set(getattr(model.config, "layer_types", None) or ()) != {"linear_attention"}:
        return {}
    takes = "past_key_values" in inspect.signature(model.forward).parameters
    return {"past_key_values": RecurrentCache(config=model.config)} if takes else {}


def state_of(model: PreTrainedModel, output: Any) -> dict[str, Any]:
    """What to hand over with the next tokens, by the names that `forward` takes; empty if there is nothing."""
    taken = inspect.signature(model.forward).parameters
    found = {name: getattr(output, name, None) for name in STATE_NAMES if name in taken}
    return {name: state for name, state in found.items() if state is not None}


def state_bytes(state: Any) -> int:
    """Bytes of all tensors that can be reached from a state; those that are held twice count once."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            list(map(look, value.values()))
        elif isinstance(value, list | tuple):
            list(map(look, value))
        elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
            look(vars(value))

    look(state)
    return sum(found.values())


class Continuation:
    """One text, or several of equal length, read by a model piece by piece. seen: tokens read of each."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.seen = 0
        self._state = first_state(model)
        self._ids: Tensor | None = None  # all of them, for models that read everything again
        self._limit, self._context = position_limit(model), context_of(model)

    @property
    def room(self) -> int | None:
        """How many more tokens the model has positions for; None where there is no limit."""
        return None if self._limit is None else self._limit - self.seen

    def state_bytes(self) -> int | None:
        """Bytes of the tensors that are kept between calls; None for a model that reads everything again."""
        return state_bytes(self._state) or None

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Read on: (B, T) int64 → logits (B, T, V). Raises `UserError` where the model has no more positions, or reads
        one text alone."""
        with self._limits_named(ids.shape[1]):
            logits = self._read(ids.to(self.model.device))
        self.seen += ids.shape[1]
        return logits

    @torch.no_grad()
    def read_all(self, ids: Tensor) -> Tensor:
        """Read a whole text (B, T) at once, keeping no state; logits (B, T, V). Raises `UserError` as `read` does."""
        with self._limits_named(ids.shape[1]):
            return cast(Tensor, self.model(input_ids=ids.to(self.model.device), use_cache=False).logits)

    def require_room(self, tokens: int) -> None:
        """Raise `UserError` if the model has no positions for so many more tokens."""
        if self._limit is not None and self.seen + tokens > self._limit:
            raise self._too_long(self._limit)

    @contextmanager
    def _limits_named(self, tokens: int) -> Iterator[None]:
        self.require_room(tokens)
        try:
            yield
        except FAULTS as error:
            if self._context is None or self.seen + tokens <= self._context:
                raise
            raise self._too_long(self._context) from error

    def _too_long(self, limit: int) -> UserError:
        return UserError(
            f"A {self.model.config.model_type} model of this size reads at most {limit} tokens; give it a shorter text."
        )

    def _read(self, ids: Tensor) -> Tensor:
        length, how = ids.shape[1], continues(self.model)
        if how == "from the beginning":
            return self._read_again(ids)
        size = length if how == "in pieces" or not self.seen else 1
        logits = []
        for at in range(0, length, size):
            output = self.model(input_ids=ids[:, at : at + size], use_cache=True, **self._state)
            self._state = state_of(self.model, output)
            logits.append(output.logits)
        found = torch.cat(logits, 1)
        if found.shape[:2] != ids.shape:  # RWKV-4 of transformers, single tokens of several texts
            raise UserError(
                f"A {self.model.config.model_type} model mixes up several texts where it reads single tokens; "
                "give one text at a time."
            )
        return found

    def _read_again(self, ids: Tensor) -> Tensor:
        """Everything from the beginning. The last logits come from the inputs that the model makes of a text that is
        to be continued: a model that reads both ways (XLNet) needs a mask for that."""
        length = ids.shape[1]
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        model: Any = self.model
        prepared = model.prepare_inputs_for_generation(self._ids, is_first_iteration=True, use_cache=False)
        last = self.model(**{**prepared, "use_cache": False}).logits[:, -1:]
        if length == 1:
            return cast(Tensor, last)
        before = self.model(input_ids=self._ids, use_cache=False).logits[:, -length:-1]
        return torch.cat([before, last], 1)
