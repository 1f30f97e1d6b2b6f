"""The only way by which probes and pictures look inside a model, and silence parts of it.

Everything here reads without gradient and leaves the model as it was; all but `read_on` read from a fresh state.

Dimension letters: B batch, T time, L layers, K levels, F numbers of a feature, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dyadlm.model.block import DyadBlock
from dyadlm.model.boundaries import LEARNED, TextState
from dyadlm.model.cache import BlockState, DyadCache, carried_by
from dyadlm.model.layout import ChunkLayout, chunk_layout
from dyadlm.model.levels import LevelFeatures
from dyadlm.model.modeling import DyadForCausalLM
from dyadlm.model.slots import plan_slots, plans_alike
from dyadlm.model.text import read_text
from dyadlm.model.tower import Tower
from dyadlm.ops.blocks import broadcast
from dyadlm.ops.clock import Clock, make_clock
from dyadlm.ops.contexts import Contexts
from dyadlm.ops.segments import SegmentPlan
from dyadlm.ops.slots import SlotLookup, SlotState


class BlockTrace(NamedTuple):
    """What one block read, and what its levels found in it."""

    block: DyadBlock
    read: Tensor  # (B, T, D), the normalised hidden state with the identity channel
    levels: LevelFeatures
    layout: ChunkLayout
    state: BlockState  # before the text


class ChunkTrace(NamedTuple):
    """What a model found in T tokens that it read on from a state."""

    logits: Tensor  # (T, V) after each token
    contributions: Tensor  # (L, K, T), as of `level_contributions`
    begins: dict[
        str, Tensor
    ]  # by semantic level, (T,) bool: where a segment begins; if learned, that of the first block
    slots: SlotLookup | None  # the plan of one row; None without slots, or where more than the tokens decides


def _read_afresh(
    model: DyadForCausalLM, ids: Tensor
) -> tuple[Clock, SegmentPlan | None, Contexts | None, Tensor | None]:
    """The clock of texts (B, T) that begin here, and what is read off their tokens."""
    clock = make_clock(*ids.shape, device=ids.device)
    segments, contexts, ngrams, _ = read_text(model.model, ids, None, clock, TextState())
    return clock, segments, contexts, ngrams


@torch.no_grad()
def trace_blocks(model: DyadForCausalLM, ids: Tensor) -> Iterator[BlockTrace]:
    """The trace of each block for texts (B, T) int64."""
    was_training = model.training
    model.train(False)  # nothing is dropped out of what is looked at
    try:
        yield from _trace_blocks(model, ids)
    finally:
        model.train(was_training)


def _trace_blocks(model: DyadForCausalLM, ids: Tensor) -> Iterator[BlockTrace]:
    inner = model.model
    embedded, (clock, segments, contexts, ngrams) = inner.embed_tokens(ids), _read_afresh(model, ids)
    if inner.ngrams is not None:
        embedded = embedded + inner.ngrams(ngrams)
    layout = chunk_layout(clock, segments, inner.progress, model.config, embedded.dtype)
    states = [BlockState()] * len(inner.layers)
    outputs, _, _ = inner.stack(embedded, clock, segments, contexts, states, keep=False)
    yield from _blocks(model, outputs, layout, states)


def _blocks(
    model: DyadForCausalLM, outputs: Sequence[Tensor], layout: ChunkLayout, states: Sequence[BlockState]
) -> Iterator[BlockTrace]:
    """outputs: the embedding and what each block returned, (B, T, D). states: before the chunk."""
    inner = model.model
    identity = inner.identity_norm(outputs[0])
    shared: LevelFeatures | None = None
    if model.config.tower == "input":  # one tower reads for all blocks
        first = cast(DyadBlock, inner.layers[0])
        shared, _ = first.tower.read_levels(identity, layout, states[0])
    for layer, hidden, state in zip(inner.layers, outputs[:-1], states, strict=True):
        block = cast(DyadBlock, layer)
        read, _ = block.tower_input(hidden, identity, layout.clock, state)
        levels = shared if shared is not None else block.tower.read_levels(read, layout, state)[0]
        yield BlockTrace(block, read, levels, layout, state)


def at_tokens(trace: BlockTrace) -> dict[int, Tensor]:
    """The features of all levels at every token: (B, T, F R) each."""
    tower, layout, found = trace.block.tower, trace.layout, {}
    for level, feature in sorted(trace.levels.features.items()):
        j = tower.node_levels.get(level)
        found[level] = feature if j is None else broadcast(feature, layout.nodes[j], j, layout.clock)
    return found


@torch.no_grad()
def level_features(model: DyadForCausalLM, ids: Tensor) -> list[dict[int, Tensor]]:
    """The feature of each level at each token of texts (B, T) int64: by block that reads levels, by level,
    (B, T, F)."""
    found = []
    for trace in trace_blocks(model, ids):
        found.append(at_tokens(trace))
        if model.config.tower == "input":  # the other blocks use the features of this one
            break
    return found


@torch.no_grad()
def level_contributions(model: DyadForCausalLM, ids: Tensor) -> Tensor:
    """The length of what each level adds to the residual stream at each token, output gate included.

    Args:
        ids: (T,) or (1, T) int64.

    Returns:
        (L, K, T) float.

    Raises:
        ValueError: several texts.
    """
    if ids.dim() > 2 or (ids.dim() == 2 and len(ids) > 1):
        raise ValueError(f"Levels are told of one text at a time, not of {tuple(ids.shape)}.")
    return torch.stack([_lengths(trace) for trace in trace_blocks(model, ids.view(1, -1))])


def _lengths(trace: BlockTrace) -> Tensor:
    """Of what each level of a block adds, for the first row: (K, T)."""
    tower, layout = trace.block.tower, trace.layout
    each = torch.stack(tower.weighted_levels(trace.read, trace.levels.features, layout, trace.state.held), -1)
    return (tower.output_gate(trace.read, layout)[..., None] * each).norm(dim=2)[0].T


def _planned(
    model: DyadForCausalLM, ids: Tensor, cache: DyadCache
) -> tuple[Clock, SegmentPlan | None, SlotLookup | None]:
    """The clock and the plans of a chunk (1, T) before it is read."""
    config = model.config
    states, text, _ = carried_by(cache, len(model.model.layers))
    clock = make_clock(*ids.shape, position=cache.position, device=ids.device)
    segments, contexts, _, _ = read_text(model.model, ids, None, clock, text)
    if contexts is None or not config.slot_contexts or not config.slot_layers or not plans_alike(config):
        return clock, segments, None
    tables = states[config.slot_layers[0]].slots
    slots = plan_slots(contexts, clock, config, SlotState(*tables) if tables else None)
    _ = slots.survivors  # now: a pass over one token writes into the tables that the plan looks at
    return clock, segments, slots


@torch.no_grad()
def pass_over(model: DyadForCausalLM, ids: Tensor, cache: DyadCache) -> tuple[Tensor, SlotLookup | None]:
    """Read a chunk as `read_on` does, but look at nothing; the logits (V,) after it, and the plan of its slots."""
    slots = _planned(model, ids, cache)[2]
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
    return output.logits[0, -1], slots


@torch.no_grad()
def read_on(model: DyadForCausalLM, ids: Tensor, cache: DyadCache) -> ChunkTrace:
    """Read a chunk and say what was found in it. Chunks of any size give the same.

    Args:
        model: in evaluation mode.
        ids: (1, T) int64, T > 0.
        cache: of one row, or empty; it moves on.
    """
    inner, config = model.model, model.config
    states, _, _ = carried_by(cache, len(inner.layers))
    clock, segments, slots = _planned(model, ids, cache)
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, output_hidden_states=True, return_dict=True)
    outputs = output.hidden_states
    layout = chunk_layout(clock, segments, inner.progress, config, outputs[0].dtype)
    traces = list(_blocks(model, outputs, layout, states))
    names = [name for name in config.semantic_levels or () if name != LEARNED]
    begins = {} if segments is None else dict(zip(names, segments.begins[0].unbind(-1), strict=True))
    if traces[0].levels.boundary is not None:
        begins[LEARNED] = traces[0].levels.boundary[0]
    return ChunkTrace(output.logits[0], torch.stack([_lengths(trace) for trace in traces]), begins, slots)


@torch.no_grad()
def slot_hits(model: DyadForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """By context, where slots hold it: (B, T) bool for texts (B, T) int64.

    Empty for a model without slots, and where more than the tokens decides what is written.
    """
    config = model.config
    if not config.slot_contexts or not config.slot_layers or not plans_alike(config):
        return {}
    clock, _, contexts, _ = _read_afresh(model, ids)
    assert contexts is not None
    found = plan_slots(contexts, clock, config, None).found
    return {str(context): hit for context, hit in zip(config.slot_contexts, found.unbind(-1), strict=True)}


@torch.no_grad()
def ngram_shares(model: DyadForCausalLM, ids: Tensor) -> Tensor | None:
    """The length of what n-grams add to the embedding, over that of the embedding of the token: (B, T) for texts
    (B, T) int64; None for a model without n-grams."""
    inner = model.model
    if inner.ngrams is None:
        return None
    rows = _read_afresh(model, ids)[3]
    return cast(Tensor, inner.ngrams(rows).norm(dim=-1) / inner.embed_tokens(ids).norm(dim=-1).clamp(min=1e-12))


@torch.no_grad()
def without_level(model: DyadForCausalLM, level: int) -> DyadForCausalLM:
    """A copy of the model in which one level adds nothing: its up-projections are zero in every block.

    Raises:
        ValueError: there is no such level.
    """
    if not 0 <= level < len(model.config.ranks):
        raise ValueError(f"There is no level {level}; the model has {len(model.config.ranks)}.")
    copied = deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Tower):
            if level in module.node_levels:
                cast(nn.Linear, module.up_nodes[str(level)]).weight.zero_()
            else:
                assert module.up_tokens is not None
                at = module.token_levels.index(level)
                module.up_tokens.weight.split(module.token_widths, 1)[at].zero_()
    return copied
