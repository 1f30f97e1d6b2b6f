"""How the planner and the blocks of a model work together: what forecasters read, and the plan at each token.

Dimension letters: B batch, T time, S semantic levels, V vocabulary, D width.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dyadlm.model.block import BlockAux, DyadBlock
from dyadlm.model.boundaries import LEARNED
from dyadlm.model.cache import PlannerState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.extras.planner import Forecasters, Forecasts, Plan, Planner
from dyadlm.model.linear import effective_weight
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import Clock
from dyadlm.ops.consensus import consensus
from dyadlm.ops.segments import SegmentPlan
from dyadlm.ops.selection import by_head

if TYPE_CHECKING:
    from dyadlm.model.modeling import DyadForCausalLM, DyadModel


@torch.no_grad()
def level_values(model: "DyadModel", embedded: Tensor, hidden: Tensor) -> Tensor:
    """What tokens are to the last block's levels: embedded, and the block's input, (..., D) → (..., ranks)."""
    heard, last = model.identity_norm(embedded), cast(DyadBlock, model.layers[-1])
    tower = last.tower
    if model.config.tower == "input":
        tower = cast(DyadBlock, model.layers[0]).tower
    else:
        heard = last.tower_norm(hidden) + last.tower_identity * heard
    return torch.cat(tower.through_bottlenecks(heard, range(len(model.config.ranks))), -1)


@torch.no_grad()
def level_meaning(model: "DyadModel", tokens: Tensor) -> Tensor:
    """What tokens (...) are to the last block's levels while nothing is known of their past: (..., ranks)."""
    embedded = model.embed_tokens(tokens)
    return level_values(model, embedded, embedded)


def imagine(model: "DyadModel", embedded: Tensor, outlook: Forecasts) -> Tensor:
    """What the last block makes of expected tokens (B, T, D) if its levels move on as forecast: (B, T, D)."""
    block, identity = cast(DyadBlock, model.layers[-1]), model.identity_norm(embedded)
    read = block.tower_norm(embedded) + block.tower_identity * identity
    hidden = embedded + _imagined_levels(block.tower, read, outlook)
    return hidden + block.mlp(block.mlp_norm(hidden) + block.mlp_identity * identity)


def _imagined_levels(tower: Tower, x: Tensor, outlook: Forecasts) -> Tensor:
    """The sum of the levels, output gate included, if at every token they held the nodes that are forecast: (B, T, D).

    All that belongs to one position is as it is; the gate knows no ages here.
    """
    weights = tower.token_weights() | {k: effective_weight(tower.up_nodes[str(k)]) for k in tower.node_levels}
    known = torch.ones_like(x[..., :1], dtype=torch.bool)
    written = torch.zeros_like(x)
    nodes = (part.split(tower.ranks, -1) for part in (outlook.forecast.detach(), outlook.last, outlook.previous))
    for k, (now, before, earlier) in enumerate(zip(*nodes, strict=True)):
        if k < len(tower.alignments):
            feature = tower.feature(k, now, before, known, x.dtype)
        else:
            feature = tower.segment_feature(k, now, before, earlier, known, x.dtype)
        update = nn.functional.linear(feature, weights[k])
        routes = outlook.routes
        written = written + (update if routes is None else by_head(update, routes[..., k] * routes.shape[-1]))
    return nn.functional.silu(tower.gate(x)) * written


class ModelForecasters(Forecasters):
    """The forecasters of a model, which read its last block."""

    def after_chunk(
        self,
        model: "DyadModel",
        read: tuple[Tensor, Tensor],
        segments: SegmentPlan | None,
        last: BlockAux,
        clock: Clock,
        state: PlannerState,
        wanted: bool,
    ) -> tuple[Forecasts | None, PlannerState]:
        """The forecasts after a chunk, if they are wanted, and what the forecasters remember.

        read: the embedded tokens (B, T, D) and the input of the last block. last: what this block gave besides.
        """
        values, begins = level_values(model, *read), semantic_begins(model.config, segments, last.boundary)
        found: tuple[Forecasts | None, PlannerState] = self(values, begins, clock, state, wanted, last.routes)
        return found


class ModelPlanner(Planner):
    """The planner of a model, which gives its logits a consensus and makes its plan."""

    def with_plan(
        self,
        model: "DyadForCausalLM",
        hidden: Tensor,
        logits: Tensor,
        outlook: Forecasts,
        keep: slice | Tensor,
        mass: float,
    ) -> tuple[Tensor, Plan]:
        """Logits (B, T, V) and the plan at the positions that are kept; with `mass`, the consensus of both.

        hidden: (B, T, D), at those positions. outlook: at all positions.
        """
        plan = draw_plan(model, hidden, logits, outlook.each(lambda part: part[:, keep]))._replace(outlook=outlook)
        if not mass and plan.weight is None:
            return logits, plan
        weight = 1.0 if plan.weight is None else plan.weight
        if mass:
            pool = consensus(logits, plan.artist, mass, weight)
            return pool, plan._replace(pool=pool)
        # What the weight learns from: the pool as it will be used. Nothing else learns from it.
        pool = consensus(logits.detach(), plan.artist.detach(), model.config.consensus or 1.0, weight)
        return logits, plan._replace(pool=pool)


def semantic_begins(config: DyadConfig, segments: SegmentPlan | None, learned: Tensor | None) -> Tensor | None:
    """Where segments begin (B, T, S) bool, in the order of the semantic levels; None without any.

    learned: (B, T) bool, of the learned boundary.
    """
    by_rule = iter(() if segments is None else segments.begins.unbind(-1))
    names = config.semantic_levels or ()
    columns = [learned if name == LEARNED else next(by_rule) for name in names]
    return torch.stack(cast(list[Tensor], columns), -1) if columns else None


def draw_plan(model: "DyadForCausalLM", hidden: Tensor, engineer: Tensor, outlook: Forecasts) -> Plan:
    """The plan at some tokens: hidden (B, T, D), the engineer's logits (B, T, V), and the outlook there."""
    planner, forecasters = model.planner, model.model.forecasters
    assert planner is not None
    assert forecasters is not None
    embed, forecast = model.model.embed_tokens, outlook.forecast.detach().to(hidden.dtype)
    if planner.proposal is not None:
        proposed = planner.propose(hidden, forecast)
    else:
        # At first all tokens are expected alike; so small a mean would have a huge gradient through the norms.
        expected = (engineer.detach().softmax(-1) @ embed.weight.detach()).to(hidden.dtype)
        proposed = planner.norm(imagine(model.model, expected, outlook))
    proposal = model.lm_head(proposed)
    futures = proposal.detach().topk(planner.futures, -1).indices
    near = forecast[..., None, :]
    supposed = planner.suppose(near, level_meaning(model.model, futures))
    far = forecasters.again(outlook.memory[..., None, :], supposed).to(hidden.dtype)
    said = model.lm_head(planner.artist(near, far, embed(futures), hidden[..., None, :]))
    choice = planner.choose(engineer, proposal, futures, said, model.config.consensus or 1.0)
    far, artist = (
        part.gather(2, choice[..., None, None].expand(-1, -1, 1, part.shape[-1])).squeeze(2) for part in (far, said)
    )
    return Plan(outlook, proposal, futures, choice, far, artist, planner.believe(hidden))
