"""Learning while reading: small steps on a change of the output matrix, on what was just scored.

Only the logits change. The state of the model, and the files of its weights, are those without learning.

Dimension letters: T tokens, V vocabulary, D width.
"""

import numpy as np

# Of a step on one token, over the squared norm of its hidden state (normalised least mean squares, Widrow and Hoff):
# it moves the logits of a token that was certain to be another by so much.
RATE = 0.08
# Tokens of a step. A step is stable while RATE * BLOCK / 2 < 2, since the curvature of the loss is at most 1/2.
BLOCK = 32


class Learner:
    """A change of the output matrix, at first zero, of the model's size: delta float32 (V, D).

    A block of tokens is predicted first and learned after that, in the order of the text; lines share no block, so that
    it makes no difference which lines are read at once.
    """

    def __init__(self, vocabulary: int, width: int):
        self.delta = np.zeros((vocabulary, width), np.float32)

    def take(self, delta: np.ndarray) -> None:
        """Go on with a saved change. Raises `ValueError` if it is of another size."""
        if delta.shape != self.delta.shape or delta.dtype != np.float32:
            raise ValueError(f"a change of shape {delta.shape}, not {self.delta.shape}")
        self.delta = delta.copy()

    def nats(self, logits: np.ndarray, hidden: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Nats float32 (T,) of ids (T,), each before it is learned.

        logits (T, V) and hidden (T, D), float32: what the model has before each token; NaN where it has nothing.
        """
        nats = np.empty(len(ids), np.float32)
        for start in range(0, len(ids), BLOCK):
            part = slice(start, start + BLOCK)
            nats[part] = self._step(logits[part], hidden[part], ids[part])
        return nats

    def _step(self, logits: np.ndarray, hidden: np.ndarray, ids: np.ndarray) -> np.ndarray:
        places = np.arange(len(ids))
        scores = logits + hidden @ self.delta.T
        scores -= scores.max(1, keepdims=True)
        total = np.exp(scores).sum(1, keepdims=True)
        nats: np.ndarray = (np.log(total) - scores[places, ids, None])[:, 0]
        error = np.exp(scores) / total
        error[places, ids] -= 1
        steps = RATE / np.maximum((hidden * hidden).sum(1, keepdims=True), 1e-6)
        known = ~np.isnan(nats)
        self.delta -= error[known].T @ (hidden * steps)[known]
        return nats
