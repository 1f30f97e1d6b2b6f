"""Histories of unequal length: the state carried from window to window, and weights by length of history.

Dimension letters: B rows, T tokens of a window, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.errors import UserError
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.cache import DyadCache


def require_carriable(model: PreTrainedModel) -> None:
    """Raise `UserError` for a model whose state is no `DyadCache`."""
    if not isinstance(model, DyadForCausalLM):
        raise UserError(
            f"train.carry_state carries the state of dyadlm models, which {type(model).__name__} has not; "
            "leave train.carry_state out."
        )


class CarriedState:
    """The state of this process's rows between steps, for each of the batches whose gradients a step accumulates.

    No gradient flows from one window into those before it.
    """

    def __init__(self, batches: int, config: DyadConfig):
        self._config = config
        self._caches = [DyadCache() for _ in range(batches)]
        self._turn = 0

    @property
    def current(self) -> DyadCache:
        """What the next batch begins with; the model updates it in place."""
        return self._caches[self._turn]

    def advance(self) -> None:
        """Cut the graph of what `current` has become, and turn to the next batch."""
        self._caches[self._turn] = _rows(self.current, 0, self.current.batch_size)
        self._turn = (self._turn + 1) % len(self._caches)

    def save(self, folder: Path, rank: int) -> None:
        """Write the rows of all batches into the file of process `rank`. Only between steps."""
        assert self._turn == 0, "a checkpoint is made between steps"
        first, size = self._caches[0], self._caches[0].batch_size
        whole = first.select_rows(torch.zeros(size * len(self._caches), dtype=torch.int64))
        for number, cache in enumerate(self._caches):
            parts = cache.tensors()
            for name, tensor in whole.tensors().items():
                tensor[number * size : (number + 1) * size] = parts[name]
        whole.save(_file(folder, rank), self._config)

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read what `save` wrote. Raises `UserError` if it is not there."""
        whole = DyadCache.load(_file(folder, rank), self._config).to(device)
        size = whole.batch_size // len(self._caches)
        self._caches = [_rows(whole, number * size, size) for number in range(len(self._caches))]


def _rows(cache: DyadCache, start: int, count: int) -> DyadCache:
    """A copy of some rows, without their graph."""
    with torch.no_grad():
        return cache.select_rows(torch.arange(start, start + count))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"carried_state_{rank}.safetensors"


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
