"""What Hugging Face and the engine ask of a state: rows, lengths, copies, devices, files, whoever holds it."""

import pickle

import pytest
import torch

from dyadlm import DyadCache, UserError
from dyadlm.engine.bridge import decoder_of
from dyadlm.model.cache import carried_by
from dyadlm.model.empty_state import identity_of

from .conftest import SLOTS, SMALL, make_model, text_ids

SIZES = {**SMALL, **SLOTS, "semantic_levels": ["word"], "slot_contexts": [1, "word"]}


def read(model, ids, cache=None) -> DyadCache:
    with torch.no_grad():
        return model(ids, past_key_values=cache or DyadCache(), use_cache=True).past_key_values


@pytest.fixture
def model():
    return make_model(torch.float32, **SIZES)


@pytest.fixture
def by_the_engine():
    """A model, and a state of one row that the engine holds, after 21 tokens."""
    model = make_model(torch.float32, preset="tiny", hidden_size=32, num_hidden_layers=2, num_levels=None)
    cache = read(model, text_ids(1, 20))
    decoder_of(model).step([65], cache)
    assert cache.rows is not None
    return model, cache


def test_a_state_that_saw_nothing_is_empty_in_every_way(model, tmp_path):
    cache = DyadCache()
    assert (cache.is_empty, cache.batch_size, cache.get_seq_length(), cache.state_bytes()) == (True, 0, 0, 0)
    assert cache.tensors() == {}
    assert cache.select_rows(torch.tensor([0])).is_empty
    assert cache.copy().is_empty
    assert cache.to("cpu").is_empty
    carried = carried_by(cache, 2)
    assert carried == carried_by(None, 2)
    assert [len(part) for layer in carried.layers for part in layer] == [0] * 2 * len(carried.layers[0])
    cache.save(tmp_path / "empty", model.config)
    loaded = DyadCache.load(tmp_path / "empty", model.config)
    assert loaded.is_empty
    assert loaded.layers == []


def test_lengths_count_columns_and_know_no_limit(model):
    cache = read(model, text_ids(2, 7))
    assert (cache.is_empty, cache.batch_size, cache.get_seq_length()) == (False, 2, 7)
    assert repr(cache) == "DyadCache(rows=2, columns_seen=7)"
    read(model, text_ids(2, 5), cache)
    assert cache.get_seq_length() == cache.columns_seen == 12
    assert cache.get_max_cache_shape() == -1
    assert not cache.is_compileable
    with pytest.raises(UserError, match="cannot be cut back"):
        cache.crop(3)


def test_rows_are_chosen_with_all_that_belongs_to_them(model):
    cache = read(model, text_ids(3, 11))
    before = cache.tensors()
    order = torch.tensor([2, 0])
    chosen = cache.select_rows(order)
    assert chosen.columns_seen == 11
    assert chosen.tensors().keys() == before.keys()
    assert all(torch.equal(tensor, before[name][order]) for name, tensor in chosen.tensors().items())
    cache.batch_select_indices(order)
    assert cache.columns_seen == 11
    assert all(torch.equal(tensor, before[name][order]) for name, tensor in cache.tensors().items())
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(tensor, before[name][[2, 2, 0, 0]]) for name, tensor in cache.tensors().items())


def test_names_and_bytes_are_those_of_all_tensors(model):
    cache = read(model, text_ids(1, 9))
    named = cache.tensors()
    assert named["position"] is cache.position
    assert named["layers.1.rings.2"] is cache.layers[1].rings[2]
    assert named["layers.0.slots.1"] is cache.layers[0].slots[1]
    assert {name.split(".")[0] for name in named} == {"position", "text", "layers"}
    assert len(named) == 1 + sum(len(part) for record in (cache.text, *cache.layers) for part in record)
    shared = {id(tensor): tensor.nbytes for tensor in named.values()}  # tags of slots, of both blocks
    assert len(shared) == len(named) - 2
    assert cache.state_bytes() == sum(shared.values())


def test_a_state_keeps_no_chunk_alive(model):
    """A view would keep the memory of the whole chunk that it was cut from."""
    cache = read(model, text_ids(1, 400))
    for name, tensor in cache.tensors().items():
        assert tensor.untyped_storage().nbytes() <= max(tensor.nbytes, 8), name


def test_a_new_document_keeps_slots_alone(model):
    cache = read(model, text_ids(2, 9))
    slots = [layer.slots for layer in cache.layers]
    cache.start_document()
    assert cache.position.tolist() == [0, 0]
    assert (cache.columns_seen, cache.is_empty) == (0, False)
    assert [layer.slots for layer in cache.layers] == slots
    assert {name.split(".")[2] for name in cache.tensors() if name != "position"} == {"slots"}


def test_a_state_moves_with_all_its_tensors(model):
    cache = read(model, text_ids(1, 9))
    assert cache.to("meta") is cache
    assert {tensor.device.type for tensor in cache.tensors().values()} == {"meta"}


@pytest.mark.parametrize("copied", [lambda cache: cache.copy(), lambda cache: pickle.loads(pickle.dumps(cache))])  # noqa: S301
def test_copies_of_a_state_that_the_engine_holds(by_the_engine, copied):
    _, cache = by_the_engine
    twin = copied(cache)
    assert (twin.batch_size, twin.columns_seen) == (cache.batch_size, cache.columns_seen) == (1, 21)
    assert twin.tensors().keys() == cache.tensors().keys()
    assert all(torch.equal(tensor, cache.tensors()[name]) for name, tensor in twin.tensors().items())
    assert len(twin.layers) == 2


def test_a_copy_of_a_state_that_the_engine_holds_stays_in_the_engine(by_the_engine):
    model, cache = by_the_engine
    twin = cache.copy()
    assert None not in (twin.rows, cache.rows)
    ahead = decoder_of(model).step([66], twin)
    assert (twin.columns_seen, cache.columns_seen) == (22, 21)
    torch.testing.assert_close(decoder_of(model).step([66], cache), ahead)


def test_what_the_engine_holds_comes_back_when_it_is_asked_for(by_the_engine):
    model, cache = by_the_engine
    assert not cache.is_empty
    assert cache.batch_size == 1
    assert cache.rows is not None  # neither needs a tensor
    with pytest.raises(AttributeError, match="nothing"):
        _ = cache.nothing
    assert cache.rows is not None
    assert cache.position.tolist() == [21]
    assert cache.rows is None
    expected = read(model, torch.cat([text_ids(1, 20), torch.tensor([[65]])], 1))
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(cache.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


def test_an_attribute_that_a_state_does_not_have(model):
    with pytest.raises(AttributeError, match="nothing"):
        _ = read(model, text_ids(1, 3)).nothing


def test_a_loaded_state_is_the_saved_one(model, tmp_path):
    cache = read(model, text_ids(2, 9))
    cache.save(tmp_path / "state", model.config, identity_of(model))
    loaded = DyadCache.load(str(tmp_path / "state"), model.config, "cpu", identity_of(model))
    assert loaded.columns_seen == 9
    assert all(torch.equal(tensor, cache.tensors()[name]) for name, tensor in loaded.tensors().items())
    assert loaded.tensors().keys() == cache.tensors().keys()
    with pytest.raises(UserError, match="other weights"):
        DyadCache.load(tmp_path / "state", model.config, weights="0" * 32)
