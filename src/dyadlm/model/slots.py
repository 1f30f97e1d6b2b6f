"""The identity slots of one block: what followed the last time the same context stood here.

A slot keeps a narrow projection of the hidden state at the position that followed; the tag decides hit or miss, so what
is read is exact (design, section 5; operators in `dyadlm.ops.slots`).

Dimension letters: B batch, T time, D width, N tables, M slot width, P parts of a tag.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.configuration import CODE_BITS, LEARNED_CODE, DyadConfig
from dyadlm.ops.contexts import Contexts
from dyadlm.ops.pyramid import Clock
from dyadlm.ops.selection import real_tokens, straight_through
from dyadlm.ops.slots import Lookup, SlotState, slot_change, slot_lookup, slot_read

WRITE_COST = 0.01  # nats a token that writes everything pays, where a gate may close


def plan_slots(
    contexts: Contexts, clock: Clock, config: DyadConfig, state: SlotState | None, writes: Tensor | None = None
) -> Lookup:
    """Which slot is read at each token, and what is written."""
    return slot_lookup(
        contexts,
        clock,
        sets=config.slot_entries // config.slot_ways,
        ways=config.slot_ways,
        evict=config.slot_evict,
        scope=config.slot_scope,
        writes=writes,
        state=state,
    )


def plans_alike(config: DyadConfig) -> bool:
    """Whether the tokens alone say what is written and read, so that all blocks share one plan."""
    return not config.slot_gate and LEARNED_CODE not in (config.slot_contexts or ())


class IdentitySlots(nn.Module):
    """Tables of slots, one per context."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.config = config
        contexts = config.slot_contexts or []
        self.coded = [n for n, context in enumerate(contexts) if context == LEARNED_CODE]
        width, tables = config.hidden_size, len(contexts)
        self.value = nn.Linear(width, config.slot_width, bias=False)
        self.read = nn.Linear(tables * (config.slot_width + 1), width, bias=False)
        self.gate = nn.Linear(width, tables) if config.slot_gate else None
        self.code = nn.Linear(width, CODE_BITS, bias=False) if self.coded else None

    def initialize(self) -> None:
        """What is recalled adds nothing at first, and everything is written."""
        init.zeros_(self.read.weight)
        if self.gate is not None:
            init.zeros_(self.gate.weight)
            init.ones_(self.gate.bias)

    def forward(
        self,
        x: Tensor,
        contexts: Contexts | None,
        clock: Clock,
        plan: Lookup | None,
        state: tuple[Tensor, ...],
        keep: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x (B, T, D) → what is recalled (B, T, D), the state if `keep`, and the cost of writing if a gate may close.

        The state is a `SlotState`, of a single token that continues something a `SlotWrite`.

        contexts: of the tables that tokens address, in order. plan: if all blocks share it.
        """
        before = SlotState(*state) if state else None
        values = self.value(x)[:, :, None]
        sure: Tensor | None = None
        if self.code is not None:
            contexts, sure = self._with_code(x, contexts, clock)
        writes = cost = None
        if self.gate is not None:
            chance = self.gate(x).sigmoid()
            writes = chance > 0.5
            values = values * straight_through(chance)[..., None]
            real = real_tokens(clock)[..., None].expand_as(chance)
            cost = WRITE_COST * (chance * real).sum() / real.sum().clamp(min=1)
        if sure is not None:
            values = values * straight_through(sure)[..., None]
        if plan is None:
            assert contexts is not None
            plan = plan_slots(contexts, clock, self.config, before, writes)
        recalled = slot_read(values, plan, before)
        if sure is not None:
            recalled = recalled * straight_through(sure)[..., None]
        found = plan.found[..., None].to(recalled.dtype)
        said = self.read(torch.cat([recalled, found], -1).flatten(2))
        return said, tuple(slot_change(values, plan, before)) if keep else (), cost

    def _with_code(self, x: Tensor, contexts: Contexts | None, clock: Clock) -> tuple[Contexts, Tensor]:
        """The contexts with the learned code put in its place, and how sure each table's code is (B, T, N)."""
        assert self.code is not None
        (place,) = self.coded
        chance = self.code(x).sigmoid()
        bits = chance > 0.5
        number = (bits.long() << torch.arange(CODE_BITS, device=x.device)).sum(-1)
        known = real_tokens(clock)
        coded = Contexts(torch.where(known, number, -1)[..., None, None], known[..., None])
        if contexts is not None:
            beyond = torch.where(known, 0, -1)[..., None, None].expand(-1, -1, -1, contexts.words.shape[3] - 1)
            words, own = torch.cat([coded.words, beyond], -1), coded.known
            coded = Contexts(
                torch.cat([contexts.words[:, :, :place], words, contexts.words[:, :, place:]], 2),
                torch.cat([contexts.known[:, :, :place], own, contexts.known[:, :, place:]], 2),
            )
        sure = torch.ones_like(coded.known, dtype=x.dtype)
        sure[..., place] = torch.where(bits, chance, 1 - chance).mean(-1)
        return coded, sure
