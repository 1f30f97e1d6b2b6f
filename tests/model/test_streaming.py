"""One state contract: full ≡ chunked ≡ token by token ≡ padded ≡ packed ≡ saved and restored."""

import pytest
import torch

from dyadlm import DyadCache, UserError
from dyadlm.accounting import state_bytes
from dyadlm.model.empty_state import empty_state, identity_of

from .conftest import SLOTS, SMALL, VARIANTS, make_model, random_ids, text_ids

EXACT = 1e-9


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def state_distance(a: DyadCache, b: DyadCache) -> float:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    return max(distance(left[name].double(), right[name].double()) for name in left if left[name].numel())


def read(model, ids, cuts=(), mask=None, cache=None):
    """Logits over all columns and the final state, read in chunks."""
    cache, parts = cache or DyadCache(), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = None if mask is None else mask[:, start:stop]
        out = model(ids[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def test_chunks_and_single_tokens_equal_the_whole(variant):
    model, ids = make_model(**variant), text_ids(2, 150)
    full = model(ids, use_cache=True)
    generator = torch.Generator().manual_seed(1)
    random_cuts = sorted(set(torch.randint(1, 150, (9,), generator=generator).tolist()))
    for cuts in (random_cuts, range(1, 150), [64], [63, 65]):
        logits, cache = read(model, ids, cuts)
        assert distance(logits, full.logits) < EXACT
        assert state_distance(cache, full.past_key_values) < EXACT


def decided_seed(variant: dict, ids: torch.Tensor) -> int:
    """The first seed whose hard decisions (selectors, learned boundaries) do not depend on the rounding of float32."""
    for seed in range(8):
        model, generator = make_model(seed=seed, **variant), torch.Generator().manual_seed(1)
        logits, moved = model(ids).logits, 0.0
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for _ in range(4):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(weights[name] * (1 + 1e-6 * noise))
                moved = max(moved, distance(model(ids).logits, logits))
        if moved < 1e-3:
            return seed
    raise AssertionError("every seed has a decision that rounding turns over")


def test_float32_token_by_token_equals_the_whole(variant):
    ids = text_ids(1, 140)
    model = make_model(torch.float32, seed=decided_seed(variant, ids), **variant)
    logits, cache = read(model, ids, range(1, 140))
    full = model(ids, use_cache=True)
    assert distance(logits, full.logits) < 1e-4
    assert state_distance(cache, full.past_key_values) < 1e-4


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(variant, side):
    """Ragged rows, also cut into chunks in the middle of the padding, also with a carried state."""
    model = make_model(**variant)
    lengths, width = (17, 40, 64), 70
    ids, mask = torch.full((3, width), 256), torch.zeros(3, width, dtype=torch.long)
    rows = [text_ids(1, n, seed=n) for n in lengths]
    places = []
    for b, row in enumerate(rows):
        n = row.shape[1]
        if side == "left":
            place = torch.arange(width - n, width)
        elif side == "right":
            place = torch.arange(n)
        else:
            place = torch.randperm(width, generator=torch.Generator().manual_seed(b))[:n].sort().values
        ids[b, place], mask[b, place] = row[0], 1
        places.append(place)
    follow = text_ids(3, 9, seed=7)
    for cuts in ([], [5, 30, 66]):
        logits, cache = read(model, ids, cuts, mask)
        continued, after = read(model, follow, cache=cache)
        for b, (row, place) in enumerate(zip(rows, places, strict=True)):
            alone = model(torch.cat([row, follow[b : b + 1]], 1), use_cache=True)
            n = row.shape[1]
            assert distance(logits[b, place], alone.logits[0, :n]) < EXACT
            assert distance(continued[b], alone.logits[0, n:]) < EXACT
            assert state_distance(after.select_rows(torch.tensor([b])), alone.past_key_values) < EXACT


def test_packed_documents_equal_each_alone(variant):
    model = make_model(**variant)
    sizes = (1, 30, 2, 64, 23)
    documents = [text_ids(1, n, seed=n) for n in sizes]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    for cut in (None, 31, 40):
        cache, logits = DyadCache(), []
        for part in [slice(None)] if cut is None else [slice(0, cut), slice(cut, None)]:
            out = model(packed[:, part], position_ids=positions[:, part], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        alone = [model(document, use_cache=True) for document in documents]
        assert distance(torch.cat(logits, 1), torch.cat([out.logits for out in alone], 1)) < EXACT
        assert state_distance(cache, alone[-1].past_key_values) < EXACT


def test_packed_and_left_padded_at_once():
    model = make_model()
    first, second = random_ids(1, 12, seed=1), random_ids(1, 33, seed=2)
    ids = torch.cat([torch.full((1, 6), 256), first, second], 1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 45)], 1).long()
    positions = torch.cat([torch.zeros(6), torch.arange(12), torch.arange(33)])[None].long()
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    assert distance(out.logits[:, 18:], model(second).logits) < EXACT
    assert distance(out.logits[:, 6:18], model(first).logits) < EXACT


def test_saved_and_restored_state_continues_as_if_never_interrupted(variant, tmp_path):
    model, ids = make_model(**variant), text_ids(2, 90)
    _, cache = read(model, ids[:, :50])
    cache.save(tmp_path / "state.safetensors", model.config)
    restored = DyadCache.load(tmp_path / "state.safetensors", model.config)
    assert restored.get_seq_length() == 50
    logits, after = read(model, ids[:, 50:], cache=restored)
    full = model(ids, use_cache=True)
    assert distance(logits, full.logits[:, 50:]) < EXACT
    assert state_distance(after, full.past_key_values) < EXACT


def test_state_files_of_other_models_and_other_files_are_refused(tmp_path):
    model = make_model()
    _, cache = read(model, random_ids(1, 5))
    cache.save(tmp_path / "state", model.config)
    with pytest.raises(UserError, match="another shape"):
        DyadCache.load(tmp_path / "state", make_model(num_levels=6).config)
    with pytest.raises(UserError, match="another shape"):
        DyadCache.load(tmp_path / "state", make_model(semantic_levels=["word"]).config)
    with pytest.raises(UserError, match="no state file"):
        DyadCache.load(tmp_path / "missing", model.config)
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(UserError, match="not a readable state"):
        DyadCache.load(tmp_path / "text", model.config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="holds no dyadlm state"):
        DyadCache.load(tmp_path / "model" / "model.safetensors", model.config)


@pytest.mark.parametrize("name", ["default", "everything"])
def test_rows_can_be_reordered_repeated_and_sliced(name):
    model, ids = make_model(**VARIANTS[name]), text_ids(3, 41)
    _, cache = read(model, ids)
    follow = text_ids(3, 5, seed=4)
    order = torch.tensor([2, 0, 0])
    expected = model(torch.cat([ids[order], follow], 1)).logits[:, 41:]
    chosen = cache.select_rows(order)
    assert distance(model(follow, past_key_values=chosen).logits, expected) < EXACT
    cache.reorder_cache(order)
    _, other = read(model, ids[:1])
    other.batch_repeat_interleave(3)
    assert distance(model(follow, past_key_values=other).logits[1:], expected[1:]) < EXACT
    assert distance(model(follow, past_key_values=cache).logits, expected) < EXACT


def test_a_memory_of_the_stream_passes_into_the_next_document_and_nothing_else_does():
    """Packed is then not the same as alone: what slots hold is read on, what is pending is not written."""
    model = make_model(**SMALL, **SLOTS, slot_contexts=[1, "word"], slot_scope="stream")
    first, second = torch.tensor([[65, 66, 67]]), torch.tensor([[65, 68, 69]])
    packed = torch.cat([first, second], 1)
    positions = torch.arange(3).repeat(2)[None]
    whole = model(packed, position_ids=positions, use_cache=True)
    alone = model(second, use_cache=True)
    assert distance(whole.logits[:, 4:], alone.logits[:, 1:]) < EXACT  # 68 and 69 have no past in the stream
    changed = model(torch.cat([torch.tensor([[68, 66, 67]]), second], 1), position_ids=positions).logits
    assert distance(changed[:, 4:5], whole.logits[:, 4:5]) > 1e-4  # but if they have, it is read
    cut = DyadCache()
    parts = [
        model(packed[:, part], position_ids=positions[:, part], past_key_values=cut).logits
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    assert distance(torch.cat(parts, 1), whole.logits) < EXACT
    assert state_distance(cut, whole.past_key_values) < EXACT
    for state in whole.past_key_values.layers:  # 67 stood last in its document: what followed it is not known
        assert (state.slots[0][:, 0] != 67).all()


def table_places(cache) -> list[int]:
    """Where the tables of slots are in memory."""
    return [table.data_ptr() for layer in cache.layers for table in layer.slots[:2]]


@pytest.mark.parametrize("evict", ["ring", "lru"])
@torch.no_grad()
def test_a_token_writes_into_the_tables_that_the_state_owns_and_into_no_others(evict):
    model, ids = make_model(**SMALL, **SLOTS, slot_contexts=[1, "word"], slot_evict=evict), text_ids(2, 40)
    cache = read(model, ids[:, :20])[1]
    read(model, ids[:, 20:21], cache=cache)
    places = table_places(cache)
    assert len(places) == 4
    read(model, ids[:, 21:22], cache=cache)
    assert table_places(cache) == places
    twin, sliced = cache.copy(), cache.select_rows(torch.tensor([0, 1]))
    before = {name: tensor.clone() for name, tensor in twin.tensors().items()}
    assert table_places(twin) == places
    read(model, ids[:, 22:], range(1, 18), cache=cache)
    assert not set(table_places(cache)) & set(places)
    for other in (twin, sliced):
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.tensors().items())
        read(model, ids[:, 22:], range(1, 18), cache=other)
        assert state_distance(other, cache) == 0


@torch.no_grad()
def test_going_on_from_a_saved_state_leaves_its_file_as_it_was(tmp_path):
    model, ids = make_model(**VARIANTS["slots"]), text_ids(1, 40)
    read(model, ids[:, :20])[1].save(tmp_path / "state", model.config)
    before = (tmp_path / "state").read_bytes()
    logits, _ = read(model, ids[:, 20:], range(1, 20), cache=DyadCache.load(tmp_path / "state", model.config))
    assert (tmp_path / "state").read_bytes() == before
    assert distance(logits, model(ids).logits[:, 20:]) < EXACT


def test_where_gradients_are_on_a_token_writes_into_copies():
    model, ids = make_model(**VARIANTS["slots"]), text_ids(1, 24)
    cache = read(model, ids[:, :12])[1]
    tables = [table for layer in cache.layers for table in layer.slots]
    before = [table.clone() for table in tables]
    logits, _ = read(model, ids[:, 12:], range(1, 12), cache=cache)
    assert all(map(torch.equal, tables, before))
    (value, *_) = [layer.slots.value.weight for layer in model.model.layers if layer.slots is not None]
    (gradient,) = torch.autograd.grad(logits.sum(), value)
    whole = read(model, ids, [12])[0][:, 12:]
    (expected,) = torch.autograd.grad(whole.sum(), value)
    assert distance(gradient, expected) < EXACT


@torch.no_grad()
def test_a_state_made_in_inference_mode_goes_on_outside_it():
    model, ids = make_model(**VARIANTS["slots"]), text_ids(1, 24)
    with torch.inference_mode():
        cache = read(model, ids[:, :12])[1]
    logits, _ = read(model, ids[:, 12:], range(1, 12), cache=cache)
    assert distance(logits, model(ids).logits[:, 12:]) < EXACT


def test_state_size_is_constant_and_as_predicted(variant):
    model = make_model(torch.float32, **variant)
    sizes = {read(model, random_ids(1, n))[1].state_bytes() for n in (1, 2, 100, 513)}
    assert sizes == {state_bytes(model.config)}


def test_reading_without_use_cache_leaves_the_state_alone():
    model, ids = make_model(), random_ids(1, 30)
    _, cache = read(model, ids[:, :20])
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    logits = model(ids[:, 20:], past_key_values=cache, use_cache=False).logits
    assert distance(logits, model(ids).logits[:, 20:]) < EXACT
    assert all(torch.equal(before[name], tensor) for name, tensor in cache.tensors().items())


def test_a_state_that_is_reset_starts_anew():
    model, ids = make_model(), random_ids(2, 30)
    _, cache = read(model, ids)
    cache.reset()
    assert cache.is_empty
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids[:1], past_key_values=cache).logits, model(ids[:1]).logits)  # another batch size, too


def test_a_state_does_not_leak_between_calls():
    model, ids = make_model(), random_ids(1, 30)
    assert torch.equal(model(ids).logits, model(ids).logits)
    first = model(ids, use_cache=True).past_key_values
    second = model(ids, use_cache=True).past_key_values
    assert first is not second
    assert state_distance(first, second) == 0


def test_wrong_states_and_masks_are_refused():
    model, ids = make_model(), random_ids(2, 5)
    _, cache = read(model, ids)
    with pytest.raises(UserError, match="rows"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(UserError, match="DyadCache"):
        model(ids, past_key_values=[])
    with pytest.raises(UserError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5))


def test_float16_does_not_overflow_in_wide_windows():
    """Sums over 2^16 equal tokens pass the largest float16; the model carries means through its bottlenecks."""
    levels = ["sliding", *["dual"] * 16]
    model = make_model(torch.float16, hidden_size=8, num_hidden_layers=1, num_levels=17, level_alignment=levels)
    cache = DyadCache()
    for _ in range(9):
        logits = model(torch.full((1, 2**14), 7), past_key_values=cache, logits_to_keep=1).logits
        assert logits.isfinite().all()
    assert max(tensor.abs().max() for tensor in cache.layers[0].blocks) > 65504


def test_bfloat16_keeps_a_float32_state_and_stays_near():
    model = make_model(torch.float32)
    ids = random_ids(1, 200)
    exact = model(ids).logits.log_softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, use_cache=True)
    state = out.past_key_values.tensors()
    assert all(tensor.dtype == torch.float32 for name, tensor in state.items() if name != "position")
    assert (out.logits.float().log_softmax(-1) - exact).abs().mean() < 0.1
    everything = make_model(torch.bfloat16, **VARIANTS["everything"])
    logits, cache = read(everything, text_ids(1, 60), [30, 31])
    assert logits.isfinite().all()
    assert not {tensor.dtype for tensor in cache.tensors().values()} & {torch.bfloat16, torch.float16}
    half = make_model(torch.bfloat16)
    logits, cache = read(half, ids[:, :80], range(1, 80))
    assert all(tensor.dtype == torch.float32 for name, tensor in cache.tensors().items() if name != "position")
    assert (logits.float().log_softmax(-1) - exact[:, :80]).abs().mean() < 0.1


def test_gradients_of_chunks_are_those_of_the_whole(variant):
    """Through the state, for every parameter: parallel and chunk form of every family and variant."""
    model, ids = make_model(**variant), text_ids(2, 90)
    targets = torch.randn(2, 90, model.config.vocab_size, generator=torch.Generator().manual_seed(2)).double()
    (model(ids).logits * targets).sum().backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    logits, _ = read(model, ids, (1, 7, 40, 41))
    (logits * targets).sum().backward()
    parts = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert distance(gradient, parts[name]) < 1e-7 * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_state_that_is_expected_of_it(name, tmp_path):
    model = make_model(torch.float32, **VARIANTS[name])
    with torch.no_grad():
        cache = model(text_ids(1, 40), use_cache=True).past_key_values
    assert {key: tensor.shape[1:] for key, tensor in cache.tensors().items()} == {
        key: array.shape[1:] for key, array in empty_state(model.config).items()
    }
    cache.save(tmp_path / "state", model.config, identity_of(model))
    again = DyadCache.load(tmp_path / "state", model.config, weights=identity_of(model))
    assert all(torch.equal(tensor, again.tensors()[key]) for key, tensor in cache.tensors().items())
