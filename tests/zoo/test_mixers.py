"""The layers of the zoo: in pieces as whole, and what they compute beside the definitions of their papers."""

import math

import pytest
import torch
from torch.nn.functional import elu
from transformers import AutoModelForCausalLM

from dyadlm.errors import UserError
from dyadlm.zoo import Mixer, MixerConfig, MixerForCausalLM, register_mixer
from dyadlm.zoo.mixer import MIXERS, find_mixer
from dyadlm.zoo.mixers.linear_attention import PerformerAttention, linear_attention
from dyadlm.zoo.mixers.min_gru import recurrence as min_gru
from dyadlm.zoo.mixers.patterns import PATTERNS, pattern
from dyadlm.zoo.mixers.rwkv7 import recurrence

# By s5-pytorch and yet-another-retnet.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

NAMES = [
    "linear",
    "performer",
    "aft",
    "fmm",
    "pattern",
    "relative",
    "s4d",
    "hyena",
    "mingru",
    "rwkv7",
    "s5",
    "retention",
]


def config(mixer: str, **fields) -> MixerConfig:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2}
    return MixerConfig(**small | {"mixer": mixer, "trained_length": 64} | fields)


def made(name: str, **fields) -> MixerForCausalLM:
    pytest.importorskip({"s5": "s5", "retention": "yet_another_retnet"}.get(name, "torch"))
    torch.manual_seed(0)
    return MixerForCausalLM(config(name, **fields)).eval()


def mixer_of(name: str) -> Mixer:
    return made(name).layers[0].mixer


@pytest.mark.parametrize("name", NAMES)
def test_in_pieces_of_any_length_as_whole(name):
    model = made(name)
    ids = torch.randint(0, 256, (2, 41), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        if not model.keeps_state:
            assert model(ids).past_key_values is None
            return
        cache, pieces = None, []
        for begin, end in [(0, 1), (1, 2), (2, 15), (15, 16), (16, 41)]:
            output = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert cache.get_seq_length() == 41
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_weight_and_no_earlier_token(name):
    layer = mixer_of(name).train()
    if name == "aft":
        layer.gain.data.fill_(0.1)  # 0 at first, which keeps the weights of distances from moving in the first step
    x = torch.randn(1, 13, 32, requires_grad=True)
    out, _ = layer(x)
    (gradient,) = torch.autograd.grad(out[:, 5].square().sum(), x, retain_graph=True)
    assert gradient[:, 6:].abs().max() <= 1e-5 * gradient.abs().max()
    out.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_training_in_bfloat16_computes_the_same(name):
    """But for rounding, and at the end of a text as at its beginning."""
    model = made(name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim == 2 and weight.std() < 0.03 else 1)
    ids = torch.randint(0, 256, (2, 256), generator=torch.Generator().manual_seed(2))
    whole = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).logits.float()
    assert (rounded - whole)[:, -32:].square().mean().sqrt() < 0.05 * whole.std()


def turned(x, position):
    """(..., E), number i and number i + E / 2 as a complex number that turns with the position."""
    half = x.shape[-1] // 2
    turn = torch.polar(torch.ones(half), position * 10_000.0 ** (-torch.arange(half) / half))
    moved = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([moved.real, moved.imag, x[..., 2 * half :]], -1)


def test_linear_attention_is_its_definition():
    q, k = (torch.rand(1, 2, 7, 5) for _ in range(2))
    v = torch.randn(1, 2, 7, 3)
    read, sums = linear_attention(q, k, v, None)
    for time in range(7):
        near = [(turned(q[:, :, time], time) * turned(k[:, :, one], one)).sum(-1) for one in range(time + 1)]
        plain = [(q[:, :, time] * k[:, :, one]).sum(-1) for one in range(time + 1)]
        weighted = (torch.stack(near, -1)[..., None] * v[:, :, : time + 1]).sum(2)
        torch.testing.assert_close(read[:, :, time], weighted / torch.stack(plain).sum(0)[..., None])
    keys = torch.stack([turned(k[:, :, time], time) for time in range(7)], 2)
    torch.testing.assert_close(sums[0], torch.einsum("bhtf,bhte->bhfe", keys, v))


def test_random_features_are_near_the_softmax_kernel():
    torch.manual_seed(0)
    layer = PerformerAttention(config("performer"), features=4096)
    x, y = 0.5 * torch.randn(2, 1, 2, 6, 16)
    queries, keys = layer.features(x, y)
    near = queries @ keys.transpose(-1, -2)
    exact = torch.exp(x @ y.transpose(-1, -2) / math.sqrt(16))
    shares = near / near.sum(-1, keepdim=True), exact / exact.sum(-1, keepdim=True)
    assert ((shares[0] / shares[1]).log().abs() < 0.25).all()
    assert mixer_of("performer").projection.shape == (2, 44, 16)  # 16 log 16


def test_a_large_query_still_chooses_among_keys():
    """Its features would all be less than the least one, and it would read all tokens alike."""
    torch.manual_seed(0)
    layer = PerformerAttention(config("performer"), features=4096)
    x, y = 12 * torch.randn(1, 2, 6, 16), 0.5 * torch.randn(1, 2, 6, 16)
    queries, keys = layer.features(x, y)
    near = queries @ keys.transpose(-1, -2)
    assert (near.amax(-1) / near.amin(-1)).min() > 2


def test_attention_free_is_its_definition():
    layer, x = made("aft", options={"window": 4}).layers[0].mixer, torch.randn(1, 9, 32)
    with torch.no_grad():
        layer.gain.fill_(0.7)
        layer.bias.fill_(-0.2)
    found, _ = layer(x)
    near = layer.near
    added = 0.7 * (near - near.mean(1, keepdim=True)) / near.std(1, keepdim=True) - 0.2
    for time in range(9):
        weights = layer.key(x[:, : time + 1])
        for distance in range(min(4, time + 1)):
            weights[:, time - distance] += added[:, 3 - distance].repeat_interleave(16)
        weights, values = weights.exp(), layer.value(x[:, : time + 1])
        mean = (weights * values).sum(1) / weights.sum(1)
        torch.testing.assert_close(found[:, time], layer.out(torch.sigmoid(layer.query(x[:, time])) * mean))


def test_attention_free_forgets_the_nearest_tokens_without_losing_the_others():
    """Keys that outweigh all others by far, and distances that weigh nothing: what is left is exact."""
    layer, x = made("aft", options={"window": 4}).layers[0].mixer, torch.randn(1, 9, 32)
    with torch.no_grad():
        layer.bias.fill_(-60.0)
        layer.key.weight.zero_()
        values = layer.value(x)
        found, _ = layer(x)
    expected = layer.out(torch.sigmoid(layer.query(x[:, 8])) * values[:, :5].mean(1))
    torch.testing.assert_close(found[:, 8], expected)
    with torch.no_grad():
        layer.key.weight.fill_(1.0)
        x[:, 5:] += 20.0  # the largest keys, all within the window
        weights = layer.key(x[:, :5]).clamp(-15, 15).exp()
        mean = (weights * layer.value(x[:, :5])).sum(1) / weights.sum(1)
        torch.testing.assert_close(layer(x)[0][:, 8], layer.out(torch.sigmoid(layer.query(x[:, 8])) * mean))


def test_min_gru_is_its_recurrence():
    layer, x = mixer_of("mingru"), torch.randn(2, 11, 32)
    found, (last, state) = layer(x)
    hidden, weights = torch.zeros(2, 32), layer.near.weight[:, 0]
    for time in range(11):
        near = layer.near.bias + sum(x[:, time - back] * weights[:, 3 - back] for back in range(min(time, 3) + 1))
        gate, candidate = torch.sigmoid(layer.gate(near)), layer.candidate(near)
        hidden = (1 - gate) * hidden + gate * torch.where(candidate > 0, candidate + 0.5, torch.sigmoid(candidate))
        torch.testing.assert_close(found[:, time], layer.out(hidden), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, hidden)
    assert torch.equal(last, x[:, -3:])


def test_min_gru_loses_no_digits_in_a_long_text():
    gate, candidate = torch.full((1, 4096, 1), 9.0), torch.randn(1, 4096, 1)
    exact = min_gru(gate.double(), candidate.double(), None)
    torch.testing.assert_close(min_gru(gate, candidate, None).double(), exact, atol=0, rtol=1e-3)


def test_a_diagonal_state_space_is_its_recurrence():
    layer, x = mixer_of("s4d"), torch.randn(2, 11, 32)
    found, state = layer(x)
    poles = torch.complex(-layer.log_decay.exp(), layer.turn)
    moved = torch.exp(poles * layer.log_step.exp()[:, None])
    taken, read = (moved - 1) / poles, torch.complex(layer.read_real, layer.read_imaginary)
    hidden = torch.zeros(2, 32, layer.size, dtype=torch.complex64)
    for time in range(11):
        hidden = moved * hidden + taken * x[:, time, :, None]
        out = 2 * (read * hidden).sum(-1).real + layer.skip * x[:, time]
        expected = torch.nn.functional.glu(layer.out(torch.nn.functional.gelu(out)), -1)
        torch.testing.assert_close(found[:, time], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, hidden, atol=1e-5, rtol=1e-4)


def test_memories_are_read_by_every_token_and_before_all_others():
    layer = made("relative", options={"memories": 3}).layers[0].mixer
    x = torch.randn(1, 6, 32)
    found, _ = layer(x)
    query, key, value = (layer.split(part(x)) for part in (layer.query, layer.key, layer.value))
    for time in range(6):
        keys, values = (
            torch.cat([m[None], part[:, :, : time + 1]], 2)
            for m, part in zip(layer.memories, (key, value), strict=True)
        )
        scores = (query[:, :, time, None] * keys).sum(-1) / math.sqrt(16)  # the biases are still zero
        mean = (scores.softmax(-1)[..., None] * values).sum(2).flatten(1)
        torch.testing.assert_close(found[:, time], layer.out(mean))


def test_tiles_of_rwkv7_are_its_recurrence():
    r, k, v, c, a = torch.randn(5, 2, 3, 37, 4, dtype=torch.float64)
    decay, a, c = -0.6 * torch.rand_like(r), a.sigmoid(), torch.nn.functional.normalize(c, dim=-1)
    state = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found, after = recurrence(decay, r, k, v, c, a, state)
    for t in range(37):
        forgotten = c[:, :, t, :, None] * (a * c)[:, :, t, None]
        state = state @ (torch.diag_embed(decay[:, :, t].exp()) - forgotten) + v[:, :, t, :, None] * k[:, :, t, None]
        torch.testing.assert_close(found[:, :, t], (state @ r[:, :, t, :, None])[..., 0])
    torch.testing.assert_close(after, state)


def test_hyena_is_a_sum_over_distances():
    layer, x = mixer_of("hyena"), torch.randn(1, 10, 32)
    first, second, value = layer.short(layer.inputs(x).transpose(1, 2))[..., :10].chunk(3, 1)
    inputs, weights = second * value, layer.filter(10)
    read = torch.stack([(inputs[..., : t + 1] * weights[:, : t + 1].flip(-1)).sum(-1) for t in range(10)], -1)
    expected = layer.out((first * (read + layer.skip[:, None] * inputs)).transpose(1, 2))
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-5, rtol=1e-4)


def test_a_band_is_attention_to_the_last_tokens():
    layer = made("fmm", options={"band": 3}).layers[0].mixer
    with torch.no_grad():
        layer.near_weight.fill_(0.4)
        layer.far_weight.fill_(-0.3)
    x = torch.randn(1, 9, 32)
    query, key, value = (layer.split(part(x)) for part in (layer.query, layer.key, layer.value))
    far, _ = linear_attention(elu(query) + 1, elu(key) + 1, value, None)
    query, key = (torch.stack([turned(one[:, :, t], t) for t in range(9)], 2) for one in (query, key))
    near_weight, far_weight = (1 / (1 + math.exp(-weight)) for weight in (0.4, -0.3))
    for time in range(9):
        near = slice(max(0, time - 2), time + 1)
        scores = (query[:, :, time, None] * key[:, :, near]).sum(-1) / math.sqrt(16)
        mean = (scores.softmax(-1)[..., None] * value[:, :, near]).sum(2)
        mixed = near_weight * mean + far_weight * far[:, :, time]
        torch.testing.assert_close(layer(x)[0][:, time], layer.out(mixed.flatten(1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_causal_and_does_not_change_with_the_text(name):
    seen = pattern(name, 90, 8)
    assert not seen.triu(1).any()
    assert seen.diagonal().all()
    assert torch.equal(pattern(name, 61, 8), seen[:61, :61])
    assert seen[-1].sum() < 40
    near = {"dilated": [89, 87, 85], "block": [89, 88, 80]}.get(name, [89, 88, 82])
    assert seen[-1, near].all()


def test_half_of_the_heads_are_not_dilated():
    layer = made("pattern", options={"pattern": "dilated"}).layers[0].mixer
    seen = layer.mask(90)
    assert len(seen) == layer.heads >= 2
    for head, mask in enumerate(seen):
        assert torch.equal(mask, pattern("near" if head < layer.heads // 2 else "dilated", 90, layer.window))
    assert seen[0, -1, [88, 89]].all()
    assert not seen[-1, -1, 88]


def test_a_family_of_ones_own_is_twenty_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("dyadlm.zoo.mixer.MIXERS", dict(MIXERS))

    class Shift(Mixer):
        keeps_state = True

        def forward(self, x, state=None):
            before = x.new_zeros(len(x), 1, x.shape[-1]) if state is None else state
            return torch.cat([before, x], 1)[:, :-1], x[:, -1:]

    register_mixer("shift", Shift)
    with pytest.raises(UserError, match="already"):
        register_mixer("shift", find_mixer("linear"))
    model = MixerForCausalLM(config("shift")).eval()
    ids = torch.arange(1, 11)[None]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(
        written, loaded.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    )
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(
        beams, model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False, pad_token_id=0)
    )


def test_what_a_mixer_cannot_do_is_said():
    with pytest.raises(UserError, match="There is no mixer 'magic'"):
        MixerForCausalLM(config("magic"))
    with pytest.raises(UserError, match="takes no option widht"):
        MixerForCausalLM(config("linear", options={"widht": 3}))
    with pytest.raises(UserError, match="no padding on the left"):
        made("linear")(torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[0, 1, 1]]))
    with pytest.raises(UserError, match="There is no pattern"):
        made("pattern", options={"pattern": "spiral"})
