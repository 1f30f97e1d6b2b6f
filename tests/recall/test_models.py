"""Models by name: built small, read in chunks as at once, their state counted."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm.errors import UserError
from dyadlm.recall import Reader, build_model, parse_fields

ARCHITECTURES = ["tiny", "llama", "mamba2", "qwen3_next", "olmo_hybrid", "gpt2"]


def reader(name, **given):
    torch.manual_seed(0)
    return Reader(build_model(name, 40, 64, given))


@pytest.fixture(params=ARCHITECTURES)
def any_reader(request):
    return reader(request.param)


def test_models_are_small_alike(any_reader):
    config = any_reader.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 40)


def test_what_is_asked_in_chunks_is_what_the_logits_say(any_reader):
    tokens = torch.randint(0, 40, (2, 33))
    asked = torch.rand(2, 33) < 0.3
    with any_reader.resting():
        logits = any_reader.model(input_ids=tokens, use_cache=False).logits
        whole, _ = any_reader.ask(tokens, asked)
        torch.testing.assert_close(whole, logits[asked], rtol=1e-3, atol=1e-4)
        assert any_reader.continues()
        state, parts = None, []
        for start, stop in ((0, 7), (7, 8), (8, 20), (20, 33)):
            part, state = any_reader.ask(tokens[:, start:stop], asked[:, start:stop], state, keep=True)
            parts.append(part)
    order = torch.cat([asked[:, a:b].nonzero() + torch.tensor([0, a]) for a, b in ((0, 7), (7, 8), (8, 20), (20, 33))])
    expected = logits[order[:, 0], order[:, 1]]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-2, atol=1e-4)


def test_states_are_counted():
    assert reader("llama").state_numbers(50) == 2 * 2 * 50 * 64
    memory, convolution = 2 * 64 * 64, 4 * (2 * 64 + 2 * 64)
    assert reader("mamba2").state_numbers(50) == 2 * (memory + convolution)
    assert reader("qwen3_next").state_numbers(50) == 2 * (memory + convolution)
    ours = reader("tiny")
    assert ours.state_numbers(10) == ours.state_numbers(64) > 0


@pytest.mark.parametrize("name", ["llama", "mamba2", "qwen3_next", "olmo_hybrid"])
def test_sizes_follow_the_width(name):
    narrow = reader(name, hidden_size=32, num_hidden_layers=3)
    assert narrow.continues()
    assert narrow.model.config.num_hidden_layers == 3


def test_the_seed_draws_the_weights():
    one, same, other = (build_model("llama", 20, 32, {}, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_fields_reach_the_configuration(tmp_path):
    given = parse_fields(["hidden_size=32", "num_levels=3", "early=mask"])
    config = build_model("tiny", 20, 64, given).config
    assert (config.hidden_size, config.num_levels, config.early) == (32, 3, "mask")
    config = build_model("llama", 20, 64, parse_fields(["num_hidden_layers=1", "rms_norm_eps=1e-4"])).config
    assert (config.num_hidden_layers, config.rms_norm_eps) == (1, 1e-4)
    config = build_model("gpt2", 20, 64, {"n_embd": 24, "num_hidden_layers": 1}).config
    assert (config.hidden_size, config.n_layer) == (24, 1)


def test_a_folder_is_a_model_to_begin_with(tmp_path):
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    saved = LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path / "model")
    loaded = build_model(str(tmp_path / "model"), 20, 64, {})
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict())
    with pytest.raises(UserError, match="has 24 tokens but the task 30"):
        build_model(str(tmp_path / "model"), 30, 64, {})


@pytest.mark.parametrize(
    ("name", "given", "remedy"),
    [
        ("lama", {}, "nearest is llama"),
        ("bert-of-my-own", {}, "no model"),
        ("tiny", {"hiden_size": 8}, "did you mean 'hidden_size'"),
        ("tiny", {"hidden_size": 0}, "hidden_size"),
        ("llama", {"hiden_size": 8}, "nearest is hidden_size"),
        ("llama", {"hidden_size": "wide"}, "whole number"),
        ("llama", {"hidden_size": 0}, "set others"),
        ("gpt2", {"n_layer": None}, "set others"),
        ("llama", {"num_attention_heads": 7}, "set others"),
        ("olmo_hybrid", {"layer_types": ["linear_attention"] * 2}, "set others"),
    ],
)
def test_what_cannot_be_built_says_what_can(name, given, remedy):
    with pytest.raises(UserError, match=remedy):
        build_model(name, 20, 64, given)


@pytest.mark.parametrize("text", ["hidden_size", "=3", "hidden_size=[1"])
def test_fields_are_field_equals_value(text):
    with pytest.raises(UserError):
        parse_fields([text])
