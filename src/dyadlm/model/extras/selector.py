"""The selector (`selector`): which levels count at a token, for each head; and the slots that keep its decisions.

Measured (docs/experiments.md): adding all levels up is better, by 0.012 to 0.017 nats.

Head h of H is the channels h, h + H, h + 2 H …: so its weights, which multiply what the levels write to these channels,
stand side by side with those of the other heads.

Dimension letters: B batch, T time, D width, H heads, K levels.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.block import DyadBlock
from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import CHOOSING, DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import Clock, accumulator, take
from dyadlm.ops.selection import balanced, by_head, load, real_tokens, select, straight_through

COOLEST = 0.1  # the temperature of gumbel when training ends
SETTLED = 0.5  # the part of training by whose end topk is down to its count


class Selector(nn.Module):
    """Scores of the levels from the hidden state, and the weights chosen by them."""

    bias: Tensor
    load: Tensor

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.config = config
        self.shape = (config.selector_heads, len(config.ranks))
        self.scores = nn.Linear(config.hidden_size, self.shape[0] * self.shape[1], bias=False)
        self.chooses = config.selector in CHOOSING
        if self.chooses:
            self.register_buffer("bias", torch.zeros(self.shape))
            self.register_buffer("load", torch.zeros(self.shape), persistent=False)

    def initialize(self) -> None:
        """Nearly even scores, so that it begins as the plain sum does; and no load yet."""
        init.normal_(self.scores.weight, std=0.1 * self.config.hidden_size**-0.5)
        if self.chooses:
            init.zeros_(self.load)

    def forward(
        self, x: Tensor, clock: Clock, progress: Tensor, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, D) → weights (B, T, H, K), and the choice that holds after the chunk.

        progress: 0-dim, 0 where training begins and 1 where it ends: gumbel cools down with it, and topk begins with
        all levels and comes down to its count.
        """
        config, levels = self.config, self.shape[1]
        count = config.selector_count
        if self.training and config.selector == "topk":
            count = levels - round((levels - count) * min(1.0, float(progress) / SETTLED))
        weights, last = select(
            self.scores(x).unflatten(-1, self.shape),
            config.selector,
            clock,
            count=count,
            bias=self.bias if self.chooses else None,
            margin=config.selector_margin,
            temperature=COOLEST**progress,
            noisy=self.training,
            held=held[0] if held else None,
        )
        if self.training and self.chooses:
            self.load = load(weights.detach(), clock)
        return weights, (last,) if last is not None and config.selector_margin else ()

    @torch.no_grad()
    def balance(self) -> None:
        """Correct the bias by the load of the last training pass. Between passes: a pass may be run twice."""
        if self.chooses:  # no load corrects nothing
            self.bias = balanced(self.bias, self.load, self.config.selector_balance)


class Selected(Tower):
    """Levels that are weighed per token and head. An even choice weighs every level 1, as the plain sum does."""

    def build_write(self, config: DyadConfig) -> None:
        super().build_write(config)
        self.selector = Selector(config)

    def before_pass(self) -> None:
        self.selector.balance()

    def cost(self, time: int) -> Cost:
        scores = self.selector.scores
        held = scores.out_features * (self.config.selector in CHOOSING and self.config.selector_margin > 0)
        return super().cost(time).plus(Cost(time * scores.in_features * scores.out_features, flags=held))

    def choose(
        self, x: Tensor, features: dict[int, Tensor], layout: ChunkLayout, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """What the levels write back together (B, T, D), the routes (B, T, H, K), and the choice that holds."""
        routes, held = self.selector(x, layout.clock, layout.progress, held)
        levels = routes.shape[-1]
        chosen = list(range(levels))
        if x.shape[1] == 1 and not torch.is_grad_enabled():  # over many tokens, nearly every level is chosen somewhere
            chosen = routes.amax((0, 1, 2)).nonzero().flatten().tolist()
        weights = (routes * levels).transpose(-1, -2)
        written = torch.zeros_like(x)
        for level, update in zip(chosen, self.apart(features, layout, chosen), strict=True):
            written = written + by_head(update, weights[:, :, level])
        return written, routes, held

    def weighted_levels(
        self, x: Tensor, features: dict[int, Tensor], layout: ChunkLayout, held: tuple[Tensor, ...] = ()
    ) -> list[Tensor]:
        each = super().weighted_levels(x, features, layout)
        routes, _ = self.selector(x, layout.clock, layout.progress, held)
        return [by_head(update, routes[..., level] * len(each)) for level, update in enumerate(each)]


class DecisionSlots(nn.Module):
    """One slot a head: the selector's choice, as one-hot, and what it said then, kept until a later decision."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.heads, self.levels = config.selector_heads, len(config.ranks)
        self.gate = nn.Linear(config.hidden_size, self.heads)
        self.read = nn.Linear(config.hidden_size + self.heads * self.levels, config.hidden_size, bias=False)

    def initialize(self) -> None:
        """What is remembered adds nothing at first."""
        init.zeros_(self.read.weight)
        init.zeros_(self.gate.bias)

    def forward(
        self, x: Tensor, routes: Tensor, said: Tensor, clock: Clock, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, D), routes (B, T, H, K), said (B, T, D) → what is remembered (B, T, D), and the state.

        A decision is made where a head's gate is open, hard; backward straight through its probability.
        """
        batch, time, _ = x.shape
        chance = self.gate(x).sigmoid()
        decides = chance > 0.5
        if clock.padded:
            decides = decides & real_tokens(clock)[..., None]
        choice = nn.functional.one_hot(routes.argmax(-1), self.levels).to(said.dtype)
        content = accumulator(
            torch.cat([choice, said.unflatten(-1, (-1, self.heads)).mT], -1) * straight_through(chance)[..., None]
        )
        kept = content.shape[-1]
        before = state[0] if state else content.new_zeros(batch, self.heads, kept)
        column = torch.arange(1, time + 1, device=x.device)[:, None]
        when = torch.where(decides, column, 0).cummax(1).values
        if clock.restarts:  # a decision of an earlier document is forgotten
            start = torch.where(clock.index == 0, column.squeeze(-1), 0).cummax(1).values[..., None]
            forgotten = when < start
        held = torch.stack(
            [
                take(torch.cat([before[:, head, None], content[:, :, head]], 1), when[..., head])
                for head in range(self.heads)
            ],
            2,
        )
        if clock.restarts:
            held = held * ~forgotten[..., None]
        last = (clock.length - 1)[:, None]
        final = take(held.flatten(2), last.clamp(min=0)).view(batch, self.heads, kept)
        state = (torch.where(last[..., None] >= 0, final, before),)
        return self.read(held.flatten(2).to(x.dtype)), state


class Deciding(DyadBlock):
    """A block that adds what its selector last decided (`decision_slots`)."""

    def build_slots(self, config: DyadConfig, index: int) -> None:
        super().build_slots(config, index)
        self.decision = DecisionSlots(config)

    def cost(self, time: int) -> Cost:
        width, choices = self.decision.read.out_features, self.decision.heads * self.decision.levels
        products = time * width * (self.decision.heads + self.decision.read.in_features)
        return super().cost(time).plus(Cost(products, numbers=choices + width))

    def mix_levels(
        self, read: Tensor, features: dict[int, Tensor], layout: ChunkLayout, state: BlockState
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        mixed, routes, state = super().mix_levels(read, features, layout, state)
        assert routes is not None, "decisions are what a selector chose"
        kept, decision = self.decision(read, routes, mixed, layout.clock, state.decision)
        return mixed + kept, routes, state._replace(decision=decision)
