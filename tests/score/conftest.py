"""A small model over bytes, as a folder."""

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data import byte_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random model: nothing is learned, but every number of it matters."""
    place = tmp_path_factory.mktemp("score") / "model"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "slot_layers": [1]}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **small))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def model(folder):
    from dyadlm.generate import engine_model

    return engine_model(folder, "cpu", "float32")
