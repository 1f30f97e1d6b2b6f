"""What a model will cost, from its configuration alone. Tests assert each figure equal to the real model's.

Each part of a model counts itself (`cost`); here the model is built without weights, and the costs are added up.

Dimension letters: T time, V vocabulary, D width.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dyadlm.errors import UserError
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.cost import Cost
from dyadlm.model.slots import plans_alike, tag_integers


def parameters(config: DyadConfig) -> int:
    """Trainable numbers, tied weights counted once."""
    return sum(weight.numel() for weight in _model(config).parameters())


def training_flops_per_token(config: DyadConfig, sequence_length: int) -> float:
    """Floating-point operations of the matrix products of one training step, forward and backward, per token.

    A multiplication and an addition count as two. The pyramid's additions, T log T in number, are not products and are
    not counted; they are a few hundredths of it. Of what trains beside a model, only the losses of a planner are
    counted, without a teacher.
    """
    cost = _cost(config, sequence_length, planning=True)
    return 2 * (3 * cost.products - cost.fixed) / sequence_length


def forward_flops(config: DyadConfig, sequence_length: int) -> int:
    """Floating-point operations of the matrix products over one sequence from a fresh start.

    One token on its own costs less than that where a selector leaves out levels. The plan is counted where there is
    consensus; the state of a planner goes on in any case.
    """
    return 2 * _cost(config, sequence_length, planning=bool(config.consensus)).products


def state_bytes(config: DyadConfig, bytes_per_number: int = 4) -> int:
    """Bytes of the streaming state of one row: constant in the number of tokens seen."""
    cost = _cost(config, 1, planning=False)
    return cost.numbers * bytes_per_number + cost.halves * 2 + cost.integers * 8 + cost.flags


def activation_bytes(
    config: DyadConfig, windows: int, sequence_length: int, bfloat16: bool = True, recomputed: bool = False
) -> int:
    """Bytes that the forward pass of a training step keeps for the backward pass: what autograd saves of a pass over
    `windows` rows of `sequence_length` tokens whose tensors have shapes and no numbers.

    bfloat16: under autocast; else float32. recomputed: with gradient checkpointing, which keeps the inputs of the
    blocks and, in the backward pass, all of one block at a time. Buffers that operators use for a moment are not
    counted.

    Raises:
        UserError: what the model computes depends on numbers, as with a selector that leaves out levels.
    """
    whole = _saved_bytes(config, windows, sequence_length, bfloat16, False)
    if not recomputed:
        return whole
    outside = _saved_bytes(config, windows, sequence_length, bfloat16, True)
    inputs = config.num_hidden_layers * windows * sequence_length * config.hidden_size * 4
    return outside + inputs + (whole - outside) // config.num_hidden_layers


def _saved_bytes(config: DyadConfig, windows: int, sequence_length: int, bfloat16: bool, outside: bool) -> int:
    """What autograd saves, each piece of memory once. outside: of what stands outside the blocks alone."""
    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(), _untold():
        model = DyadForCausalLM(config).train()
        if outside:  # inside of a checkpoint, its own hooks stand in front of these
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        if model.model.boundaries is not None:
            model.model.boundaries.known = True  # tokens without numbers need no text
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        ids = torch.zeros(windows, sequence_length, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            try:
                model(input_ids=ids, labels=ids, use_cache=False)
            except DataDependentOutputException as error:
                message = "What this model computes depends on its numbers (selector), so memory cannot be counted."
                raise UserError(f"{message} Use --dry-run on the device.") from error
        return sum(storage.nbytes() for storage in saved.values())


@contextmanager
def _untold() -> Iterator[None]:
    """Sizes that cannot be counted raise an error, which torch logs with a traceback, too."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _cost(config: DyadConfig, time: int, planning: bool) -> Cost:
    """Of the whole model. planning: whether a plan is made at each token, where there is a planner."""
    model = _model(config)
    parts = [Cost(time * config.hidden_size * config.vocab_size), _text_cost(config)]
    parts += [layer.cost(time) for layer in model.model.layers]
    if model.model.ngrams is not None:
        parts.append(model.model.ngrams.cost(time))
    if model.model.forecasters is not None:
        parts.append(model.model.forecasters.cost(time))
    if model.planner is not None and planning:
        parts.append(model.planner.cost(time))
    return Cost().plus(*parts)


def _text_cost(config: DyadConfig) -> Cost:
    """Position, marks and counts of the rules, the tokens that contexts and n-grams need, and the tags of slots, where
    all blocks share them."""
    contexts = config.text_contexts
    longest = max((context for context in contexts if isinstance(context, int)), default=1)
    ruled = len(config.rules) - config.word_apart
    integers = 1 + 2 * ruled + longest - 1 + 3 * ("word" in contexts)
    if config.slot_contexts and config.slot_layers and plans_alike(config):
        integers += tag_integers(config)
    return Cost(integers=integers, flags=2 * len(config.rules))


def _model(config: DyadConfig) -> DyadForCausalLM:
    return _built(config.to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _built(fields: str) -> DyadForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return DyadForCausalLM(DyadConfig(**json.loads(fields)))
