"""Choosing the next token, with the semantics of Hugging Face `generate`, in numpy.

A seed gives the tokens that torch draws from the same probabilities with a generator of that seed on the CPU, so that
models in torch and in the engine write the same text.

Dimension letters: V vocabulary.
"""

import secrets
from dataclasses import dataclass

import numpy as np

from dyadlm.errors import UserError

# Below it logits are no finite numbers after the division, and all but the likeliest tokens have no chance long before.
COLDEST = 1e-30


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep all; seed None is random.

    Raises `UserError` on a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"The temperature is a number of at least 0 (0 is greedy), not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top-k is a number of tokens (0 keeps all), not {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top-p is above 0 and at most 1 (1 keeps all), not {self.top_p}.")
        if self.seed is not None:
            require_seed(self.seed)


def require_seed(seed: int) -> None:
    """Raise `UserError` unless torch takes it."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"A seed is a whole number of at most 64 bits, not {seed}.")


class Sampler:
    """Draws tokens one after the other from one seeded generator."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._random = TorchExponential(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token for logits float32 (V,)."""
        if self._sampling.temperature == 0.0:
            return int(logits.argmax())
        scores = softmax(self.keep(logits))
        return int((scores / self._random.draw(len(scores))).argmax())

    def keep(self, logits: np.ndarray) -> np.ndarray:
        """Logits (V,) float32 by temperature, -inf where top-k or top-p leaves a token out."""
        options = self._sampling
        scores = logits / np.float32(max(options.temperature, COLDEST))
        if options.top_k > 0:
            least = np.partition(scores, -min(options.top_k, len(scores)))[-min(options.top_k, len(scores))]
            scores = np.where(scores < least, np.float32(-np.inf), scores)
        if options.top_p < 1.0:
            order = np.argsort(scores, kind="stable")
            unlikely = np.cumsum(softmax(scores[order])) <= 1 - options.top_p
            unlikely[-1] = False
            scores = scores.copy()
            scores[order[unlikely]] = -np.inf
        return scores


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities float32 of scores (V,)."""
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum(), np.float32)


class TorchExponential:
    """Exponential numbers as `torch.Tensor.exponential_` draws them on the CPU: Mersenne Twister, 53 bits a number."""

    def __init__(self, seed: int):
        """Raises `UserError` for a seed that is no whole number of 64 bits, which torch refuses as well."""
        require_seed(seed)
        self._random = np.random.RandomState(seed % 2**32)

    def draw(self, count: int) -> np.ndarray:
        """The next numbers, float32 (count,)."""
        words = self._random.randint(0, 2**32, 2 * count, np.uint32).astype(np.uint64)
        uniform = ((words[0::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)) / 2.0**53
        return np.maximum(-np.log1p(-uniform), np.finfo(np.float64).eps / 2).astype(np.float32)
