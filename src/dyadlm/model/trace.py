"""The only way by which probes and pictures look inside a model, and silence parts of it.

Everything here reads a text from a fresh state, without gradient, and leaves the model as it was.

Dimension letters: B batch, T time, L layers, K levels, F numbers of a feature.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dyadlm.model.block import DyadBlock
from dyadlm.model.boundaries import TextState
from dyadlm.model.cache import BlockState
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


class BlockTrace(NamedTuple):
    """What one block read, and what its levels found in it."""

    block: DyadBlock
    read: Tensor  # (B, T, D), the normalised hidden state with the identity channel
    levels: LevelFeatures
    layout: ChunkLayout


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
    inner, config = model.model, model.config
    embedded, (clock, segments, contexts, ngrams) = inner.embed_tokens(ids), _read_afresh(model, ids)
    if inner.ngrams is not None:
        embedded = embedded + inner.ngrams(ngrams)
    layout = chunk_layout(clock, segments, inner.progress, config, embedded.dtype)
    outputs, _, _ = inner.stack(embedded, clock, segments, contexts, [BlockState()] * len(inner.layers), keep=False)
    identity = inner.identity_norm(embedded)
    shared: LevelFeatures | None = None
    if config.tower == "input":  # one tower reads for all blocks
        first = cast(DyadBlock, inner.layers[0])
        shared, _ = first.tower.read_levels(identity, layout, BlockState())
    for layer, hidden in zip(inner.layers, outputs[:-1], strict=True):
        block = cast(DyadBlock, layer)
        read = block.tower_norm(hidden) + block.tower_identity * identity
        levels = shared if shared is not None else block.tower.read_levels(read, layout, BlockState())[0]
        yield BlockTrace(block, read, levels, layout)


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
    lengths = []
    for trace in trace_blocks(model, ids.view(1, -1)):
        tower, layout = trace.block.tower, trace.layout
        each = torch.stack(tower.weighted_levels(trace.read, trace.levels.features, layout), -1)
        lengths.append((tower.output_gate(trace.read, layout)[..., None] * each).norm(dim=2)[0].T)
    return torch.stack(lengths)


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
