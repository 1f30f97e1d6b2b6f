"""The reverse-predicting twin: a second stack that reads the text backwards, in training alone.

It predicts each token from those after it, with pyramids, blocks, norm and head of its own, and hears through the very
bottlenecks of the model: what a level keeps of its tokens then has to serve both directions of time. Nothing of it
enters what the model says.

Dimension letters: B batch, T time, V vocabulary, D width, S semantic levels.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.model import DyadConfig, DyadForCausalLM, DyadModel
from dyadlm.model.block import DyadBlock
from dyadlm.model.cache import BlockState
from dyadlm.model.extension import AuxiliaryModule, TrainingPass
from dyadlm.model.packing import chunk_clock, left_packing
from dyadlm.ops.pyramid import Clock
from dyadlm.ops.segments import SegmentPlan, segment_plan
from dyadlm.train.options import TwinOptions


class Twin(AuxiliaryModule):
    """A stack like the model's on the reversed tokens of each document, without slots, n-grams, selectors and planner.

    Shared with the model and named there alone: the embedding of the tokens, so that identities agree, and every
    bottleneck. Its own: all else, and a head D → V even where the model's is tied, so that to the twin the embedding is
    something to read and nothing to predict.

    Making one sets `Tower.credit` of the model's towers to `options.conditioning`.
    """

    def __init__(self, model: DyadForCausalLM, options: TwinOptions):
        super().__init__()
        assert options.conditioning != "off", "without a twin there is nothing to make"
        self.weight = options.weight
        self._twin_of = (model.model,)  # in a tuple, so that it is no part of the twin
        self.stack = DyadModel(_levels_alone(model.config))
        del self.stack.embed_tokens, self.stack.boundaries
        self.head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        # As a tied head begins: a louder one would send the embedding gradients that drown the model's.
        nn.init.normal_(self.head.weight, std=model.config.initializer_range)
        for own, layer in zip(self.stack.layers, model.model.layers, strict=True):
            assert isinstance(own, DyadBlock)
            tower = cast(DyadBlock, layer).tower
            tower.credit = options.conditioning
            if hasattr(tower, "bottlenecks"):
                own.tower.borrow(tower)

    def losses(self, lesson: TrainingPass) -> dict[str, Tensor]:
        """twin_loss: nats per token, the mean over the labels that have a token after them in their document.

        cost: that and what learned boundaries cost, times the weight.
        """
        hidden, order, clock, costs = self.read(lesson)
        labels = lesson.labels.gather(1, order)[:, 1:]
        column = torch.arange(1, order.shape[1], device=order.device)
        has_future = (clock.index[:, 1:] > 0) & (column < clock.length[:, None])
        labels = labels.masked_fill(~has_future, IGNORED_LABEL)
        logits = self.head(hidden[:, :-1]).float()
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = nats / (labels != IGNORED_LABEL).sum().clamp(min=1)
        return {"twin_loss": loss.detach(), "cost": self.weight * torch.stack([loss, *costs]).sum()}

    def read(self, lesson: TrainingPass) -> tuple[Tensor, Tensor, Clock, list[Tensor]]:
        """The last hidden state (B, T, D) at each token in the order of reading, this order (B, T) int64 as columns of
        the lesson, its clock, and the costs of learned boundaries."""
        batch, time = lesson.input_ids.shape
        mask, device = lesson.attention_mask, lesson.input_ids.device
        packed = left_packing(mask, batch, time)
        # A document turned round fills the same columns, so that the clock is that of the text as it was.
        clock = chunk_clock(batch, time, mask, lesson.position_ids, packed, None, device)
        order = turned_round(clock)
        if packed is not None:
            order = packed.gather(1, order)
        ids = lesson.input_ids.gather(1, order)
        (model,) = self._twin_of
        states = [BlockState()] * len(self.stack.layers)
        embedded, segments = model.embed_tokens(ids), self._segments(ids, clock)
        outputs, _, notes = self.stack.stack(embedded, clock, segments, None, states, keep=False)
        return outputs[-1], order, clock, [note.cost for note in notes if note.cost is not None]

    def _segments(self, ids: Tensor, clock: Clock) -> SegmentPlan | None:
        """Where words and sentences begin in the text as it is read here: by tokens read so far alone."""
        rules, (model,) = self.stack.config.rules, self._twin_of
        if not rules:
            return None
        assert model.boundaries is not None
        begins, _ = model.boundaries(ids, clock, (), backwards=True)
        plan, _ = segment_plan(begins[..., : len(rules)], clock, self.stack.config.longest_segment)
        return plan


def turned_round(clock: Clock) -> Tensor:
    """(B, T) int64: the columns of a chunk with every document in reverse, in the place where it stands; pads stay."""
    time = clock.index.shape[1]
    column = torch.arange(time, device=clock.index.device)
    length = clock.length[:, None]
    start = column - clock.index
    # A document ends before the next one starts, or where the real tokens end.
    begins = torch.where(clock.index == 0, column, time).minimum(length)
    following = torch.cat([begins[:, 1:], length], 1).flip(1).cummin(1).values.flip(1)
    return torch.where(column < length, start + following - 1 - column, column)


def _levels_alone(config: DyadConfig) -> DyadConfig:
    """The same stack without what recalls, selects and plans."""
    config = copy.deepcopy(config)
    config.slot_contexts, config.ngram_sizes, config.decision_slots = [], [], False
    config.selector, config.selector_margin = "none", 0.0
    config.planner, config.consensus = "none", 0.0
    return config
