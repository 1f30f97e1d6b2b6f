"""The model computes what version 0.1 computed: logits, states and gradients, in float64 to 1e-12."""

import json

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM

from .store import DIRECTIONS, FILE, drawn, gradients, measure, weight

STORED = json.loads(FILE.read_text())
EXACT = 1e-12


def close(found, stored) -> bool:
    return abs(found - stored) <= EXACT * max(1.0, abs(stored))


WIDE = ("preset small", "preset base")  # the slow ones


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in WIDE else n for n in STORED])
def test_logits_states_and_gradients_are_those_of_version_0_1(name):
    stored = STORED[name]
    fields = {key: value for key, value in stored["fields"].items() if key != "preset"}
    preset = stored["fields"]["preset"]
    config = DyadConfig(**fields) if preset is None else DyadConfig.from_preset(preset, **fields)
    model = DyadForCausalLM(config).double()
    assert {key: list(value.shape) for key, value in model.named_parameters()} == stored["weights"]
    # Their order, too: optimizer states of version 0.1 go by it.
    assert [key for key, _ in model.named_parameters()] == list(stored["weights"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(key, tuple(parameter.shape))))
    found = measure(model)
    for part in ("logits", "cut"):
        for mine, theirs in zip(found[part], stored[part], strict=True):
            assert all(map(close, mine, theirs)), part
    assert found["state"].keys() == stored["state"].keys()
    for key, (shape, products) in stored["state"].items():
        assert found["state"][key][0] == shape, key
        assert all(map(close, found["state"][key][1], products)), key
    shapes = {key: tuple(shape) for key, shape in stored["weights"].items()}
    directions = [
        {key: torch.from_numpy(drawn(key, shape, salt)) for key, shape in shapes.items()}
        for salt in range(1, 1 + DIRECTIONS)
    ]
    for mine, theirs in zip(gradients(model, directions), stored["gradients"], strict=True):
        assert abs(mine - theirs) <= 100 * EXACT * max(1.0, abs(theirs)), "gradients"
