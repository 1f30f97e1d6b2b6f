"""Longer texts than trained: stretched positions do what their papers say, and losses differ in the past alone."""

import logging

import pytest
import torch
from torch.nn.functional import cross_entropy

from dyadlm import zoo
from dyadlm.errors import UserError
from dyadlm.zoo.mixers.relative import BUCKETS, bucket
from dyadlm.zoo.positions import LengthLoss, length_losses, stretch

TOKENS = torch.randint(0, 259, (300,), generator=torch.Generator().manual_seed(0))


def frequencies(model) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq


@pytest.fixture(scope="module")
def llama():
    model = zoo.build("llama", length=16, width=32, layers=1).eval()
    with torch.no_grad():  # so that attention is far from uniform, as in a trained model
        for weight in model.parameters():
            weight.mul_(8)
    return model


def test_interpolated_positions_are_divided(llama):
    torch.testing.assert_close(frequencies(stretch(llama, "interpolated", 16, 4)), frequencies(llama) / 4)


def test_the_base_is_raised_beyond_the_trained_length_alone(llama):
    model = stretch(llama, "ntk", 16, 4)
    ids = TOKENS[None, :16]
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    model(TOKENS[None, :32])
    size = frequencies(llama).numel() * 2
    base = 10_000.0 * (4 * 32 / 16 - 3) ** (size / (size - 2))
    torch.testing.assert_close(frequencies(model), base ** (-torch.arange(0, size, 2) / size), rtol=1e-5, atol=0)


def test_yarn_keeps_fast_rotations_and_divides_slow_ones(llama):
    plain, stretched = frequencies(llama), frequencies(stretch(llama, "yarn", 16, 4))
    assert (stretched <= plain * (1 + 1e-6)).all()
    torch.testing.assert_close(stretched[-1], plain[-1] / 4)


@pytest.mark.parametrize("name", ["interpolated", "ntk", "yarn"])
def test_families_of_stretched_positions_differ_beyond_the_trained_length(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    plain, model = (zoo.build(kind, length=16, width=32, layers=1) for kind in ("llama", name))
    model.load_state_dict(plain.state_dict())
    ids = TOKENS[None, :64]
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-4
    stretch(plain, name, 16, 4)
    assert not caplog.records  # transformers warns of fields that a kind of positions does not have


def test_losses_are_of_the_same_tokens(llama):
    found = length_losses(llama, TOKENS[:128], 16, windows=1)
    assert [one.multiple for one in found] == [1, 2, 4, 8]
    for one in found:
        window = TOKENS[None, 128 - one.multiple * 16 : 128]
        with torch.no_grad():
            expected = cross_entropy(llama(window).logits[0, -9:-1], window[0, -8:])
        assert one.loss == pytest.approx(float(expected), rel=1e-6)


def test_stretching_changes_the_losses(llama):
    plain, pulled = (length_losses(llama, TOKENS, 16, scaling, windows=2) for scaling in (None, "interpolated"))
    assert pulled[0].loss == pytest.approx(plain[0].loss, rel=1e-5)
    assert pulled[3].loss != pytest.approx(plain[3].loss, rel=1e-5)


def test_a_model_without_more_positions_has_no_loss():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=1, n_positions=32))
    assert length_losses(model, TOKENS, 16, windows=1)[2:] == [LengthLoss(4, None), LengthLoss(8, None)]


def test_wrong_requests(llama):
    with pytest.raises(UserError, match="300 tokens, but 800 are needed"):
        length_losses(llama, TOKENS, 100)
    with pytest.raises(UserError, match="no scaling 'yarm'; the nearest is yarn"):
        stretch(llama, "yarm", 16, 2)
    with pytest.raises(UserError, match="no rotary positions"):
        stretch(zoo.build("linear", length=16, width=32, layers=1), "yarn", 16, 2)


def test_buckets_of_distances_are_those_of_t5():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(300)
    expected = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=BUCKETS)
    assert torch.equal(bucket(distance), expected)
