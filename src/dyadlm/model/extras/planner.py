"""The planner: forecasts of what each level will say next, a guess at the token after next, and an artist who chooses.

The engineer, the stack of blocks, knows the past and says what may come next. Beside it

1. every level of the last block has a forecaster, a recurrence over the level's own complete nodes, that foresees the
   next one. Trained by squared error, a forecast is the mean over all continuations that make sense;
2. given the forecasts, the engineer proposes the token after next. Each proposal is a hypothesis: the forecasters take
   one step on it and foresee the nodes after next;
3. the artist reads that picture of the future, far levels first, near ones last, and says which next token leads there;
4. consensus (`dyadlm.ops.consensus`): the engineer says what is allowed, the artist what is best.

All of it is causal, and all but the forecasters' recurrence belongs to one position: nothing else is carried. Forecasts
are learned from what came and from nothing else: no gradient flows through them into the levels, nor back from those
who use them. Otherwise levels would learn to say what is easily foretold, and forecasts to be messages for the artist.

Dimension letters: B batch, T time, M futures, V vocabulary, D width, K levels, C ranks of all levels together,
H heads of a selector, W numbers that a level's recurrence keeps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.cache import PlannerState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost, tile_products
from dyadlm.model.linear import effective_weight
from dyadlm.ops.consensus import nucleus
from dyadlm.ops.pyramid import Clock, accumulator
from dyadlm.ops.recurrence import linear_scan
from dyadlm.ops.segments import SegmentCount, SegmentState, segment_plan, segment_sums, segment_windows, spread

LEAST = 1e-8  # added to squared errors, for nodes that do not change at all
LEAST_CHANGE = 0.01  # of the squares of nodes: by how much persistence is taken to be wrong at least
WORST = 10.0  # by how many times forecasts are taken to be worse than persistence at most
SEMANTIC_SHARE = 1 / 8  # of a segment, what one token is taken for at first


class Forecasts(NamedTuple):
    """What is known of the levels' nodes at each token, and foreseen. Only `forecast` and `expected` have gradients."""

    forecast: Tensor  # (B, T, C) of the next node that will be complete
    last: Tensor  # (B, T, C) the last complete node of the document; zero if there is none
    previous: Tensor  # (B, T, C) the one before it
    memory: Tensor  # (B, T, K W) what the recurrences hold
    complete: Tensor  # (B, T, K) bool: `last` became complete, or known to be, at this token
    judged: Tensor  # (B, T, K) bool: and it had been forecast, for there was a node before it
    expected: Tensor  # (B, T, C) what `last` had been forecast to be; zero where not judged
    values: Tensor  # (B, T, C) what each token is to the levels: nodes are means of these
    begins: Tensor  # (B, T, K) bool: where the levels' nodes begin
    routes: Tensor | None  # (B, T, H, K) of the last block, if it selects

    def each(self, function: Callable[[Tensor], Tensor]) -> "Forecasts":
        """The outlook with a function applied to every part."""
        return Forecasts(*cast(tuple[Tensor, ...], tuple(None if part is None else function(part) for part in self)))


class ForecastErrors(NamedTuple):
    """Of each level, squared errors summed over all nodes that were judged, (K,) each; zero where none was."""

    missed: Tensor  # of forecasts, which alone have a gradient
    stayed: Tensor  # of persistence: that the next node is the last once more
    size: Tensor  # of expecting nothing at all: the squares of the nodes themselves

    def skills(self) -> Tensor:
        """(K,): one less the error of forecasts over that of persistence; 0 where nothing was judged."""
        return 1 - (self.missed + LEAST) / (self.stayed + LEAST)

    def cost(self) -> Tensor:
        """What forecasts learn from: the error over that of persistence, a mean over the levels that were judged; 0 if
        none was.

        In text that repeats one token nothing changes, and what persistence misses is next to nothing. So it counts as
        wrong by at least `LEAST_CHANGE` of the nodes, and forecasts as worse at most `WORST` times, with the gradient
        scaled down alike. Ordinary text comes to neither.
        """
        floor = torch.maximum(LEAST_CHANGE * self.size, self.missed.detach() / WORST)
        relative = (self.missed + LEAST) / (torch.maximum(self.stayed, floor) + LEAST)
        judged = self.size > 0
        return (relative * judged).sum() / judged.sum().clamp(min=1)


def forecast_errors(outlook: Forecasts, ranks: Sequence[int]) -> ForecastErrors:
    """The errors of a whole pass."""
    guesses = (outlook.expected, outlook.previous, torch.zeros_like(outlook.last))
    return ForecastErrors(*(_errors(guess, outlook, ranks).sum((0, 1)) for guess in guesses))


def node_errors(outlook: Forecasts, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, T, K) each: how far forecasts lay from what came, and how far what stood before, squared; 0 if not judged."""
    return _errors(outlook.expected, outlook, ranks), _errors(outlook.previous, outlook, ranks)


def _errors(guess: Tensor, outlook: Forecasts, ranks: Sequence[int]) -> Tensor:
    """(B, T, K): how far guesses (B, T, C) lay from what came, squared; 0 if not judged."""
    squares = (guess - outlook.last).square() * spread(outlook.judged, ranks)
    return torch.stack([part.sum(-1) for part in squares.split(list(ranks), -1)], -1)


class Plan(NamedTuple):
    """What a model that plans thinks at each token that gets logits."""

    outlook: Forecasts  # at all tokens
    proposal: Tensor  # (B, T, V) logits of the token after next
    futures: Tensor  # (B, T, M) int64, tokens after next that were considered
    choice: Tensor  # (B, T) int64, which of them the artist's future is
    far: Tensor  # (B, T, C) each level's node after next, in that future
    artist: Tensor  # (B, T, V) logits of the next token, given that future
    weight: Tensor | None  # (B, T) how far the artist is believed, where that is learned
    pool: Tensor | None = None  # (B, T, V) log-probabilities of the consensus, where it is asked for or learned


class GatedUnit(nn.Module):
    """down(silu(gate x) * up x), from any width to any other."""

    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.gate = nn.Linear(inputs, inner, bias=False)
        self.up = nn.Linear(inputs, inner, bias=False)
        self.down = nn.Linear(inner, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _unit_products(unit: GatedUnit) -> int:
    """Products for one vector."""
    return 2 * unit.gate.in_features * unit.gate.out_features + unit.down.in_features * unit.down.out_features


class Forecasters(nn.Module):
    """One recurrence for each level, geometric and then semantic, that sees the complete nodes of this level alone.

    A node is the mean of what its tokens are to the level. At level k of the geometric ones nodes are blocks of 2^k
    tokens, complete with their last; at a semantic level they are segments, complete when the next begins. When node v
    is complete, h = (1 - g) h + g c with g and c read off v (minGRU, arXiv 2410.01201); from then on v + W h is
    foreseen. W starts at zero: at first things are expected to stay as they are.
    """

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.ranks, self.width, self.longest = config.ranks, config.planner_width, config.longest_segment
        self.hidden = config.hidden_size
        self.geometric = len(config.alignments)
        self.entries = nn.ModuleList(nn.Linear(rank, 2 * self.width, bias=False) for rank in self.ranks)
        self.exits = nn.ModuleList(nn.Linear(self.width, rank, bias=False) for rank in self.ranks)

    def initialize(self) -> None:
        """At first nothing is expected to change."""
        for linear in self.exits:
            init.zeros_(cast(nn.Linear, linear).weight)

    def forward(
        self,
        values: Tensor,
        begins: Tensor | None,
        clock: Clock,
        state: PlannerState,
        wanted: bool,
        routes: Tensor | None = None,
    ) -> tuple[Forecasts | None, PlannerState]:
        """The outlook of a chunk, and the state after it.

        Args:
            values: (B, T, C), without gradient.
            begins: (B, T, semantic levels) bool; None if there are none.
            wanted: whether the outlook is; if not, it is None and only the state goes on.
        """
        dtype, batch = values.dtype, values.shape[0]
        values = accumulator(values)
        steps = 2 ** torch.arange(self.geometric, device=values.device)
        boundary = clock.index[..., None] % steps == 0
        if begins is not None:
            boundary = torch.cat([boundary, begins], -1)
        counted = SegmentCount(*state.counts) if state.counts else None
        plan, counts = segment_plan(boundary, clock, self.longest, counted)
        nothing = values.new_zeros(batch, values.shape[-1])
        nodes = SegmentState(*state.nodes) if state.nodes else SegmentState(nothing, nothing, nothing)
        sums = segment_sums(values, self.ranks, plan, nodes.running)
        means = sums / spread(plan.length, self.ranks)
        open_means = nothing if counted is None else nodes.running / spread(counted.length.clamp(min=1), self.ranks)
        windows, nodes = segment_windows(means, sums, self.ranks, plan, clock, nodes, open_means)

        column = torch.arange(values.shape[1], device=values.device)[:, None]
        real = column < clock.length[:, None, None]
        full = (clock.index[..., None] + 1) % steps == 0
        before, begun = plan.complete[..., : self.geometric], plan.complete[..., self.geometric :]
        new = plan.begins[..., self.geometric :]
        complete = torch.cat([full, new & (begun >= 1)], -1) & real
        judged = torch.cat([full & (before >= 1), new & (begun >= 2)], -1) & real
        here = spread(torch.nn.functional.pad(full, (0, len(self.ranks) - self.geometric)), self.ranks)
        last = torch.where(here, windows.current, windows.last)
        previous = torch.where(here, windows.last, windows.earlier)

        gate, content = self.read(last.to(dtype), frozen=False)
        gate = gate * complete.repeat_interleave(self.width, -1)
        held = (real & (clock.index[..., None] == 0)).logical_not()  # of an earlier document nothing is
        old = state.memory[0] if state.memory else gate.new_zeros(batch, gate.shape[-1])
        memory = linear_scan((1 - gate) * held, gate * content, old)
        state = PlannerState(tuple(nodes), tuple(counts), (memory[:, -1],))
        if not wanted:
            return None, state
        forecast = last + self.change(memory.to(dtype), frozen=False)
        first = previous[:, :1] + self.change(old[:, None].to(dtype), frozen=False)
        expected = torch.cat([first, forecast[:, :-1]], 1) * spread(judged, self.ranks)
        outlook = Forecasts(forecast, last, previous, memory, complete, judged, expected, values, plan.begins, routes)
        return outlook, state

    def cost(self, time: int) -> Cost:
        """What carries on their memory: nodes, and what is read off them. Values of tokens have no gradient at all."""
        channels = sum(self.ranks)
        values = time * self.hidden * channels
        nodes = tile_products(time) * len(self.ranks) * max(self.ranks)
        read = time * 2 * self.width * channels
        # Three nodes of each level, what its recurrence keeps, and two counts.
        return Cost(
            values + nodes + read,
            2 * (values + nodes),
            numbers=3 * channels + len(self.ranks) * self.width,
            integers=2 * len(self.ranks),
        )

    def again(self, memory: Tensor, node: Tensor) -> Tensor:
        """What is foreseen after a node that is supposed: memory (..., K W), node (..., C) → (..., C).

        The gradient flows to the node alone.
        """
        gate, content = self.read(node, frozen=True)
        return node + self.change((memory.detach() * (1 - gate) + gate * content).to(node.dtype), frozen=True)

    def read(self, nodes: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
        """Gates and candidates (..., K W) of nodes (..., C). frozen: without gradient to the weights."""
        parts = zip(nodes.split(self.ranks, -1), _weights(self.entries, frozen), strict=True)
        pairs = [accumulator(nn.functional.linear(part, weight)).chunk(2, -1) for part, weight in parts]
        return torch.cat([gate for gate, _ in pairs], -1).sigmoid(), torch.cat([content for _, content in pairs], -1)

    def change(self, memory: Tensor, frozen: bool) -> Tensor:
        """By how much the next nodes are to differ: memory (..., K W) → (..., C)."""
        parts = zip(memory.split(self.width, -1), _weights(self.exits, frozen), strict=True)
        return accumulator(torch.cat([nn.functional.linear(part, weight) for part, weight in parts], -1))


def _weights(linears: nn.ModuleList, frozen: bool) -> list[Tensor]:
    weights = [effective_weight(linear) for linear in linears]
    return [weight.detach() for weight in weights] if frozen else weights


class Artist(nn.Module):
    """An inverted pyramid: it looks forward, from far to near, and says what comes before.

    Each level adds to the picture what its forecasts mean, given the picture so far; the proposed token comes last.
    """

    def __init__(self, config: DyadConfig):
        super().__init__()
        width, self.ranks = config.hidden_size, config.ranks
        geometric = len(config.alignments)  # segments first, then windows: each from the last named to the first
        self.order = [*reversed(range(geometric, len(self.ranks))), *reversed(range(geometric))]
        self.start = nn.Linear(width, width, bias=False) if config.artist_sees == "both" else None
        inner = config.planner_width
        self.levels = nn.ModuleList(GatedUnit(width + 2 * rank, inner, width) for rank in self.ranks)
        self.token = GatedUnit(2 * width, inner, width)
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, near: Tensor, far: Tensor, token: Tensor, seen: Tensor) -> Tensor:
        """The picture of a future, to be read by the head: (..., D).

        Args:
            near: (..., C) the next nodes. far: (..., C) those after them. token: (..., D) the token after next.
            seen: (..., D) the engineer's hidden state, looked at if the artist sees both.
        """
        nears, fars = near.split(self.ranks, -1), far.split(self.ranks, -1)
        picture = torch.zeros_like(token) if self.start is None else self.start(seen).expand_as(token)
        for level in self.order:
            view = torch.cat([_level(picture), nears[level].expand_as(fars[level]), fars[level]], -1)
            picture = picture + self.levels[level](view)
        return self.norm(picture + self.token(torch.cat([_level(picture), _level(token)], -1)))


def _level(x: Tensor) -> Tensor:
    """(..., D) at length sqrt D, zero staying zero."""
    return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class Planner(nn.Module):
    """Proposal, hypothesis and artist, at each position by itself; heads and embeddings are the model's."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        width = config.hidden_size
        self.config, self.futures = config, config.planner_futures
        self.proposal = None
        if config.planner == "head":
            self.proposal = GatedUnit(width + sum(config.ranks), width // 2, width)
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        # What part of the next node one proposed token stands for, as logits.
        self.share = nn.Parameter(torch.empty(len(config.ranks)))
        self.ranks, self.geometric = config.ranks, len(config.alignments)
        self.artist = Artist(config)
        self.belief = nn.Linear(width, 1) if config.pool == "learned" else None

    def initialize(self) -> None:
        """Shares as below, a proposal that adds nothing, and an artist who is not believed yet."""
        init.copy_(self.share, self.initial_shares())
        if self.belief is not None:
            init.zeros_(self.belief.weight)
            init.zeros_(self.belief.bias)
        if self.proposal is not None:
            init.zeros_(self.proposal.down.weight)

    def initial_shares(self) -> Tensor:
        """One token's part of a node: 2^-k of a window, half of one of two tokens, `SEMANTIC_SHARE` of a segment.

        Of the node that is the next token the token after it is no part, so level 0 begins with little, too.
        """
        shares = [SEMANTIC_SHARE if k == 0 or k >= self.geometric else 2.0**-k for k in range(len(self.ranks))]
        return torch.tensor(shares).logit()

    def cost(self, time: int) -> Cost:
        """Forecasts, proposal, hypotheses and artist over T tokens; forecasters on a hypothesis do not learn."""
        config = self.config
        width, keep, channels, vocabulary = config.hidden_size, config.planner_width, sum(self.ranks), config.vocab_size
        fixed = 0
        if self.proposal is not None:
            proposal = _unit_products(self.proposal)
        else:
            written = len(config.feature_parts) * sum(self.ranks)
            written += (config.semantic_memory - 1) * sum(self.ranks[self.geometric :])
            proposal = width * (vocabulary + written + width + 3 * (config.intermediate_size or 0))
            fixed = width * (2 * vocabulary + written)
        artist = sum(_unit_products(cast(GatedUnit, unit)) for unit in self.artist.levels)
        artist += _unit_products(self.artist.token)
        future = width * channels + 3 * keep * channels + artist + width * vocabulary
        start = width * width * (self.artist.start is not None)
        believed = width * (self.belief is not None)
        products = width * vocabulary + proposal + start + believed + self.futures * future
        fixed += believed + keep * channels * (2 + 3 * self.futures) + 2 * self.futures * width * channels
        return Cost(time * products + (time + 1) * keep * channels, time * fixed)

    def propose(self, hidden: Tensor, forecast: Tensor) -> Tensor:
        """hidden (..., D), forecast (..., C) → what the head reads the token after next from (..., D)."""
        assert self.proposal is not None, "the proposal is not made by the stack"
        return self.norm(hidden + self.proposal(torch.cat([hidden, forecast], -1)))

    def suppose(self, forecast: Tensor, token: Tensor) -> Tensor:
        """The next nodes as they would be with a token: forecast (..., C), what the token is to the levels (..., C)."""
        share = spread(self.share.sigmoid(), self.ranks).to(forecast.dtype)
        return forecast + share * (token - forecast)

    def believe(self, hidden: Tensor) -> Tensor | None:
        """How far the artist is believed after hidden (..., D): (...), between -1 and 1; None if that is not learned.

        No gradient flows to the hidden state: the engineer does not change for the artist's sake. A weight below 0
        moves the pool away from what the artist says.
        """
        return None if self.belief is None else self.belief(hidden.detach()).squeeze(-1).tanh()

    def choose(self, engineer: Tensor, proposal: Tensor, futures: Tensor, artist: Tensor, mass: float) -> Tensor:
        """Which of M futures comes about, one for all: the likeliest by proposal and agreement → (B, T) int64.

        Args:
            engineer, proposal: (B, T, V) logits. futures: (B, T, M) tokens. artist: (B, T, M, V) logits.
            mass: of the engineer's nucleus, in which artist and engineer have to agree.
        """
        if futures.shape[-1] == 1:
            return torch.zeros_like(futures[..., 0])
        with torch.no_grad():
            allowed, likely, said = (accumulator(logits).log_softmax(-1) for logits in (engineer, proposal, artist))
            allowed = allowed.masked_fill(~nucleus(allowed, mass), -torch.inf)
            agreement = (allowed[..., None, :] + said).logsumexp(-1)
            return (likely.gather(-1, futures) + agreement).argmax(-1)
