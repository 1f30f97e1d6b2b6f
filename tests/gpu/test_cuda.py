"""On a GPU: every preset computes there what it computes on the CPU, in float32 and bfloat16, and states travel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bfloat16_gradients import assert_kernels_as_exact
from dyadlm import DyadCache, DyadConfig, DyadForCausalLM, kernels
from dyadlm.data import byte_tokenizer
from dyadlm.generate.sampling import Sampling
from dyadlm.generate.session import Session
from dyadlm.model.presets import PRESETS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Fewer blocks than the presets have: each kind of block stands in two.
VARIANTS: dict[str, dict[str, Any]] = {
    **{preset: {"preset": preset, "num_hidden_layers": 2} for preset in PRESETS},
    "n-grams": {"preset": "tiny", "ngram_sizes": [2, 3, "word"]},
    "ring": {"preset": "tiny", "slot_evict": "ring", "slot_scope": "stream"},
    "transport": {"preset": "tiny", "level_feature": "transport"},
    "dual": {"preset": "tiny", "level_alignment": ["sliding", "dual", "dual", "block"]},
}


def speaking(variant: str, **fields: Any) -> DyadForCausalLM:
    """A model in which every part has a say."""
    torch.manual_seed(0)
    chosen = dict(VARIANTS[variant])
    model = DyadForCausalLM(DyadConfig.from_preset(chosen.pop("preset"), **chosen, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def text(rows: int, length: int) -> torch.Tensor:
    generator = np.random.default_rng(3)
    words = ["the", "old", "error:", "42,", "river", "it's", "a", "of", "lazy."]
    ends = [" ", " ", " ", "\n"]

    def row() -> list[int]:
        pairs = zip(generator.choice(words, length), generator.choice(ends, length), strict=True)
        return list("".join(word + end for word, end in pairs).encode())[:length]

    return torch.tensor([row() for _ in range(rows)])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_those_of_the_cpu(variant: str) -> None:
    model, ids = speaking(variant).train(), text(2, 300)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    there = speaking(variant).train().cuda()
    there(input_ids=ids.cuda(), labels=ids.cuda(), use_cache=False).loss.backward()
    found = {name: p.grad for name, p in there.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if expected[name].norm() > 1e-6:
            assert distance(gradient, expected[name]) < 2e-3, name


@pytest.mark.skipif(not kernels.INSTALLED, reason="needs Triton")
@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_kernels_are_as_exact_in_bfloat16(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kernels_as_exact(speaking(preset).train().cuda(), text(2, 300).cuda(), monkeypatch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_logits_equal_those_of_the_cpu(variant: str, dtype: torch.dtype, bound: float) -> None:
    model, ids = speaking(variant), text(2, 333)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = model.cuda().to(dtype)(input_ids=ids.cuda(), use_cache=False).logits
    assert distance(found, expected) < bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_one_by_one_equal_a_chunk(variant: str) -> None:
    model, ids, cache = speaking(variant).cuda(), text(3, 90).cuda(), DyadCache()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        parts = [model(input_ids=ids[:, :40], past_key_values=cache, use_cache=True).logits]
        parts += [
            model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(40, 90)
        ]
    assert distance(torch.cat(parts, 1), whole) < 1e-4


def test_a_state_travels_between_devices(tmp_path: Path) -> None:
    model, ids, cache = speaking("tiny").cuda(), text(1, 100), DyadCache()
    with torch.no_grad():
        model(input_ids=ids.cuda(), past_key_values=cache, use_cache=True)
    cache.save(tmp_path / "state.safetensors", model.config)
    taken = DyadCache.load(tmp_path / "state.safetensors", model.config)
    with torch.no_grad():
        expected = model(input_ids=ids[:, :50].cuda(), past_key_values=cache, use_cache=True).logits
        found = model.cpu()(input_ids=ids[:, :50], past_key_values=taken, use_cache=True).logits
    assert distance(expected, found) < 1e-4


def test_greedy_text_is_that_of_the_cpu() -> None:
    texts = []
    for device in ("cpu", "cuda"):
        session = Session(speaking("tiny").to(device), byte_tokenizer())
        session.read_prompt("The old river")
        texts.append("".join(session.write(40, Sampling(temperature=0))))
    assert texts[0] == texts[1]


def test_generate_of_transformers_runs() -> None:
    model, ids = speaking("tiny").cuda(), text(2, 30).cuda()
    output = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=256)
    assert output.shape == (2, 50)
    assert output.device.type == "cuda"


def test_compiled_blocks_equal_the_model() -> None:
    model, ids = speaking("tiny").cuda().train(), text(2, 256).cuda()
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    for layer in model.model.layers:
        layer.compile()
    found = model(input_ids=ids, labels=ids, use_cache=False).loss
    found.backward()
    assert abs(float(found - expected)) < 1e-3


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "paper"])  # its selector asks the host
def test_no_operation_waits(preset: str) -> None:
    """As torch itself watches it, training step and token."""
    model, ids, cache = speaking(preset).cuda(), text(2, 64).cuda(), DyadCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
