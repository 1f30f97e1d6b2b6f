"""Decoding of a torch model by the engine: the same tokens, without torch's cost of many small operations.

`fast_decoding(model)` is a context in which `model.forward` reads single tokens through the engine, where that gives
the same result. The state moves between `DyadCache` and the engine when needed.

Dimension letters: B rows, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dyadlm.engine import Engine, EngineState, unsupported
from dyadlm.model.cache import DyadCache
from dyadlm.model.modeling import DyadForCausalLM

log = logging.getLogger("dyadlm.engine")


class EngineRows:
    """The state of some rows, in the layout of an engine. Part of it follows from the engine's weights."""

    def __init__(self, state: EngineState, engine: Engine | None = None):
        self.state, self.engine = state, engine

    def __len__(self) -> int:
        return self.state.rows

    def tensors(self) -> dict[str, Tensor]:
        """The state of all rows by the names of `DyadCache.tensors`, (B, ...) each."""
        return {name: torch.from_numpy(array) for name, array in self.state.tensors().items()}


def cache_of(state: EngineState) -> DyadCache:
    """The state of the engine as `past_key_values` of the model; it moves on by itself."""
    cache = DyadCache()
    if not state.is_empty:
        cache._set(EngineRows(state).tensors(), state.shape.layers)
        cache.columns_seen = state.columns_seen
    return cache


class Decoder:
    """The engine of one torch model, with a copy of its weights."""

    def __init__(self, model: DyadForCausalLM):
        self.version = weights_version(model)
        named = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        named = {name: array for name, array in named.items() if not name.startswith("companions.")}
        self.engine = Engine(model.config.to_dict(), named)

    def step(self, tokens: Sequence[int], cache: DyadCache) -> Tensor:
        """Read one token a row; the cache moves on. Returns logits (B, 1, V) float32.

        Raises:
            IndexError: a token outside the vocabulary, as the embedding of torch raises it.
        """
        if not isinstance(cache.rows, EngineRows) or cache.rows.engine is not self.engine:
            tensors = {name: tensor.numpy() for name, tensor in cache.tensors().items()}
            cache.hand_over(EngineRows(self.engine.state_from(tensors, cache.columns_seen), self.engine))
        held = cache.rows
        assert isinstance(held, EngineRows)
        logits = self.engine.step_rows(held.state, tokens)
        cache.columns_seen += 1
        return torch.from_numpy(logits)[:, None]


def weights_version(model: DyadForCausalLM) -> tuple[tuple[int, int], ...]:
    """What changes whenever a weight or buffer is written to or replaced."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in model.state_dict(keep_vars=True).values())


def refusal(model: DyadForCausalLM) -> str | None:
    """Why the engine cannot decode for a model, as the end of a sentence; None if it can."""
    if model.training:
        return "it is in training mode"
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return f"its weights are {model.dtype} on {model.device.type}, not float32 on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if hooked or torch.nn.modules.module._global_forward_hooks:
        return "hooks watch its modules"
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return "adapters are attached to it"
    if (
        model.model.boundaries is not None
        and not model.model.boundaries.known
        and not model.model.boundaries.marks.any()
    ):
        return "its rules have not been given the text of the tokens"
    return unsupported(model.config.to_dict())


def decoder_of(model: DyadForCausalLM) -> Decoder | None:
    """What decodes for a model as its weights are now; None, with the reason in the log, where the engine cannot."""
    reason = refusal(model)
    if reason is not None:
        log.info("Tokens are decoded by torch, since %s.", reason)
        return None
    kept: Decoder | None = model.__dict__.get("_kept_decoder")
    if kept is None or kept.version != weights_version(model):
        kept = model.__dict__["_kept_decoder"] = Decoder(model)
    return kept


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """While this is open, single tokens of a dyadlm model are read by the engine, where it supports the model.

    The log `dyadlm.engine` says why not, if it does not. Any other model is left as it is.
    """
    if not isinstance(model, DyadForCausalLM) or model._fast_decoder is not None:
        yield
        return
    model._fast_decoder = decoder_of(model)
    try:
        yield
    finally:
        model._fast_decoder = None
