"""Histories of unequal length: the state carried from window to window, and weights by length of history.

Dimension letters: B rows, T tokens of a window, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.errors import UserError
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.cache import DyadCache
from dyadlm.state_file import read_beside

# Of a checkpoint, each with the number of its process behind.
FILES = "carried_state_"


def require_carriable(model: PreTrainedModel) -> None:
    """Raise `UserError` for a model whose state is no `DyadCache`."""
    if not isinstance(model, DyadForCausalLM):
        raise UserError(
            f"train.carry_state carries the state of dyadlm models, which {type(model).__name__} has not; "
            "leave train.carry_state out."
        )


class CarriedState:
    """The state of this process's rows between steps, for each of the batches whose gradients a step accumulates.

    Several groups of rows may take turns, one group a step:

        steps    0        1        2        3
        rows     group 0  group 1  group 0  group 1       step 2 goes on where step 0 stood

    No gradient flows from one window into those before it.
    """

    def __init__(self, config: DyadConfig, rank: int, processes: int, batches: int, rows: int, groups: int = 1):
        """batches: of a step in each process; rows: of a batch. lanes: which windows are read here, of those that all
        processes read before the first group has its turn again."""
        self._config, self._rank, self._batches = config, rank, batches
        self.lanes = lanes_of(rank, processes, batches * groups, rows)
        self._caches = [DyadCache() for _ in range(batches * groups)]
        self._turn = 0

    @property
    def current(self) -> DyadCache:
        """What the next batch begins with; the model updates it in place."""
        return self._caches[self._turn]

    def advance(self) -> None:
        """Cut the graph of what `current` has become, and turn to the next batch."""
        self._caches[self._turn] = _rows(self.current, 0, self.current.batch_size)
        self._turn = (self._turn + 1) % len(self._caches)

    def save(self, folder: Path) -> None:
        """Write the rows of this process, and which lanes they are. Only between steps."""
        assert self._turn % self._batches == 0, "a checkpoint is made between steps"
        size = self._caches[0].batch_size
        # A group whose turn has not come enters the text then, and what stands in its rows is not read.
        caches = [cache if cache.batch_size else self._caches[0] for cache in self._caches]
        places = [np.arange(number * size, (number + 1) * size) for number in range(len(caches))]
        whole = _filled(len(self.lanes), zip(caches, places, [slice(None)] * len(places), strict=True))
        whole.save(folder / f"{FILES}{self._rank}.safetensors", self._config, beside={"lanes": self.lanes})

    def load(self, folder: Path, step: int, device: torch.device) -> None:
        """Read the lanes of this process from what `save` wrote in all of them, as many as there were. step: the number
        of steps that were done.

        Raises:
            UserError: a lane is missing, or a file is damaged.
        """
        self._turn = step * self._batches % len(self._caches)
        files = sorted(folder.glob(f"{FILES}*.safetensors"))
        parts: list[tuple[DyadCache, Any, Any]] = []
        for file in files:
            cache, lanes = self._saved(file, len(files))
            places, rows = np.nonzero(self.lanes[:, None] == lanes)
            parts.append((cache, places, rows))
        if sum(len(places) for _, places, _ in parts) != len(self.lanes):
            raise UserError(f"{folder} does not hold the state of every row; remove it to go on from an earlier one.")
        whole = _filled(len(self.lanes), parts).to(device)
        size = len(self.lanes) // len(self._caches)
        self._caches = [_rows(whole, number * size, size) for number in range(len(self._caches))]

    def _saved(self, file: Path, processes: int) -> tuple[DyadCache, np.ndarray]:
        """The rows of one file and their lanes, which earlier versions did not write: processes were as many then."""
        rank, batches = int(file.stem.removeprefix(FILES)), len(self._caches)
        former = lanes_of(rank, processes, batches, len(self.lanes) // batches)
        return DyadCache.load(file, self._config), read_beside(file).get("lanes", former)


def lanes_of(rank: int, processes: int, batches: int, rows: int) -> np.ndarray:
    """Which of the windows of a step process `rank` reads, int64 (batches * rows,): batches are dealt in turn."""
    lanes: np.ndarray = (np.arange(batches)[:, None] * processes + rank) * rows + np.arange(rows)
    return lanes.reshape(-1)


def _filled(size: int, parts: Iterable[tuple[DyadCache, Any, Any]]) -> DyadCache:
    """A cache of `size` rows. parts: caches, where their rows go, and which of their rows are taken."""
    whole = None
    for cache, places, rows in parts:
        if whole is None:
            whole = cache.select_rows(torch.zeros(size, dtype=torch.int64))
        own = cache.tensors()
        for name, tensor in whole.tensors().items():
            tensor[places] = own[name][rows]
    assert whole is not None, "there is a cache for each batch"
    return whole


def _rows(cache: DyadCache, start: int, count: int) -> DyadCache:
    """A copy of some rows, without their graph."""
    with torch.no_grad():
        return cache.select_rows(torch.arange(start, start + count))


def history_weights(batch: Mapping[str, Tensor], power: float) -> Tensor:
    """(B, T - 1) float32: how much the target at each column but the first counts; 0 where there is no target.

    (h / T)^power for a history of h tokens, at least 1 and at most T. h: the target's position in its document or lane
    (`position_ids`), or else in the window.
    """
    labels = batch["labels"][:, 1:]
    length = labels.shape[1] + 1
    positions = batch.get("position_ids")
    histories = torch.arange(1, length, device=labels.device) if positions is None else positions[:, 1:]
    weights = (histories.clamp(1, length) / length) ** power
    return weights * (labels != IGNORED_LABEL)


class HistoryWeightedLoss:
    """The `loss_function` of a causal model, in which the tokens count by `history_weights`.

    Its gradient is that of the weighted mean; its value is the mean in which all count alike, so that what is logged
    can be compared between runs.
    """

    def __init__(self, power: float):
        self.power = power
        self.mean_of_step: Tensor | None = None  # of the weights of all targets of a step, in all processes
        self._weights: Tensor | None = None

    def sums(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(2,) float32: the weights of a batch added up, and its number of targets."""
        targets = (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
        return torch.stack([history_weights(batch, self.power).sum(), targets])

    @contextmanager
    def of(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """The weights of the batch whose loss is computed inside. Raises `UserError` if no loss is asked for."""
        self._weights = history_weights(batch, self.power)
        yield
        if self._weights is not None:
            raise UserError(
                "This model computes its loss without the loss_function of transformers, in which tokens get their "
                "weights; leave train.history_weight out."
            )

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """logits (B, T, V), labels (B, T) → scalar.

        num_items_in_batch: targets of the step; None: the mean is that of this batch, as of models without it.
        """
        weights, self._weights = self._weights, None
        assert weights is not None, "one loss for each batch"
        nats = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
        targets, mean = num_items_in_batch, self.mean_of_step
        if targets is None:
            targets = (labels[:, 1:] != IGNORED_LABEL).sum()
            mean = weights.sum() / targets
        assert mean is not None, "the Trainer counts before it computes"
        weighted = (nats * weights).sum() / (targets * mean)
        alike = nats.sum() / targets
        return weighted - (weighted - alike).detach()
