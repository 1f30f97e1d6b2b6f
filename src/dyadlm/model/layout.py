"""The places of windows, nodes and segments in a chunk, computed once for all blocks.

Dimension letters: B batch, T time.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm import kernels
from dyadlm.model.configuration import DyadConfig
from dyadlm.ops.blocks import Nodes, granularity, tree_nodes
from dyadlm.ops.centroids import Shares, level_shares
from dyadlm.ops.clock import Clock
from dyadlm.ops.segments import SegmentPlan, segment_ends


class ChunkLayout(NamedTuple):
    """The places of windows, nodes and segments in a chunk."""

    clock: Clock
    nodes: list[Nodes]  # of each level of the block tree
    shares: list[Shares]  # of each level of the pyramid
    segments: SegmentPlan | None  # of the semantic levels that follow rules
    ages: Tensor  # (B or 1, T, ages): how far past its last node, or into its segment, each level is
    progress: Tensor  # 0-dim: how far training is, from 0 to 1
    keep: bool  # whether the state after the chunk is wanted
    segment_ends: Tensor | None  # (B, T, S) int64, of `segments`; None where no kernel asks for it


def chunk_layout(
    clock: Clock,
    segments: SegmentPlan | None,
    progress: Tensor,
    config: DyadConfig,
    dtype: torch.dtype,
    keep: bool = True,
) -> ChunkLayout:
    """The layout of a chunk for a model whose hidden states have `dtype`."""
    alignments = config.alignments
    changes = [granularity(k, a) for k, a in enumerate(alignments) if a != "sliding"]
    nodes = tree_nodes(clock, max(changes, default=-1))
    sums = torch.promote_types(dtype, torch.float32)
    shares = [level_shares(k, a, clock, nodes, config.early, sums) for k, a in enumerate(alignments)]
    index = clock.index[:1] if clock.fresh else clock.index
    # Filled on the device: a tensor of a list would wait for a copy from the host.
    period = torch.cat([index.new_full((1,), 2**change) for change in changes] or [index.new_empty(0)])
    angle = (index[..., None] + 1) % period * (2 * math.pi / period)
    ages = torch.cat([angle.sin(), angle.cos()], -1)
    if segments is not None:
        into = segments.length.to(ages.dtype).log2() / math.log2(config.longest_segment)
        ages = torch.cat([ages.expand(into.shape[0], -1, -1), into], -1)
    ends = None if segments is None or keep or not kernels.usable(progress) else segment_ends(segments.begins)
    return ChunkLayout(clock, nodes, shares, segments, ages.to(dtype), progress, keep, ends)
