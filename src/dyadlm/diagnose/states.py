"""What probes on hidden states share: reading them, and logits, in bounded memory.

Dimension letters: B windows, T tokens, M tokens of interest, L layers, D width.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dyadlm.diagnose.contract import Subject, require_numbers
from dyadlm.diagnose.probe import Budget, NotApplicable
from dyadlm.evaluate.memorisation import Reader
from dyadlm.evaluate.scoring import LOGITS_AT_ONCE


def by_frequency(ids: Tensor) -> Tensor:
    """The different tokens of texts (B, T), the most frequent first; of equal ones the lower first."""
    tokens, counts = np.unique(ids.numpy(), return_counts=True)
    return torch.from_numpy(tokens[np.argsort(-counts, kind="stable")])


def rows_of(subject: Subject, budget: Budget, length: int) -> int:
    """How many rows of `length` tokens are read at once where logits are wanted: large vocabularies allow fewer."""
    return max(1, min(budget.rows(length), LOGITS_AT_ONCE // (length * subject.vocabulary)))


def all_nats(subject: Subject, ids: Tensor, budget: Budget) -> Tensor:
    """(B, T) → (B, T - 1) float32: the surprise at each token but the first."""
    rows = rows_of(subject, budget, ids.shape[1])
    return torch.cat([subject.nats(ids[start : start + rows]) for start in range(0, len(ids), rows)])


def hidden_states(subject: Subject, ids: Tensor) -> list[Tensor]:
    """As `Subject.hidden`. Raises `NotApplicable` if the model does not show them, or has no layer."""
    states = subject.hidden(ids)
    if states is None or len(states) < 2:
        raise NotApplicable("this model does not show its hidden states")
    return [require_numbers(state, subject.name) for state in states]


def states_at(subject: Subject, ids: Tensor, columns: Tensor, budget: Budget) -> list[Tensor]:
    """The states at some tokens of windows (B, T), by depth: columns (B, M) int64 → L + 1 tensors (B, M, D) float32.

    Raises `NotApplicable` if the model does not show them.
    """
    rows, parts = budget.rows(ids.shape[1]), []
    for start in range(0, len(ids), rows):
        states = hidden_states(subject, ids[start : start + rows])
        where = columns[start : start + rows, :, None]
        parts.append([state.gather(1, where.expand(-1, -1, state.shape[-1])) for state in states])
        budget.progress(min(start + rows, len(ids)), len(ids))
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def reader(subject: Subject, budget: Budget) -> Reader:
    """A subject as what `dyadlm.evaluate.memorisation` reads with: of each token of rows (N, T) but the first its nats,
    float64 (N, T - 1), and whether it is the likeliest, bool (N, T - 1)."""

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at_once, nats, likeliest = rows_of(subject, budget, rows.shape[1]), [], []
        for start in range(0, len(rows), at_once):
            ids = torch.from_numpy(rows[start : start + at_once])
            logits, following = require_numbers(subject.logits(ids[:, :-1]), subject.name), ids[:, 1:]
            nats.append(cross_entropy(logits.transpose(1, 2), following, reduction="none").double().numpy())
            likeliest.append((logits.argmax(-1) == following).numpy())
            budget.progress(min(start + at_once, len(rows)), len(rows))
        return np.concatenate(nats), np.concatenate(likeliest)

    return read
