"""The identity slots of one block: what followed the last time the same context stood here.

A slot keeps a narrow projection of the hidden state at the position that followed; the tag decides hit or miss, so what
is read is exact (docs/architecture.md, Slots; operators in `dyadlm.ops.slots`).

Dimension letters: B batch, T time, D width, N tables, M slot width, P parts of a tag.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm import kernels
from dyadlm.model.configuration import LEARNED_CODE, DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import Contexts, tag_words
from dyadlm.ops.slots import SlotLookup, SlotState, slot_change, slot_lookup, slot_read, slot_values


def plan_slots(
    contexts: Contexts, clock: Clock, config: DyadConfig, state: SlotState | None, writes: Tensor | None = None
) -> SlotLookup:
    """Which slot is read at each token, and what is written."""
    sets, ways, scope = config.slot_entries // config.slot_ways, config.slot_ways, config.slot_scope
    several = contexts.words.shape[1] > 1  # a single token touches two sets; the form in torch plans it from them
    if several and config.slot_evict == "ring" and kernels.usable(contexts.words):
        from dyadlm.kernels.slot_plan import ring_lookup

        return ring_lookup(contexts, clock, sets=sets, ways=ways, scope=scope, writes=writes, state=state)
    evict = config.slot_evict
    return slot_lookup(contexts, clock, sets=sets, ways=ways, evict=evict, scope=scope, writes=writes, state=state)


def read_slots(values: Tensor, plan: SlotLookup, state: SlotState | None) -> Tensor:
    """What is read at each token (B, T, N, M + 1), of values (B, T, 1, M); the last number is 1 where one is found."""
    stored, trains = None if state is None else state.values, torch.is_grad_enabled()
    # The kernel gives no gradient to a state, and only plans of a kernel say how one reaches values.
    of_state = trains and stored is not None and stored.requires_grad
    of_values = trains and values.requires_grad
    if kernels.usable(values) and not of_state and (plan.following is not None or not of_values):
        from dyadlm.kernels.slot_read import slot_recall

        return slot_recall(values, plan.found, plan.column, plan.slot, stored, plan.following)
    return with_flags(slot_read(values, plan, state), plan)


def with_flags(read: Tensor, plan: SlotLookup) -> Tensor:
    """What is read (B, T, N, M), and behind it 1 where something is found: (B, T, N, M + 1)."""
    return torch.cat([read, plan.found[..., None].to(read.dtype)], -1)


def plans_alike(config: DyadConfig) -> bool:
    """Whether the tokens alone say what is written and read, so that all blocks share one plan."""
    return not config.slot_gate and LEARNED_CODE not in (config.slot_contexts or ())


def tag_integers(config: DyadConfig) -> int:
    """Integers of the tags of all tables: of entries, and of what is still to be written."""
    tables, contexts = len(config.slot_contexts or ()), config.read_contexts
    parts = tag_words(contexts, config.vocab_size) if contexts else 1
    return tables * (config.slot_entries + 1) * parts


class IdentitySlots(nn.Module):
    """Tables of slots, one per context."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.config = config
        width, tables = config.hidden_size, len(config.slot_contexts or ())
        self.value = nn.Linear(width, config.slot_width, bias=False)
        self.read = nn.Linear(tables * (config.slot_width + 1), width, bias=False)

    def initialize(self) -> None:
        """What is recalled adds nothing at first."""
        init.zeros_(self.read.weight)

    def forward(
        self,
        x: Tensor,
        contexts: Contexts | None,
        clock: Clock,
        plan: SlotLookup | None,
        state: tuple[Tensor, ...],
        keep: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x (B, T, D) → what is recalled (B, T, D), the state if `keep`, and the cost of writing if a gate may close.

        The state is a `SlotState`, of a single token that continues something a `SlotWrite`.

        contexts: of the tables that tokens address, in order. plan: if all blocks share it.
        """
        before = SlotState(*state) if state else None
        values = slot_values(self.value(x)[:, :, None], self.config.slot_values)
        if plan is None:
            assert contexts is not None
            plan = plan_slots(contexts, clock, self.config, before)
        recalled = self.read(read_slots(values, plan, before).flatten(2))
        return recalled, self.after(values, plan, before) if keep else (), None

    def after(self, values: Tensor, plan: SlotLookup, before: SlotState | None) -> tuple[Tensor, ...]:
        """The state after a chunk of values (B, T, 1 or N, M), or what a single token changes of it."""
        return tuple(slot_change(values, plan, before, self.config.slot_values))

    def cost(self, time: int) -> Cost:
        """Of one block over T tokens: values, and tags that are not those of all blocks."""
        config, width = self.config, self.config.hidden_size
        products = time * width * (config.slot_width + self.read.in_features)
        values = len(config.slot_contexts or ()) * config.slot_entries * config.slot_width
        kept = {"halves" if config.slot_values == "float16" else "numbers": values}
        return Cost(products, integers=0 if plans_alike(config) else tag_integers(config), **kept)
