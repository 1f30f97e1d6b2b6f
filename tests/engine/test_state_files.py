"""State files: whatever is not the whole state of this very model is refused, by torch and by the engine."""

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dyadlm import DyadCache, UserError
from dyadlm.engine import Engine
from dyadlm.model.empty_state import identity_of
from dyadlm.state_file import FORMAT, holds_memory

from .conftest import engine_of, make_model, text


def state_of(model, count: int = 40) -> DyadCache:
    with torch.no_grad():
        return model(torch.from_numpy(text(count))[None], use_cache=True).past_key_values


def head_of(path) -> dict[str, str]:
    with safe_open(str(path), framework="np") as file:
        return dict(file.metadata())


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def path(model, tmp_path):
    state_of(model).save(tmp_path / "state", model.config, identity_of(model))
    return tmp_path / "state"


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name: str, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


def below_zero(tensor):
    return -np.ones_like(tensor)


def nothing(tensor):
    return np.full_like(tensor, np.nan)


DAMAGES = {
    "no position": without("position"),
    "no ring": without("layers.0.rings.0"),
    "no last ring": without("layers.0.rings.3"),
    "no marks": without("text.marks.0"),
    "no slots": without("layers.2.slots.1"),
    "no rings at all": lambda tensors: {name: part for name, part in tensors.items() if ".rings." not in name},
    "nothing at all": lambda tensors: {},
    "more": lambda tensors: {**tensors, "layers.9.rings.0": np.zeros((1, 1, 2), np.float32)},
    "another name": lambda tensors: {**tensors, "foo": np.zeros(1, np.float32)},
    "another width": changed("layers.0.rings.0", lambda tensor: tensor[..., :-1].copy()),
    "more rows": changed("layers.0.rings.0", lambda tensor: np.concatenate([tensor, tensor])),
    "no dimension": changed("position", lambda tensor: tensor.reshape(())),
    "not numbers": changed("layers.0.rings.0", nothing),
    "half precision": changed("layers.0.rings.0", lambda tensor: tensor.astype(np.float16)),
    "position in floats": changed("position", lambda tensor: tensor.astype(np.float32)),
    "position in 32 bits": changed("position", lambda tensor: tensor.astype(np.int32)),
    "position below zero": changed("position", below_zero),
    "counts below zero": changed("text.counts.0", below_zero),
    "slots alone, in the middle": lambda tensors: {
        name: part for name, part in tensors.items() if ".slots." in name or name == "position"
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_are_refused_by_torch_and_by_the_engine(model, path, damage):
    """As somebody would write them who knows the format: the head is that of the state, as version 0.1 wrote it."""
    head = head_of(path)
    save_file(
        DAMAGES[damage](load_file(path)), path, {name: head[name] for name in ("format", "model", "columns_seen")}
    )
    with pytest.raises(UserError):
        DyadCache.load(path, model.config)
    with pytest.raises(UserError):
        engine_of(model).load_state(path)


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_rather_than_waited_for(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a readable state file"):
        engine_of(model).load_state(tmp_path / "pipe")
    assert not holds_memory(tmp_path / "pipe")


def test_a_changed_number_shows_in_the_checksum(model, path):
    tensors = load_file(path)
    tensors["layers.0.rings.0"][..., 0] += 1
    save_file(tensors, path, head_of(path))
    with pytest.raises(UserError, match="damaged"):
        DyadCache.load(path, model.config)
    with pytest.raises(UserError, match="damaged"):
        engine_of(model).load_state(path)


@pytest.mark.parametrize("head", [{"columns_seen": "9" * 5000}, {"columns_seen": "-1"}, {"format": "x"}, {"model": ""}])
def test_heads_that_say_something_else(model, path, head):
    save_file(load_file(path), path, head_of(path) | head)
    for load in (lambda: DyadCache.load(path, model.config), lambda: engine_of(model).load_state(path)):
        with pytest.raises(UserError):
            load()


def test_the_state_of_other_weights_is_refused(model, path, tmp_path):
    other = make_model()
    with torch.no_grad():
        other.model.layers[1].mlp.down.weight.mul_(1.1)
    with pytest.raises(UserError, match="other weights"):
        DyadCache.load(path, other.config, weights=identity_of(other))
    with pytest.raises(UserError, match="other weights"):
        engine_of(other).load_state(path)
    assert DyadCache.load(path, other.config).batch_size == 1  # for whoever knows better
    assert engine_of(model).load_state(path).position == 40


def test_torch_and_the_engine_know_a_model_by_the_same_name_in_any_dtype(model, tmp_path):
    identity = identity_of(model)
    assert engine_of(model).identity == engine_of(model, weights="int8").identity == identity
    model.save_pretrained(tmp_path / "float32")
    assert Engine.from_folder(tmp_path / "float32").identity == identity
    model.bfloat16().save_pretrained(tmp_path / "bfloat16")
    assert identity_of(model) == Engine.from_folder(tmp_path / "bfloat16").identity == identity


def test_states_cross_between_torch_and_the_engine_with_equal_files(model, path, tmp_path):
    engine = engine_of(model)
    engine.save_state(engine.load_state(path), tmp_path / "engine")
    assert head_of(tmp_path / "engine") | {"checksum": ""} == head_of(path) | {"checksum": ""}
    assert head_of(path)["format"] == FORMAT
    again = DyadCache.load(tmp_path / "engine", model.config, weights=identity_of(model))
    for name, tensor in state_of(model).tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_state_of_a_model_with_other_contexts_of_the_same_number_is_refused(model, path):
    """The tables have the same shape, but other contexts are looked up in them."""
    other = make_model(slot_contexts=[2, 3, 4, 6, 7, "word"])
    assert {name: part.shape for name, part in state_of(other).tensors().items() if "slots" in name} == {
        name: part.shape for name, part in state_of(model).tensors().items() if "slots" in name
    }
    with pytest.raises(UserError, match="another shape"):
        DyadCache.load(path, other.config)
    with pytest.raises(UserError, match="another shape"):
        engine_of(other).load_state(path)
