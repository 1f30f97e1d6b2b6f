"""The sampler in numpy keeps, weighs and draws what transformers and torch do."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dyadlm import UserError
from dyadlm.generate import Sampling
from dyadlm.generate.sampling import Sampler, TorchExponential

OPTIONS = [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 20, 1.0), (1.1, 9, 0.8), (0.8, 1000, 0.01)]


def warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    return processors


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [1, 5, 259, 20000])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -5])
def test_tokens_are_those_that_torch_draws(options, size, seed):
    sampler, generator = Sampler(Sampling(*options, seed=seed)), torch.Generator().manual_seed(seed)
    for number in range(12):
        logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(number))
        scores = warpers(*options)(torch.empty(1, 0, dtype=torch.long), logits[None])
        assert np.array_equal(sampler.keep(logits.numpy()) == -np.inf, scores[0].numpy() == -np.inf)
        expected = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        assert sampler(logits.numpy()) == int(expected)


def test_numbers_are_those_of_torch():
    for seed in (0, 1, 123):
        expected = torch.empty(1000).exponential_(1, generator=torch.Generator().manual_seed(seed)).numpy()
        np.testing.assert_allclose(TorchExponential(seed).draw(1000), expected, rtol=1e-6)


def test_a_seed_of_more_than_64_bits_is_refused():
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(UserError, match="64 bits"):
            Sampler(Sampling(seed=seed))
    for seed in (2**64 - 1, -(2**63)):  # which torch takes
        expected = torch.empty(8).exponential_(1, generator=torch.Generator().manual_seed(seed)).numpy()
        np.testing.assert_allclose(TorchExponential(seed).draw(8), expected, rtol=1e-6)


def test_a_seed_that_torch_would_refuse_is_refused_at_once():
    with pytest.raises(UserError, match="at most 64 bits"):
        Sampling(seed=10**26)
