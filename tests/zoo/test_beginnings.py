"""Models of transformers begin as their authors' do."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from dyadlm import zoo

IDS = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))


def parts(name: str, ending: str, **sizes) -> dict[str, torch.Tensor]:
    model = zoo.build(name, **{"length": 32, "width": 64, "layers": 3} | sizes)
    found = {key: weight.detach() for key, weight in model.named_parameters() if key.endswith(ending)}
    assert found
    return found


def test_a_state_of_gated_deltanet_outlives_a_token():
    biases, decays = parts("gated-delta", ".dt_bias"), parts("gated-delta", ".A_log")
    steps = torch.cat([softplus(bias) for bias in biases.values()])
    assert 0.001 <= steps.min() < steps.max() <= 0.1 + 1e-6
    kept = [torch.exp(-a.exp() * softplus(bias)) for a, bias in zip(decays.values(), biases.values(), strict=True)]
    assert torch.cat(kept).min() > 0.2  # exp(-16 * 0.1)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_mamba_begins_small(name):
    if zoo.find_family(name).missing:
        pytest.skip("mambapy is not installed")
    (embedding,) = parts(name, "embeddings.weight").values()
    assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in parts(name, ".in_proj.weight").values():
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    for weight in parts(name, ".out_proj.weight").values():
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 128) / math.sqrt(3), rel=0.05)
    for decay in zoo.build(name, length=32, width=64, layers=3).named_parameters():
        assert hasattr(decay[1], "_no_weight_decay") == decay[0].endswith(".A_log")


def test_rwkv_weighs_the_token_itself_by_a_zigzag():
    for first in parts("rwkv", ".time_first").values():
        expected = torch.tensor([0.0, 0.5, -0.5] * 22)[:64] + math.log(0.3)
        torch.testing.assert_close(first, expected)


def test_gates_of_xlstm_are_open_to_what_they_multiply():
    for weight in parts("xlstm", ".proj_up_gate.weight").values():
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.05)
    for weight in parts("xlstm", ".igate_preact.weight").values():
        assert not weight.any()  # those of the state begin at zero


def test_dynamic_positions_forget_longer_texts():
    model = zoo.build("ntk", length=16, width=32, layers=1).eval()
    with torch.no_grad():
        before = model(IDS[:, :16], use_cache=False).logits
        longer = model(IDS, use_cache=False).logits
        torch.testing.assert_close(model(IDS[:, :16], use_cache=False).logits, before, rtol=0, atol=0)
        again = model(IDS[:, :32], use_cache=False).logits
    assert (again - longer[:, :32]).abs().max() > 1e-5  # the base of its own length
