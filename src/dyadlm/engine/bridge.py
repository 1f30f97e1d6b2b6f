"""Decoding of a torch model by the engine: the same tokens, without torch's cost of many small operations.

`fast_decoding(model)` is a context in which `model.forward` reads single tokens through the engine, where that gives
the same result. The state moves between `DyadCache` and the engine when needed.

Dimension letters: B rows, V vocabulary.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyadlm.engine import Engine, EngineState, unsupported
from dyadlm.errors import RunFailed, UserError
from dyadlm.model.cache import DyadCache, once
from dyadlm.model.decoding import FAST_DECODER
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
        tensor = once(torch.from_numpy)
        return {name: tensor(array) for name, array in self.state.tensors().items()}

    def skip_slot_write(self) -> None:
        """Let the next token leave the tables of slots as they are."""
        self.state.skip_slot_write()

    def copy(self) -> "EngineRows":
        """Rows that go on by themselves, read by the same engine."""
        return EngineRows(self.state.copy(), self.engine)


def cache_of(state: EngineState) -> DyadCache:
    """The state of the engine as `past_key_values` of the model; it moves on by itself."""
    cache = DyadCache()
    if not state.is_empty:
        cache._set(EngineRows(state).tensors(), state.shape.layers)
        cache.columns_seen = state.columns_seen
    return cache


class Decoder:
    """The engine of one torch model, with a copy of its weights. version: of what the copy was made of."""

    def __init__(self, model: DyadForCausalLM, version: object = None):
        self.version = version_of(model) if version is None else version
        named = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        named = {name: array for name, array in named.items() if not name.startswith("companions.")}
        self.engine = Engine(model.config.to_dict(), named)

    def step(self, tokens: Sequence[int], cache: DyadCache) -> Tensor:
        """Read one token a row; the cache moves on. Returns logits (B, 1, V) float32.

        Raises:
            IndexError: a token outside the vocabulary, as the embedding of torch raises it.
        """
        if not isinstance(cache.rows, EngineRows) or cache.rows.engine is not self.engine:
            array = once(lambda tensor: tensor.detach().numpy())
            tensors = {name: array(tensor) for name, tensor in cache.tensors().items()}
            cache.hand_over(EngineRows(self.engine.state_from(tensors, cache.columns_seen), self.engine))
        held = cache.rows
        assert isinstance(held, EngineRows)
        logits = self.engine.step_rows(held.state, tokens)
        cache.columns_seen += 1
        return torch.from_numpy(logits)[:, None]


def version_of(model: DyadForCausalLM) -> tuple[Any, ...]:
    """What changes with a weight, a buffer or the configuration, in whatever way it was written to.

    Reading all weights once takes about as long as decoding a token.
    """
    sums = tuple(_checksum(tensor) for tensor in model.state_dict().values())
    return (sums, json.dumps(model.config.to_dict(), sort_keys=True, default=str))


def _checksum(tensor: Tensor) -> tuple[Any, ...]:
    """Of shape, dtype and bits; eight bytes are added at once."""
    bits = tensor.detach().contiguous().reshape(-1).numpy().view(np.uint8)
    whole = len(bits) // 8 * 8
    return (*tensor.shape, tensor.dtype, int(bits[:whole].view(np.int64).sum()), bits[whole:].tobytes())


# Modules of these packages compute what the engine does in their place; all others are asked themselves.
KNOWN_MODULES = ("dyadlm.model.", "torch.nn.modules.")
EXPECTED_FAULTS = (UserError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


def refusal(model: DyadForCausalLM) -> str | None:
    """Why the engine cannot decode for a model, as the end of a sentence; None if it can."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"its weights are on {model.device}"
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
        return "its weights are not in float32"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "hooks watch all modules"
    beside = set(model.companions.modules())
    for module in model.modules():
        if module in beside:
            continue
        kind = type(module)
        if kind.__module__.startswith("peft."):
            return "adapters are attached to it"
        if module.training:
            return "it is in training mode"
        if module._forward_hooks or module._forward_pre_hooks:
            return "hooks watch its modules"
        if "forward" in vars(module) or not f"{kind.__module__}.".startswith(KNOWN_MODULES):
            return f"a module of it is not of its own kind ({kind.__module__}.{kind.__name__})"
    boundaries = model.model.boundaries
    if boundaries is not None and not boundaries.known and not boundaries.marks.any():
        return "its rules have not been given the text of the tokens"
    return unsupported(model.config.to_dict())


def decoder_of(model: DyadForCausalLM) -> Decoder | None:
    """What decodes for a model as its weights are now; None, with the reason in the log, where the engine cannot."""
    kept: Decoder | None = None
    try:
        reason = refusal(model)
        if reason is None:
            version = version_of(model)
            kept = model.__dict__.get("_kept_decoder")
            if kept is None or kept.version != version:
                kept = Decoder(model, version)
    except (*EXPECTED_FAULTS, RunFailed) as error:
        reason, kept = f"it cannot be copied ({error})", None
    if kept is None:
        log.info("Tokens are decoded by torch, since %s.", reason)
        model.__dict__.pop("_kept_decoder", None)  # its weights need not be kept for nothing
    else:
        model.__dict__["_kept_decoder"] = kept
    return kept


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """While this is open, single tokens of a dyadlm model are read by the engine, where it supports the model.

    It holds for this thread (or task) alone, and where gradients are off. The log `dyadlm.engine` says why the engine
    does not serve, if it does not. Any other model is left as it is.
    """
    if not isinstance(model, DyadForCausalLM):
        yield
        return
    token = FAST_DECODER.set((model, decoder_of(model)))
    try:
        yield
    finally:
        FAST_DECODER.reset(token)
