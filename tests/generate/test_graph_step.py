"""Decoding with a state that never moves (`dyadlm.generate.graph_step`) gives what decoding otherwise gives."""

import pytest
import torch

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.generate.graph_step import GraphStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def random_model(**fields: object) -> DyadForCausalLM:
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=64, num_hidden_layers=2, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fields", [{}, {"slot_evict": "lru"}, {"slot_scope": "stream"}, {"ngram_sizes": [2, 3]}])
def test_steps_equal_the_model(device: str, fields: dict[str, object]) -> None:
    model = random_model(**fields).to(device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32, 127, (3, 40), generator=generator).to(device)
    expected, cache = DyadCache(), DyadCache()
    with torch.no_grad():
        for held in (expected, cache):
            model(input_ids=ids[:, :10], past_key_values=held, use_cache=True)
        steps = GraphStep(model, cache, record=device == "cuda")
        places = {name: tensor.data_ptr() for name, tensor in cache.tensors().items()}
        for column in range(10, 40):
            there = model(input_ids=ids[:, column : column + 1], past_key_values=expected, use_cache=True).logits[:, 0]
            torch.testing.assert_close(steps.step(ids[:, column]), there, rtol=1e-5, atol=1e-5)
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors().items()} == places
    assert cache.columns_seen == expected.columns_seen == 40
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(cache.tensors()[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_fork_goes_on_by_itself() -> None:
    model, cache = random_model(), DyadCache()
    ids = torch.randint(32, 127, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids[:, :10], past_key_values=cache, use_cache=True)
        steps = GraphStep(model, cache, record=False)
        for column in range(10, 30):
            steps.step(ids[:, column])
        fork = steps.fork()
        for column in range(30, 50):
            steps.step(ids[:, column - 20])
        found = model(input_ids=ids[:, 30:], past_key_values=fork, use_cache=True).logits
        expected = model(input_ids=ids).logits[:, 30:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
