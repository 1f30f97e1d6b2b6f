"""What slots keep: values in float16, tags once for all blocks, tables that forks share until one is written to."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dyadlm import DyadCache, UserError
from dyadlm.accounting import state_bytes
from dyadlm.engine import numba_step

from .conftest import engine_of, make_model, text
from .test_engine import form, read_by_engine, read_by_torch  # noqa: F401 - `form` is a fixture

HALF = {"slot_values": "float16", "slot_layers": [0, 2]}
# A sum in another order may be rounded to the neighbour of a float16: a thousandth of the value.
CLOSE = {"rtol": 2e-3, "atol": 5e-3}


def test_the_engine_keeps_and_reads_the_values_of_torch(form):  # noqa: F811
    model, ids = make_model(**HALF), text(300)
    expected, cache = read_by_torch(model, ids)
    logits, state = read_by_engine(engine_of(model), ids)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    for name, tensor in cache.tensors().items():
        found = state.tensors()[name]
        assert found.dtype == tensor.numpy().dtype, name
        np.testing.assert_allclose(found, tensor.numpy(), **CLOSE, err_msg=name)
    assert {cache.layers[layer].slots[1].dtype for layer in (0, 2)} == {torch.float16}


def test_reading_in_parts_and_token_by_token_is_reading_at_once():
    model, ids = make_model(**HALF), text(90)
    whole, _ = read_by_torch(model, ids)
    for size in (1, 7):
        cache, parts = None, []
        for begin in range(0, len(ids), size):
            logits, cache = read_by_torch(model, ids[begin : begin + size], cache)
            parts.append(logits)
        np.testing.assert_allclose(np.concatenate(parts), whole, **CLOSE)
    exact, _ = read_by_torch(make_model(slot_layers=[0, 2]), ids)
    assert 0 < np.abs(exact - whole).max() < 0.1  # something was rounded


def test_the_compiled_form_rounds_as_numpy_does():
    """To the nearest, ties to even, subnormal numbers too; beyond the largest float16 to that."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = every[np.isfinite(every)].astype(np.float32)
    between = (np.sort(halves)[1:].astype(np.float64) + np.sort(halves)[:-1]) / 2
    numbers = np.concatenate([halves, between.astype(np.float32), np.float32([1e9, -1e9, 65_519, 65_520, 1e-8, -0.0])])
    values = np.zeros((1, 1, 1, len(numbers)), np.uint16)
    recalled = np.empty(len(numbers) + 1, np.float32)
    numba_step.recall_slots(values, numbers, np.zeros(1, np.int64), np.zeros((1, 2), np.int64), recalled)
    expected = np.clip(numbers, -65_504, 65_504).astype(np.float16)
    assert (values[0, 0, 0] == expected.view(np.uint16)).all()
    assert (recalled[:-1] == expected.astype(np.float32)).all()


def test_state_bytes_are_those_that_the_configuration_says():
    for fields in (HALF, {"slot_layers": [0, 2]}, {"slot_contexts": []}):
        model = make_model(**fields)
        cache = read_by_torch(model, text(9))[1]
        assert cache.state_bytes() == state_bytes(model.config)
        one_by_one = read_by_torch(model, text(1), read_by_torch(model, text(8))[1])[1]
        assert one_by_one.state_bytes() == state_bytes(model.config)


def test_blocks_share_their_tags_in_memory_and_in_the_file(tmp_path):
    model = make_model(**HALF)
    cache = read_by_torch(model, text(40))[1]
    cache.save(tmp_path / "state", model.config)
    loaded = DyadCache.load(tmp_path / "state", model.config)
    for state in (cache, loaded, cache.copy(), cache.select_rows(torch.tensor([0, 0]))):
        assert state.layers[0].slots[0] is state.layers[2].slots[0]
        assert state.layers[0].slots[1] is not state.layers[2].slots[1]
    with safe_open(str(tmp_path / "state"), framework="np") as file:
        assert {"layers.0.slots.0", "layers.2.slots.0"} & set(file.keys()) == {"layers.0.slots.0"}
    assert (tmp_path / "state").stat().st_size < cache.state_bytes() + 4000


@pytest.mark.parametrize("other", [{}, {"slot_entries": 128, "slot_values": "float16"}])
def test_a_state_of_other_slots_is_refused_with_the_remedy(tmp_path, other):
    model = make_model(**HALF)
    read_by_torch(model, text(40))[1].save(tmp_path / "state", model.config)
    wrong = make_model(**{**other, "slot_layers": [0, 2]})
    remedy = "--set slot_entries=64" if other else "--set slot_values=float16"
    for load in (engine_of(wrong).load_state, lambda path: DyadCache.load(path, wrong.config)):
        with pytest.raises(UserError, match=remedy):
            load(tmp_path / "state")


def test_gradients_pass_as_if_nothing_were_rounded():
    models = [make_model(slot_layers=[0, 2], **fields).train() for fields in ({}, {"slot_values": "float16"})]
    ids = torch.from_numpy(text(40))[None]
    for model in models:
        model(ids, labels=ids).loss.backward()
    exact, rounded = (model.model.layers[0].slots.value.weight.grad for model in models)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("by_engine", [False, True])
def test_a_fork_shares_tables_until_one_is_written_to(by_engine):
    model, ids = make_model(slot_layers=[0, 2]), text(60)
    engine = engine_of(model)
    if by_engine:
        _, state = read_by_engine(engine, ids)
        read, tables = (lambda part, own: read_by_engine(engine, part, own)[0]), (lambda own: [own.tags, own.values])
    else:
        _, state = read_by_torch(model, ids)
        read = lambda part, own: read_by_torch(model, part, own)[0]  # noqa: E731
        tables = lambda own: [table for layer in (0, 2) for table in own.layers[layer].slots[:2]]  # noqa: E731
    fork, second = state.copy(), state.copy()
    assert all(one is other for one, other in zip(tables(state), tables(fork), strict=True))
    kept = [np.array(np.asarray(table)) for table in tables(second)]
    whole, _ = read_by_torch(model, np.concatenate([ids, text(4, 60)]))
    for token, expected in zip(text(4, 60), whole[len(ids) :], strict=True):
        assert np.abs(read(np.array([token]), fork)[0] - expected).max() < 1e-3
    assert all(one is not other for one, other in zip(tables(state), tables(fork), strict=True))
    assert all((np.asarray(table) == before).all() for table, before in zip(tables(second), kept, strict=True))
    other, _ = read_by_torch(model, np.concatenate([ids, text(4, 3)]))
    for own in (state, second):  # what they were forked from, and a fork that was not read on: as nothing had happened
        for token, expected in zip(text(4, 3), other[len(ids) :], strict=True):
            assert np.abs(read(np.array([token]), own)[0] - expected).max() < 1e-3
