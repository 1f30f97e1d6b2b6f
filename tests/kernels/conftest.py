"""Kernels are chosen on this device, whichever it is, and their calls are counted."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM, kernels

COUNTED = {
    "windows": "window_features",
    "segments": "segment_features",
    "slot_plan": "ring_lookup",
    "slot_read": "slot_recall",
}


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen on a CPU, too."""
    monkeypatch.setattr(kernels, "usable", lambda x: x.dtype in kernels.DTYPES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that models called."""
    called: list[str] = []

    def counted(own: Callable, name: str) -> Callable:
        return lambda *given, **more: called.append(name) or own(*given, **more)

    for file, name in COUNTED.items():
        module = import_module(f"dyadlm.kernels.{file}")
        monkeypatch.setattr(module, name, counted(getattr(module, name), name))
    return called


@pytest.fixture
def make_model() -> Callable[..., DyadForCausalLM]:
    """Makes a small model in training mode, in which every part has a say."""

    def make(**fields) -> DyadForCausalLM:
        chosen = {"hidden_size": 16, "num_hidden_layers": 2, **fields}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = DyadForCausalLM(DyadConfig.from_preset("tiny", **chosen)).to(device)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return model.train()

    return make
