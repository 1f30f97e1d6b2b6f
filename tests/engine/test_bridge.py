"""A torch model decodes through the engine with the same tokens, and its state moves both ways."""

import copy as copying
import logging
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.engine.bridge import decoder_of, fast_decoding, refusal
from dyadlm.errors import UserError
from dyadlm.model.modeling import DyadOutput

TEXT = b"To be, or not to be: that is the question.\n\nWhether 'tis nobler in the mind to suffer\nThe slings. " * 3


def make_model(**fields) -> DyadForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 2, "slot_entries": 64, **fields}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def model() -> DyadForCausalLM:
    return make_model()


def ids(count: int, rows: int = 1) -> torch.Tensor:
    return torch.stack([torch.tensor(list(TEXT[11 * row :][:count])) for row in range(rows)])


def count_steps(monkeypatch) -> list[int]:
    from dyadlm.engine import bridge

    seen: list[int] = []
    step = bridge.Decoder.step
    monkeypatch.setattr(bridge.Decoder, "step", lambda self, *rest: (seen.append(1), step(self, *rest))[1])
    return seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}])
def test_generate_gives_the_tokens_of_torch(model, rows, sampling, monkeypatch):
    """Also for rows of several lengths, padded on the left."""
    prompt, mask = ids(40, rows), torch.ones(rows, 40, dtype=torch.long)
    for row in range(1, rows):
        prompt[row, : 5 * row], mask[row, : 5 * row] = 256, 0
    options = {"max_new_tokens": 40, "attention_mask": mask, "eos_token_id": None, **sampling}
    steps = count_steps(monkeypatch)
    torch.manual_seed(1)
    fast = model.generate(prompt, **options)
    assert len(steps) == 39  # the first new token comes with the prompt
    torch.manual_seed(1)
    monkeypatch.setattr("dyadlm.engine.bridge.refusal", lambda model: "the test says so")
    assert torch.equal(fast, model.generate(prompt, **options))
    assert len(steps) == 39


def test_state_moves_both_ways_inside_a_document(model):
    """Torch reads, the engine reads, torch reads on, and the state is saved: all as torch alone."""
    tokens = ids(120)
    with torch.no_grad():
        alone = model(tokens, use_cache=True)
        cache, parts = DyadCache(), []
        parts.append(model(tokens[:, :37], past_key_values=cache, use_cache=True).logits)
        with fast_decoding(model):
            parts += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(37, 74)]
        assert cache.rows is not None
        assert (cache.batch_size, cache.get_seq_length()) == (1, 74)
        parts.append(model(tokens[:, 74:100], past_key_values=cache, use_cache=True).logits)
        assert cache.rows is None
        with fast_decoding(model):
            parts += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(100, 120)]
    scale = alone.logits.std()
    assert ((torch.cat(parts, 1) - alone.logits).abs().max() / scale) < 1e-5
    found, expected = cache.tensors(), alone.past_key_values.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_copies_are_independent(model, monkeypatch):
    tokens, steps = ids(60), count_steps(monkeypatch)
    with torch.no_grad(), fast_decoding(model):
        cache = model(tokens[:, :30], use_cache=True).past_key_values
        model(tokens[:, 30:31], past_key_values=cache)
        twin = cache.copy()
        first = model(tokens[:, 31:32], past_key_values=cache).logits
        model(tokens[:, 40:41], past_key_values=cache)
        assert torch.equal(first, model(tokens[:, 31:32], past_key_values=twin).logits)
    assert len(steps) == 4


def test_changed_weights_are_seen(model, monkeypatch):
    prompt, steps = ids(30), count_steps(monkeypatch)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    before = model.generate(prompt, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    after = model.generate(prompt, **options)
    assert not torch.equal(before, after)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert torch.equal(before, model.generate(prompt, **options))
    assert len(steps) == 33


def test_a_state_follows_changed_weights(monkeypatch):
    """What dual levels add is kept in the engine's state, by the weights that made it."""
    model, tokens, steps = make_model(num_levels=6), ids(80), count_steps(monkeypatch)
    told = []
    for fast in (True, False):
        copy = make_model(num_levels=6)
        with torch.no_grad():
            cache = copy(tokens[:, :60], use_cache=True).past_key_values
            with fast_decoding(copy) if fast else nullcontext():
                copy(tokens[:, 60:61], past_key_values=cache)
            for layer in copy.model.layers:
                for up in layer.tower.up_nodes.values():
                    up.weight.mul_(-1)
            with fast_decoding(copy) if fast else nullcontext():
                told.append(copy(tokens[:, 61:62], past_key_values=cache).logits)
    assert len(model.model.layers[0].tower.up_nodes) > 0
    assert len(steps) == 2
    assert ((told[0] - told[1]).abs().max() / told[1].std()) < 1e-5


def test_what_asks_for_more_than_logits_is_read_by_torch(model, monkeypatch):
    steps = count_steps(monkeypatch)
    with torch.no_grad(), fast_decoding(model):
        cache = model(ids(20), use_cache=True).past_key_values
        output = model(ids(1), past_key_values=cache, use_cache=True, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        restarted = model(ids(1), past_key_values=cache, position_ids=torch.zeros(1, 1, dtype=torch.long))
        assert restarted.past_key_values.position.item() == 1
        assert model(ids(1), past_key_values=cache, use_cache=False).past_key_values is None
        assert cache.position.item() == 1
        with pytest.raises(UserError, match="attention"):
            model(ids(1), past_key_values=cache, attention_mask=torch.ones(3, 1))
        with pytest.raises(UserError, match="must be the DyadCache"):
            model(ids(1), past_key_values=DynamicCache())
        for field, asked in (("return_dict", tuple), ("output_hidden_states", DyadOutput)):
            setattr(model.config, field, field != "return_dict")
            told = model(ids(1), past_key_values=cache)
            assert type(told) is asked
            assert field == "return_dict" or len(told.hidden_states) == 3
            setattr(model.config, field, field == "return_dict")
    assert not steps
    with fast_decoding(model):
        told = model(ids(1), past_key_values=cache)
    assert told.logits.requires_grad  # gradients are on, and the engine has none
    with torch.no_grad(), fast_decoding(model):
        assert not model(ids(1), past_key_values=told.past_key_values).logits.requires_grad
    assert len(steps) == 1


def test_a_token_outside_the_vocabulary_is_an_error(model):
    with torch.no_grad(), fast_decoding(model):
        cache = model(ids(20), use_cache=True).past_key_values
        for token in (259, -1):
            with pytest.raises(IndexError):
                model(torch.tensor([[token]]), past_key_values=cache)


def test_reasons_for_torch_are_named_in_the_log(model, caplog):
    assert refusal(model) is None
    assert "training" in (refusal(model.train()) or "")
    assert "not in float32" in (refusal(make_model().double()) or "")
    watched = make_model()
    watched.model.norm.register_forward_hook(lambda *rest: None)
    assert "hooks" in (refusal(watched) or "")
    assert isinstance(watched.model.norm, nn.Module)
    with caplog.at_level(logging.INFO, "dyadlm.engine"):
        make_model(selector="dense", selector_heads=4).generate(ids(8), max_new_tokens=2, do_sample=False)
    assert "selector" in caplog.text


# ---- What the engine must see, or leave to torch


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.5


def doubled(module):
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)


def with_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
            part.train()


def in_bfloat16(model):
    model.model.layers[0].mlp.bfloat16()


CHANGES = {
    "a module of another kind": lambda model: setattr(model.model.layers[0].mlp.down, "__class__", Louder),
    "another forward": lambda model: doubled(model.model.layers[0].mlp),
    "dropout that goes on": with_dropout,
    "weights that follow from others": lambda model: torch.nn.utils.parametrizations.weight_norm(
        model.model.layers[0].mlp.down
    ),
    "one part in another dtype": in_bfloat16,
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_were_changed_are_left_to_torch(model, change):
    model.generate(ids(8), max_new_tokens=2)
    CHANGES[change](model)
    assert decoder_of(model) is None
    assert "_kept_decoder" not in vars(model)


def test_changed_models_still_generate(model, monkeypatch):
    steps = count_steps(monkeypatch)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down)
    assert model.generate(ids(8), max_new_tokens=3, eos_token_id=None).shape == (1, 11)
    assert not steps


@pytest.mark.parametrize("write", ["data", "numpy", "swap"])
def test_weights_that_change_behind_the_back_of_torch(model, write, monkeypatch):
    prompt, options = ids(30), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    model.generate(prompt, **options)
    weight = model.model.layers[0].mlp.down.weight
    if write == "data":
        weight.data.mul_(-3)
    elif write == "numpy":
        weight.detach().numpy()[:] *= -3
    else:
        weight.data = -3 * weight.data
    steps = count_steps(monkeypatch)
    fast = model.generate(prompt, **options)
    assert len(steps) == 7
    monkeypatch.setattr("dyadlm.engine.bridge.refusal", lambda model: "the test says so")
    assert torch.equal(fast, model.generate(prompt, **options))


def test_a_changed_configuration_is_seen(model):
    before = decoder_of(model)
    assert decoder_of(model) is before
    model.config.slot_scope = "stream"
    after = decoder_of(model)
    assert after is not before
    assert after.engine.shape.keeps_slots


def test_gates_far_below_zero(model, monkeypatch):
    """The exponential of 89 is no float32 any more."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(1000)
    prompt, options = ids(30), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True}
    steps = count_steps(monkeypatch)
    fast = model.generate(prompt, return_dict_in_generate=True, **options)
    assert len(steps) == 7
    monkeypatch.setattr("dyadlm.engine.bridge.refusal", lambda model: "the test says so")
    slow = model.generate(prompt, return_dict_in_generate=True, **options)
    for found, expected in zip(fast.logits, slow.logits, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_beams_asked_for_in_any_way_are_left_to_torch(model, monkeypatch):
    steps = count_steps(monkeypatch)
    model.generate(ids(8), GenerationConfig(num_beams=2, max_new_tokens=3))
    model.generate(ids(8), generation_config=GenerationConfig(num_beams=2, max_new_tokens=3))
    model.generate(ids(8), num_beams=2, max_new_tokens=3)
    assert not steps


def test_hooks_on_all_modules(model):
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *given: None)
        try:
            assert decoder_of(model) is None
        finally:
            handle.remove()
    assert decoder_of(model) is not None


def test_a_model_made_in_inference_mode_generates():
    with torch.inference_mode():
        model = make_model()
        assert model.generate(ids(8), max_new_tokens=3, eos_token_id=None).shape == (1, 11)


def test_threads_do_not_disturb_each_other(model):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompts = [ids(20), ids(30), ids(9), ids(25)]
    expected = [model.generate(prompt, **options) for prompt in prompts]
    wrong = []

    def work(number: int) -> None:
        for _ in range(8):
            try:
                if not torch.equal(model.generate(prompts[number], **options), expected[number]):
                    wrong.append(number)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inside_a_context_weights_are_looked_at_again(model, monkeypatch):
    prompt, options = ids(30), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with fast_decoding(model):
        model.generate(prompt, **options)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        fast = model.generate(prompt, **options)
    monkeypatch.setattr("dyadlm.engine.bridge.refusal", lambda model: "the test says so")
    assert torch.equal(fast, model.generate(prompt, **options))


def test_pickles_and_copies_carry_neither_the_engine_nor_its_weights(model):
    size = len(pickle.dumps(model))
    with torch.no_grad(), fast_decoding(model):
        cache = model(ids(20), use_cache=True).past_key_values
        state_size = len(pickle.dumps(cache))
        model(ids(1), past_key_values=cache)
        assert cache.rows is not None
        for twin in (pickle.loads(pickle.dumps(cache)), copying.deepcopy(cache)):  # noqa: S301 - our own
            expected = model(ids(1), past_key_values=cache.copy()).logits
            torch.testing.assert_close(model(ids(1), past_key_values=twin).logits, expected, rtol=1e-4, atol=1e-4)
        model(ids(1), past_key_values=cache)
        assert len(pickle.dumps(cache)) < 1.2 * state_size
    assert len(pickle.dumps(model)) < 1.2 * size
    assert len(pickle.dumps(copying.deepcopy(model))) < 1.2 * size
