"""Choosing the next token, with the semantics of Hugging Face `generate`."""

from dataclasses import dataclass
from typing import cast

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dyadlm.errors import UserError


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
        if self.temperature < 0.0:
            raise UserError(f"The temperature is at least 0 (0 is greedy), not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top-k is a number of tokens (0 keeps all), not {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top-p is above 0 and at most 1 (1 keeps all), not {self.top_p}.")


class Sampler:
    """Draws tokens one after the other from one seeded generator."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self._greedy = sampling.temperature == 0.0
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._processors = LogitsProcessorList()
        if sampling.temperature not in (0.0, 1.0):
            self._processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token for logits float32 (V,)."""
        if self._greedy:
            return int(logits.argmax())
        # The processors look at no earlier tokens.
        scores = self._processors(
            cast(torch.LongTensor, torch.empty(1, 0, dtype=torch.long)), cast(torch.FloatTensor, logits[None])
        )
        return int(torch.multinomial(scores.softmax(-1), num_samples=1, generator=self._generator))
