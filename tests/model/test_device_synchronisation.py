"""Training and decoding never wait for the device: no operation in them reads a value back or copies from the host."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.model.presets import PRESETS

# Results of these have a shape or a value that the host must know, or are copied from it.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_dim",
    "unique_consecutive",
}


class Waits(TorchDispatchMode):
    """Counts the operations that a device would wait in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = function.__name__.split(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs is not None and kwargs.get("output_size") is None
        if name in WAITING or masked or unsized:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def test_operations_that_wait_are_seen() -> None:
    x = torch.arange(4.0)
    with Waits() as waits:
        bool((x > 1).any())
        x[x > 1]
        torch.tensor([1, 2])
        x.nonzero()
        x.sum()
    assert sum(waits.found.values()) == 4


# A selector runs the levels that were chosen, and so the host asks which.
SELECTING = {"paper"}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - SELECTING))
def test_no_step_waits(preset: str) -> None:
    model = DyadForCausalLM(DyadConfig.from_preset(preset, hidden_size=64, num_hidden_layers=2)).eval()
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = DyadCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        with Waits() as chunk:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        with Waits() as token:
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model.train()
    with Waits() as training:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert min(waits.operations for waits in (chunk, token, training)) > 100, "the model in torch was not asked"
    assert not chunk.found | token.found | training.found
