"""What a session reads with: a model in torch, or the engine.

Dimension letters: T tokens, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dyadlm.generate.sampling import Sampling


class Reader(Protocol):
    """A model with the state of all it has read. end_tokens: the ids that end a text."""

    end_tokens: frozenset[int]

    @property
    def logits(self) -> np.ndarray | None:
        """Of the next token, float32 (V,); None at the beginning, after loading, and where a document starts."""
        ...

    @property
    def state(self) -> Any:
        """`past_key_values` in torch, an `EngineState` in the engine; None or empty at the beginning."""
        ...

    @property
    def room(self) -> int | None:
        """How many more tokens can be read; None where there is no limit."""
        ...

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read ids int64 (T,); returns nats float32 (T,), NaN for a token that nothing predicted."""
        ...

    @property
    def hidden(self) -> np.ndarray | None:
        """From which the logits come, float32 (D,); None but after `read_inside`."""
        ...

    def read_inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read ids int64 (T,), T > 0; what the model had before each: logits float32 (T, V), and the hidden state
        float32 (T, D) from which they come. NaN before a token that nothing predicted."""
        ...

    def read_next(self, token: int, first: bool) -> None:
        """Read one token of a continuation, the fastest way there is. first: whether the continuation begins."""
        ...

    def speculation(self, sampling: Sampling, drafts: Any) -> Any:
        """A `dyadlm.generate.speculation.Speculation`; raises `UserError` if the model foresees nothing."""
        ...

    def take_over(self, speculation: Any) -> None:
        """Stand where a settled speculation stands."""
        ...

    def expect(self, logits: np.ndarray, hidden: np.ndarray | None) -> None:
        """Take these logits (V,), and the hidden state (D,) they come from, for those that predict the next token."""
        ...

    def save(self, path: Path, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Write the state, and numbers beside it; raises `UserError` for a model whose state cannot be saved."""
        ...

    def load(self, path: Path) -> None:
        """Load a saved state; raises `UserError` if it does not fit the model."""
        ...

    def skip_slot_write(self) -> None:
        """Let the next token leave the tables of slots as they are; a model without slots has none."""
        ...

    def start_document(self) -> None:
        """Keep the tables of slots alone; raises `UserError` for a model that keeps none."""
        ...

    def snapshot(self) -> Any:
        """All that `restore` needs to stand here again. Reading on changes nothing in it."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Stand where `snapshot` was called, any number of times."""
        ...

    @property
    def position(self) -> int:
        """Tokens read so far, those before a loaded state included."""
        ...

    @property
    def state_bytes(self) -> int | None:
        """Bytes of the state; None for a model of others, whose state grows."""
        ...


def before_each(before: np.ndarray | None, after: np.ndarray) -> np.ndarray:
    """What there was before each token, (T, N): what there was before all, (N,), and after each but the last, (T, N).

    NaN before the first token where nothing was known before it.
    """
    first = np.full_like(after[:1], np.nan) if before is None else before[None]
    return np.concatenate([first, after[:-1]])


def nats_of(before: np.ndarray | None, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Nats float32 (T,) of ids (T,) under logits (V,) before the first of them and logits (T, V) after each."""
    scores = before_each(before, logits)
    top = scores.max(1)
    total = np.log(np.exp(scores - top[:, None]).sum(1)) + top
    return np.asarray(total - scores[np.arange(len(ids)), ids], np.float32)
