"""The kernels of slots against the forms in torch: plans, values and gradients. On a CPU, in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# As in test_kernels.py.
pytest.importorskip("triton", minversion="3.3" if torch.cuda.is_available() else "3.7")

import dyadlm.kernels.slot_plan
import dyadlm.kernels.slot_read
from dyadlm import DyadCache, kernels
from dyadlm.kernels.slot_plan import ROWS, ring_lookup, ring_plan
from dyadlm.kernels.slot_read import slot_recall, slot_recall_gradients
from dyadlm.model.slots import read_slots
from dyadlm.ops.clock import Clock, make_clock, next_position
from dyadlm.ops.contexts import Contexts, context_tags
from dyadlm.ops.slots import SlotLookup, SlotState, slot_lookup, slot_read, slot_store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Few sets of few ways, so that entries are pushed out; tags of two parts.
VOCABULARY, CONTEXTS = 2**20, [4, "word"]
RULES = {"sets": 2, "ways": 3, "scope": "document"}
NO_LEVELS = {"num_levels": 1, "semantic_levels": None, "salience": False}  # that kernels compute


def contexts_of(ids: Tensor, clock: Clock, state: Any = None) -> tuple[Contexts, Any]:
    return context_tags(ids, CONTEXTS, VOCABULARY, clock, word_begins=ids == 0, state=state)


def drawn(batch: int, time: int, rate: float) -> Tensor:
    return torch.rand(batch, time, device=DEVICE) < rate


def text(batch: int, time: int, letters: int = 3) -> Tensor:
    return torch.randint(0, letters, (batch, time), device=DEVICE)


def both(ids: Tensor, clock: Clock, writes: Tensor | None = None, **rules) -> tuple[SlotLookup, SlotLookup]:
    """The plan of a chunk that begins a text, by the form in torch and by the kernel."""
    contexts, _ = contexts_of(ids, clock)
    given = {"writes": writes, "state": None, **RULES, **rules}
    return slot_lookup(contexts, clock, **given), ring_lookup(contexts, clock, **given)


def assert_plans_equal(found: SlotLookup, expected: SlotLookup) -> None:
    there = expected.found
    assert torch.equal(found.found, there)
    assert torch.equal(found.column[there], expected.column[there])
    assert (found.slot is None) == (expected.slot is None)
    if found.slot is not None:
        assert torch.equal(found.slot[there], expected.slot[there])
    assert torch.equal(found.pending, expected.pending)
    for own, other in zip(found.survivors, expected.survivors, strict=True):
        assert own is other is None or torch.equal(own, other)


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "gate"), [("document", None), ("stream", 0.6)])
def test_plans_equal_the_form_in_torch_from_chunk_to_chunk(scope: str, gate: float | None) -> None:
    """Rows that end in padding or have nothing at all in a chunk, documents that begin anywhere, and the state of the
    chunk before; lengths that no tile divides, one of them longer than a tile."""
    ids, position, tags, state = text(2, ROWS + 50, letters=2), None, None, None
    lengths = torch.tensor([ROWS + 50, 17], device=DEVICE)
    starts, writes = drawn(*ids.shape, 0.05), None if gate is None else torch.rand(*ids.shape, 2, device=DEVICE) < gate
    for a, b in ((0, 7), (7, 20), (20, ids.shape[1])):
        length = (lengths - a).clamp(0, b - a)
        clock = make_clock(2, b - a, position=position, length=length, starts=starts[:, a:b], device=DEVICE)
        contexts, tags = contexts_of(ids[:, a:b], clock, tags)
        given = {**RULES, "scope": scope, "writes": None if writes is None else writes[:, a:b], "state": state}
        expected, found = slot_lookup(contexts, clock, **given), ring_lookup(contexts, clock, **given)
        assert expected.found.any()
        assert_plans_equal(found, expected)
        state, position = slot_store(torch.zeros(2, b - a, 1, 2, device=DEVICE), expected, state), next_position(clock)


@pytest.mark.parametrize(("time", "rules"), [(2, {}), (61, {"sets": 1, "ways": 1}), (61, {"sets": 64, "ways": 5})])
def test_plans_of_one_document(time: int, rules: dict) -> None:
    expected, found = both(text(1, time), make_clock(1, time, device=DEVICE), **rules)
    assert_plans_equal(found, expected)


def slopes_of(read: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    return torch.autograd.grad(read, values, slope)[0]


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("scope", "gate"), [("document", None), ("stream", 0.2)])
def test_values_and_gradients_equal_the_form_in_torch(own: bool, scope: str, gate: float | None) -> None:
    """Where few writes take place, many tokens read one value."""
    batch, time = 2, ROWS + 21
    length = torch.tensor([time, 40], device=DEVICE)
    clock = make_clock(batch, time, starts=drawn(batch, time, 0.05), length=length, device=DEVICE)
    writes = None if gate is None else torch.rand(batch, time, len(CONTEXTS), device=DEVICE) < gate
    by_torch, by_kernel = both(text(batch, time), clock, writes, scope=scope, ways=4)
    if gate is not None:
        columns = by_torch.column[0, :, 0][by_torch.found[0, :, 0]]
        assert columns.bincount().max() > 2
    values = torch.randn(batch, time, len(CONTEXTS) if own else 1, 5, device=DEVICE, requires_grad=True)
    expected, found = (read_slots(values, plan, None) for plan in (by_torch, by_kernel))
    assert torch.equal(expected, found)
    slope = torch.randn(found.shape, device=DEVICE)
    torch.testing.assert_close(slopes_of(found, values, slope), slopes_of(expected, values, slope))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_halves_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Values are moved as they are; a gradient is rounded once. (The interpreter cuts bfloat16 off where a GPU
    rounds.)"""
    ids, clock = text(1, 50, letters=2), make_clock(1, 50, device=DEVICE)
    _, plan = both(ids, clock)
    values = torch.randn(1, 50, 1, 4, device=DEVICE).to(dtype).requires_grad_()
    found = read_slots(values, plan, None)
    assert found.dtype == dtype
    assert torch.equal(found[..., :-1], slot_read(values, plan))
    assert torch.equal(found[..., -1], plan.found.to(dtype))
    slope = torch.randn(found.shape, device=DEVICE).to(dtype)
    wide = values.detach().float().requires_grad_()
    exact = slopes_of(read_slots(wide, plan, None), wide, slope.float())
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(slopes_of(found, values, slope).float(), exact, rtol=rounding, atol=1e-7)


def test_what_a_compiler_lays_out_in_another_way_is_read_as_it_lies() -> None:
    def moved(part: Tensor) -> Tensor:
        """The same values, with the rows of the batch beside each other in memory."""
        return part.transpose(0, 1).contiguous().transpose(0, 1)

    _, plan = both(text(2, 30, letters=2), make_clock(2, 30, device=DEVICE))
    given = (torch.randn(2, 30, len(CONTEXTS), 4, device=DEVICE), plan.found, plan.column, plan.following)
    assert torch.equal(slot_recall_gradients(*map(moved, given), 1), slot_recall_gradients(*given, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kept_as", ["float32", "float16"])
def test_values_of_a_state_are_read(kept_as: str) -> None:
    """By plans of either form, also of a single token."""
    rules = {**RULES, "ways": 16}
    ids, clock = text(2, 40, letters=2), make_clock(2, 40, device=DEVICE)
    values = torch.randn(2, 47, 1, 5, device=DEVICE).half().float()
    contexts, tags = contexts_of(ids, clock)
    state = slot_store(values[:, :40], slot_lookup(contexts, clock, **rules), None, kept_as)
    for time in (1, 7):
        clock = make_clock(2, time, position=torch.full((2,), 40, device=DEVICE), device=DEVICE, begins=False)
        contexts, _ = contexts_of(ids[:, :time], clock, tags)
        plan = slot_lookup(contexts, clock, **rules, state=state)
        own = plan if time == 1 else ring_lookup(contexts, clock, **rules, writes=None, state=state)
        assert (plan.found & (plan.slot >= 0)).any()
        read = values[:, 40 : 40 + time]
        found = read_slots(read, own, state)
        assert torch.equal(found[..., :-1], slot_read(read, plan, state))
        assert torch.equal(found[..., -1].bool(), plan.found)


def test_gradients_that_the_kernel_lacks_take_the_form_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a state's values, and those by a plan that no kernel made."""
    monkeypatch.setattr(dyadlm.kernels.slot_read, "slot_recall", None)
    ids, clock = text(1, 9, letters=1), make_clock(1, 9, device=DEVICE)
    contexts, _ = contexts_of(ids, clock)
    values = torch.randn(1, 9, 1, 2, device=DEVICE, requires_grad=True)
    plan = slot_lookup(contexts, clock, **RULES, evict="lru")
    assert slopes_of(read_slots(values, plan, None).sum(), values, torch.ones((), device=DEVICE)).any()
    state = slot_store(values, plan)
    after = make_clock(1, 9, position=clock.length, device=DEVICE)
    plan = ring_lookup(contexts, after, **RULES, writes=None, state=SlotState(*state))
    read_slots(values.detach(), plan, state).sum().backward()
    assert values.grad is not None


@pytest.mark.slow
def test_torch_takes_them_for_operators() -> None:
    """Their schemas, shapes without values (for `torch.compile`) and gradients, as torch itself checks them."""
    ids, clock = text(1, 9), make_clock(1, 9, device=DEVICE)
    contexts, _ = contexts_of(ids, clock)
    at = (contexts.words, clock.index, clock.length)
    plan = ring_lookup(contexts, clock, **RULES, writes=None, state=None)
    values = torch.randn(1, 9, 1, 3, device=DEVICE, requires_grad=True)
    state = slot_store(values.detach(), plan)
    writes = torch.ones_like(plan.found)
    torch.library.opcheck(ring_plan, (*at, writes, state.pending, state.tags, 2, 3, True))
    torch.library.opcheck(ring_plan, (*at, None, None, None, 2, 3, False), test_utils="test_faketensor")
    by = (plan.found, plan.column)
    torch.library.opcheck(slot_recall, (values, *by, None, None, plan.following))
    read = (values.detach(), *by, torch.zeros_like(plan.column), state.values, None)
    torch.library.opcheck(slot_recall, read, test_utils="test_faketensor")
    slope = torch.randn(1, 9, len(CONTEXTS), 4, device=DEVICE)
    torch.library.opcheck(slot_recall_gradients, (slope, *by, plan.following, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"slot_layers": [0, 1]}, ["ring_lookup", "slot_recall", "slot_recall"]),
        ({"slot_values": "float16"}, ["ring_lookup", "slot_recall"]),
        ({"slot_evict": "lru"}, []),
        ({"slot_gate": True}, ["ring_lookup"]),
    ],
)
def test_a_model_trains_as_with_the_forms_in_torch(
    make_model: Callable, calls: list[str], monkeypatch: pytest.MonkeyPatch, fields: dict, expected: list[str]
) -> None:
    """With documents that begin inside a row, and padding."""
    model, ids, found = make_model(**NO_LEVELS, **fields), torch.randint(97, 100, (2, 33), device=DEVICE), []
    mask, positions = torch.ones_like(ids), torch.arange(33, device=DEVICE).repeat(2, 1)
    mask[1, :7], positions[0, 13:] = 0, torch.arange(20, device=DEVICE)
    for usable in (lambda x: False, kernels.usable):
        monkeypatch.setattr(kernels, "usable", usable)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, attention_mask=mask, position_ids=positions, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert calls == expected
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_reads_on_as_with_the_forms_in_torch(
    make_model: Callable, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, more of it, and single tokens, whose plan the form in torch makes."""
    model, ids, found = (
        make_model(**NO_LEVELS, slot_contexts=[2, "word"], slot_entries=32).eval(),
        torch.randint(97, 100, (2, 40), device=DEVICE),
        [],
    )
    for usable in (lambda x: False, kernels.usable):
        monkeypatch.setattr(kernels, "usable", usable)
        cache, logits = DyadCache(), []
        with torch.no_grad():
            for part in ids.split([20, 18, 1, 1], 1):
                logits.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
        found.append({"logits": torch.cat(logits, 1), **cache.tensors()})
    assert calls == ["ring_lookup", "slot_recall"] * 2 + ["slot_recall"] * 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that torch itself reads while it compiles
def test_a_compiled_model_is_one_graph(make_model: Callable, calls: list[str]) -> None:
    """The plan, too, as it is made for all blocks."""
    model, ids = make_model(**NO_LEVELS, slot_contexts=[2, "word"]), torch.randint(97, 100, (1, 20), device=DEVICE)
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert calls == ["ring_lookup", "slot_recall"]
    model.compile(backend="aot_eager", fullgraph=True)
    found = model(input_ids=ids, labels=ids, use_cache=False).loss
    found.backward()
    torch.testing.assert_close(found, expected)
