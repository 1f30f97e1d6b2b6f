"""What a planner learns from: its forecasts, its proposals and its artist are compared with what came.

The teacher's lesson is one more: the same artist sees the true nodes of the future in place of forecasts, to learn what
comes before what. Fewer and fewer rows have that lesson, beside the artist's own, which all rows have. These nodes are
of what the model makes of the tokens from t+2 on, which have seen x_{t+1}; how far that loss lies below the artist's is
what they give away. Nothing else ever sees them.

Dimension letters: B batch, T time, D width, K levels, C ranks of all levels, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from dyadlm.data.batches import IGNORED_LABEL, ChangedWindows
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.extension import AuxiliaryModule, TrainingPass
from dyadlm.model.extras.planner import Forecasts, forecast_errors
from dyadlm.model.packing import chunk_clock, left_packing
from dyadlm.ops.pyramid import Clock, take
from dyadlm.train.options import PlannerOptions

TAUGHT = "taught"  # the draw of `TaughtWindows`, beside the tokens
# Told apart by it from whatever else draws from (seed, number).
DRAWS = int.from_bytes(b"taught")
POOL = 0.1  # weight of the pool's loss: from it the weights of the artist alone learn, so that only clipping feels it


class PlannerLessons(AuxiliaryModule):
    """The losses of a model's own planner. It has no parameters.

    Logged: skill_LEVEL, one less the squared error of forecasts over that of persistence, of the levels that were
    judged; proposal_loss, artist_loss, teacher_loss and, where its weight is learned, the pool_loss of the consensus in
    nats per token. The artist's is that of the future that was
    chosen; the teacher's is a mean over the rows that were shown the true one, while there are any.
    """

    reads_plan = True

    def __init__(self, model: DyadForCausalLM, options: PlannerOptions):
        super().__init__()
        self.options = options
        self._model = (model,)  # in a tuple, so that it is no part of its companion

    def losses(self, lesson: TrainingPass) -> dict[str, Tensor]:
        assert lesson.plan is not None, "a model whose companion reads plans has a planner"
        (model,), plan, options = self._model, lesson.plan, self.options
        order, clock = reading_order(lesson)
        errors = forecast_errors(plan.outlook, model.config.ranks)
        # As fractions: logged are the errors of many passes together, of which a ratio may be taken.
        fractions = torch.stack([errors.stayed - errors.missed, errors.stayed], 1)
        found = {
            f"skill_{name}": fraction
            for name, fraction in zip(model.config.level_keys, fractions.unbind(), strict=True)
        }
        next_label, after_next = (ahead(lesson.labels, order, clock, steps) for steps in (1, 2))
        artist, proposal = nats(plan.artist, next_label), nats(plan.proposal, after_next)
        found |= {"proposal_loss": proposal, "artist_loss": artist}
        cost = options.forecast * errors.cost() + options.proposal * proposal + options.artist * artist
        if plan.weight is not None:
            found["pool_loss"] = nats(plan.pool, next_label)
            cost = cost + POOL * found["pool_loss"]
        if options.teacher:
            mix = max(0.0, 1 - float(model.model.progress) / options.teacher_until)
            taught = self.teach(lesson, order, clock, next_label, mix) if mix else cost.new_zeros(2)
            found["teacher_loss"] = taught
            # Over all tokens, so that the lesson weighs as many as have it and ends without a jump.
            cost = cost + options.teacher * taught[0] / counted(next_label)
        return {name: value.detach() for name, value in found.items()} | {"cost": cost}

    def teach(self, lesson: TrainingPass, order: Tensor, clock: Clock, labels: Tensor, mix: float) -> Tensor:
        """The artist's nats in rows at random, so many of them as `mix`, that see the true future, and of how many
        tokens: (2,).

        Which rows is drawn with their windows (`TaughtWindows`), or where these say nothing, here.
        """
        (model,), plan = self._model, lesson.plan
        assert plan is not None
        assert model.planner is not None
        true = true_future(lesson.input_ids, plan.outlook, order, clock, model.config)
        token = model.model.embed_tokens(true.token)
        drawn = lesson.extra[TAUGHT] if TAUGHT in lesson.extra else torch.rand(token.shape[0], device=token.device)
        labels = labels.masked_fill(~((drawn < mix)[:, None] & true.exists), IGNORED_LABEL)
        picture = model.planner.artist(true.near.to(token.dtype), true.far.to(token.dtype), token, lesson.hidden)
        mean = nats(model.lm_head(picture), labels)
        return torch.stack([mean * counted(labels), (labels != IGNORED_LABEL).sum().to(mean.dtype)])


class TaughtWindows(ChangedWindows):
    """The windows of `base` with `taught` (), float32 in [0, 1): below the teacher's mix a window is shown its future.

    The draw depends on (seed, number) alone, as that of fingerprints: it is no matter of processes, of how a step is
    cut, or of where a run was resumed.
    """

    def __init__(self, base: Dataset[dict[str, Tensor]], seed: int):
        super().__init__(base)
        self.seed = seed

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        drawn = np.random.default_rng([DRAWS, self.seed, number]).random(dtype=np.float32)
        return self.base[number] | {TAUGHT: torch.tensor(drawn)}


def reading_order(lesson: TrainingPass) -> tuple[Tensor, Clock]:
    """The order (B, T) int64 that brings real tokens to the front of each row, and the clock of that order."""
    batch, time = lesson.input_ids.shape
    device = lesson.input_ids.device
    order = left_packing(lesson.attention_mask, batch, time)
    clock = chunk_clock(batch, time, lesson.attention_mask, lesson.position_ids, order, None, device)
    return torch.arange(time, device=device).expand(batch, -1) if order is None else order, clock


def ahead(labels: Tensor, order: Tensor, clock: Clock, steps: int) -> Tensor:
    """(B, T) int64: the label so many tokens later in the same document; `IGNORED_LABEL` where there is none."""
    column = torch.arange(labels.shape[1], device=labels.device)
    inside = (clock.index >= steps) & (column < clock.length[:, None])
    there = labels.gather(1, order).masked_fill(~inside, IGNORED_LABEL)
    later = torch.nn.functional.pad(there, (0, steps), value=IGNORED_LABEL)[:, steps:]
    return later.gather(1, order.argsort(1))


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits (B, T, V) over the labels (B, T) that count; 0 if none does."""
    summed = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return summed / counted(labels)


def counted(labels: Tensor) -> Tensor:
    """How many labels count, at least 1."""
    return (labels != IGNORED_LABEL).sum().clamp(min=1)


class Future(NamedTuple):
    """What truly comes from t+2 on, at each token t. Without gradient."""

    near: Tensor  # (B, T, C) each level's first node from there
    far: Tensor  # (B, T, C) the node after it
    token: Tensor  # (B, T) int64: x_{t+2}
    exists: Tensor  # (B, T) bool: whether the document has such a token


def true_future(ids: Tensor, outlook: Forecasts, order: Tensor, clock: Clock, config: DyadConfig) -> Future:
    """The true future of tokens ids (B, T): windows of 2^k tokens, and the rest of the segment open at t+2.

    Nodes that the document's end cuts off are means of what there is; a far node of which nothing is left repeats the
    near one.
    """
    time, ranks = ids.shape[1], config.ranks
    column = torch.arange(time, device=ids.device).expand_as(order)
    length = clock.length[:, None]

    def following(flags: Tensor) -> Tensor:
        """(B, T + 1) int64: the first column after each at which a flag is set, or the row's length."""
        flagged = torch.where(flags, column, length)
        later = torch.cat([flagged[:, 1:], length, length], 1)
        return later.flip(1).cummin(1).values.flip(1)

    values = outlook.values.gather(1, order[..., None].expand_as(outlook.values))
    begins = outlook.begins.gather(1, order[..., None].expand_as(outlook.begins))
    # A sum from the row's beginning: rounding grows with its length, but teaching needs no more than float32 leaves.
    sums = torch.split(torch.nn.functional.pad(values.cumsum(1), (0, 0, 1, 0)), ranks, -1)
    end = following(clock.index == 0)[:, :time]
    first = column + 2
    nears, fars = [], []
    for level, summed in enumerate(sums):
        if level < len(config.alignments):
            middle = torch.minimum(first + 2**level, end)
            last = torch.minimum(middle + 2**level, end)
        else:
            next_begin = following(begins[..., level])
            middle = torch.minimum(next_begin.gather(1, first.clamp(max=time)), end)
            last = torch.minimum(next_begin.gather(1, middle), end)
        near = _between(summed, first, middle)
        nears.append(near)
        fars.append(torch.where((last > middle)[..., None], _between(summed, middle, last), near))
    token = torch.nn.functional.pad(ids.gather(1, order), (0, 2))[:, 2:]
    back = order.argsort(1)
    near, far = (torch.cat(parts, -1).gather(1, back[..., None].expand(-1, -1, sum(ranks))) for parts in (nears, fars))
    return Future(near, far, token.gather(1, back), (first < end).gather(1, back))


def _between(sums: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Means from sums (B, T + 1, R) up to each column, over columns from start to stop (B, T): (B, T, R)."""
    start, stop = start.clamp(max=sums.shape[1] - 1), stop.clamp(max=sums.shape[1] - 1)
    return (take(sums, stop) - take(sums, start)) / (stop - start).clamp(min=1)[..., None]
