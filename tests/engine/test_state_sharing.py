"""States that share memory: what is written through one is read through the other, or nobody else sees it."""

import copy

import numpy as np
import pytest
import torch

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2))
    return Engine(model.config.to_dict(), {name: part.detach().numpy() for name, part in model.state_dict().items()})


def test_the_first_rows_share_their_memory_also_after_a_copy(engine: Engine) -> None:
    many = engine.start(3)
    kept = many.copy()  # which shares the tables until one is written to
    part = many.first(2)
    for token in b"ababababab":
        engine.step_rows(part, [token, token])
    assert (many.tags[:2] == part.tags).all()
    assert (part.tags >= 0).any()
    assert not (kept.tags >= 0).any()


def test_a_row_that_is_put_changes_no_copy(engine: Engine) -> None:
    many, one = engine.start(2), engine.start()
    for token in b"ababababab":
        engine.step(one, token)
    kept, before = many.copy(), one.tags.copy()
    many.put(1, one)
    assert (many.tags[1] == one.tags[0]).all()
    assert not (kept.tags >= 0).any()
    engine.step(one, 97)
    np.testing.assert_array_equal(many.tags[1], before[0])


def test_a_text_is_read_into_one_row(engine: Engine) -> None:
    with pytest.raises(ValueError, match="2 rows"):
        engine.read(engine.start(2), np.frombuffer(b"abcdefghij", np.uint8).astype(np.int64))


def test_a_copy_of_any_kind_leaves_its_original_alone(engine: Engine) -> None:
    state = engine.start()
    for token in b"abababab":
        engine.step(state, token)
    twin, before = copy.copy(state), state.tags.copy()
    for token in b"xyxyxyxy":
        engine.step(twin, token)
    np.testing.assert_array_equal(state.tags, before)

    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2)).eval()
    cache, ids = DyadCache(), torch.randint(32, 127, (1, 20))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        held = {name: tensor.clone() for name, tensor in cache.tensors().items()}
        other = copy.copy(cache)
        for column in range(20):
            model(input_ids=ids[:, column : column + 1], past_key_values=other, use_cache=True)
    for name, tensor in cache.tensors().items():
        assert tensor.equal(held[name]), name
