"""The kernels of levels against the forms in torch: values and gradients. On a CPU, in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Interpreters older than 3.7 fail with today's numpy; on a GPU none is used.
pytest.importorskip("triton", minversion="3.3" if torch.cuda.is_available() else "3.7")

import dyadlm.kernels.segment_gradients
import dyadlm.kernels.segments
import dyadlm.kernels.stretches
import dyadlm.kernels.windows
from bfloat16_gradients import assert_kernels_as_exact
from dyadlm import DyadCache, DyadConfig, kernels
from dyadlm.kernels.segment_gradients import segment_gradients
from dyadlm.kernels.segments import segment_features
from dyadlm.kernels.stretches import STRETCH, tile_of
from dyadlm.kernels.windows import window_features, window_gradients
from dyadlm.model.cache import BlockState
from dyadlm.model.layout import chunk_layout
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import Clock, make_clock
from dyadlm.ops.segments import segment_ends, segment_plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULE = kernels.usable


def make_tower(**fields) -> Tower:
    """Sliding and semantic levels, in which every part has a say."""
    chosen = {"num_levels": 3, "level_rank": [3, 17, 5, 4, 18], "semantic_levels": ["word", "line"], **fields}
    tower = Tower(DyadConfig(hidden_size=16, num_hidden_layers=1, level_alignment="sliding", salience=True, **chosen))
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return tower.to(DEVICE)


def both(tower: Tower, clock: Clock, begins: Tensor, longest: int = 2**20) -> list[dict[str, Tensor]]:
    """Features, and the gradients of what is read and of the weights it goes through, of both forms.

    begins: (B, T, S) bool, where segments begin.
    """
    batch, time = clock.index.shape
    x, found = torch.randn(batch, time, 16, device=DEVICE), []
    plan, _ = segment_plan(begins, clock, longest)
    weights = {name: p for name, p in tower.named_parameters() if name.startswith(("bottlenecks", "salience"))}
    for keep in (True, False):
        layout = chunk_layout(clock, plan, torch.ones((), device=DEVICE), tower.config, torch.float32, keep)
        own = x.clone().requires_grad_()
        read, state = tower.read_levels(own, layout, BlockState())
        assert bool(state.rings) == keep
        features = {f"feature {k}": feature for k, feature in read.features.items()}
        generator = torch.Generator().manual_seed(1)
        loss = sum((f * torch.randn(f.shape, generator=generator).to(f)).sum() for f in features.values())
        slopes = torch.autograd.grad(loss, [own, *weights.values()])
        found.append(features | dict(zip(["x", *weights], slopes, strict=True)))
    return found


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to the order in which float32 is summed."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        allowed = max(1e-4, 5e-6 * float(value.detach().abs().max()))
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


def drawn(batch: int, time: int, *rates: float) -> Tensor:
    """(B, T, S) bool, true at these rates."""
    return torch.rand(batch, time, len(rates), device=DEVICE) < torch.tensor(rates, device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("early", ["zero", "partial", "mask"])
@pytest.mark.parametrize("packed", [False, True])
def test_features_and_gradients_equal_the_form_in_torch(early: str, packed: bool) -> None:
    """At a length that no tile divides, with documents that begin anywhere and rows that end in padding."""
    batch, time = 2, 83
    starts = torch.rand(batch, time, device=DEVICE) < 0.08 if packed else None
    length = torch.tensor([60, 0], device=DEVICE) if packed else None
    clock = make_clock(batch, time, starts=starts, length=length, device=DEVICE)
    expected, found = both(make_tower(early=early), clock, drawn(batch, time, 0.2, 0.04))
    assert_alike(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("stretch", "rank", "time"), [(STRETCH, 18, 5 * STRETCH + 1), (16, 65, 18 * 16)])
def test_segments_of_any_length(monkeypatch: pytest.MonkeyPatch, stretch: int, rank: int, time: int) -> None:
    """None ends; one does; two do; many do, some of them where stretches end. Short stretches are so many that their
    sums take more than one tile."""
    monkeypatch.setattr(dyadlm.kernels.stretches, "STRETCH", stretch)
    begins = torch.zeros(1, time, 4, dtype=torch.bool, device=DEVICE)
    for s, begun in enumerate(([], [time // 2], [50, 2 * time // 3], range(stretch, time, 8))):
        begins[:, list(begun), s] = True
    tower = make_tower(num_levels=1, level_rank=rank, semantic_levels=["syllable", "word", "sentence", "line"])
    expected, found = both(tower, make_clock(1, time, device=DEVICE), begins)
    assert_alike(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter alone can be counted")
def test_a_text_without_segments_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the sums of its stretches, once for itself: what stands open before a stretch is no tokens."""
    read = []
    for module, name in ((dyadlm.kernels.segments, "_weighed"), (dyadlm.kernels.segment_gradients, "_slopes")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, own=own, name=name: read.append(name) or own(*given))
    time = 4 * STRETCH
    plan, _ = segment_plan(torch.zeros(1, time, 1, dtype=torch.bool), make_clock(1, time), 2**20)
    places = (plan.last[..., 0], plan.complete[..., 0], segment_ends(plan.begins)[..., 0])
    x = torch.randn(1, time, 1, requires_grad=True)
    features, _ = segment_features(x, torch.ones(1, time), *places, torch.float32)
    features.sum().backward()
    tiles = time // tile_of(1)["rows"]
    assert sorted(read) == ["_slopes"] * (2 * tiles) + ["_weighed"] * (2 * tiles)


@pytest.mark.parametrize("time", [1, 2, 17])
def test_short_texts(time: int) -> None:
    expected, found = both(make_tower(early="partial"), make_clock(1, time, device=DEVICE), drawn(1, time, 0.4, 0.1))
    assert_alike(found, expected)


@pytest.mark.slow
def test_the_widest_level() -> None:
    tower = make_tower(level_rank=2, num_levels=kernels.WIDEST_LEVEL + 1, early="partial")
    expected, found = both(tower, make_clock(1, 75, device=DEVICE), drawn(1, 75, 0.2, 0.2))
    assert_alike(found, expected)


def windows_by(x: Tensor, weight: Tensor) -> tuple[tuple, Callable, Callable]:
    """What both operators of sliding levels take besides tokens, weights and dtype, and the operators."""
    index = make_clock(*weight.shape, device=DEVICE).index
    return (
        (index,),
        lambda x, w, dtype: window_features(x, w, index, None, None, 2, dtype),
        lambda x, w, *features: window_gradients(x, w, index, *features, 2),
    )


def segments_by(x: Tensor, weight: Tensor) -> tuple[tuple, Callable, Callable]:
    """The same of semantic levels."""
    batch, time = weight.shape
    plan, _ = segment_plan(drawn(batch, time, 0.1), make_clock(batch, time, device=DEVICE), 2**20)
    places = (plan.last[..., 0], plan.complete[..., 0], segment_ends(plan.begins)[..., 0])
    return (
        places,
        lambda x, w, dtype: segment_features(x, w, *places, dtype),
        lambda x, w, *features: segment_gradients(x, w, *places, *features),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", [windows_by, segments_by])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_halves_are_summed_in_float32(family: Callable, dtype: torch.dtype, rounding: float) -> None:
    """Tokens in half precision: features in float32 are exact. Features in half precision are rounded once, and
    gradients differ by the rounding of what they read and of what is written. (The interpreter cuts bfloat16 off where
    a GPU rounds.)"""
    x, weight = torch.randn(2, 70, 9, device=DEVICE).to(dtype), torch.rand(2, 70, device=DEVICE) + 0.5
    _, features_of, gradients_of = family(x, weight)
    exact, sums = features_of(x, weight, torch.float32)
    wide, wide_sums = features_of(x.float(), weight, torch.float32)
    assert torch.equal(exact, wide)
    assert torch.equal(sums, wide_sums)
    halves, _ = features_of(x, weight, dtype)
    assert halves.dtype == dtype
    torch.testing.assert_close(halves.float(), exact, rtol=rounding, atol=1e-6)
    slope = torch.randn(exact.shape, device=DEVICE).to(dtype)
    expected = gradients_of(x.float(), weight, exact, slope, sums)
    for read in (exact, exact.to(dtype)):
        found = gradients_of(x, weight, read, slope, sums)
        assert found[0].dtype == dtype
        for part, whole in zip(found, expected, strict=True):
            assert (part - whole).float().norm() < rounding * whole.norm()


@pytest.mark.parametrize("family", [windows_by, segments_by])
def test_what_a_compiler_lays_out_in_another_way_is_read_as_it_lies(family: Callable) -> None:
    def moved(part: Tensor) -> Tensor:
        """The same values, with the rows of the batch beside each other in memory."""
        return part.transpose(0, 1).contiguous().transpose(0, 1)

    x, weight = torch.randn(2, 20, 5, device=DEVICE), torch.rand(2, 20, device=DEVICE) + 0.5
    _, features_of, gradients_of = family(x, weight)
    features, sums = features_of(x, weight, torch.float32)
    assert torch.equal(features_of(moved(x), moved(weight), torch.float32)[0], features)
    given = (x, weight, features, torch.randn_like(features), sums)
    for found, expected in zip(gradients_of(*map(moved, given)), gradients_of(*given), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", [windows_by, segments_by])
def test_torch_takes_them_for_operators(family: Callable) -> None:
    """Their schemas, shapes without values (for `torch.compile`) and gradients, as torch itself checks them."""
    x = torch.randn(2, 9, 5, device=DEVICE, requires_grad=True)
    weight = torch.rand(2, 9, device=DEVICE, requires_grad=True)
    places, features_of, _ = family(x, weight)
    features, sums = (part.detach() for part in features_of(x, weight, torch.float32))
    own = (features, torch.ones_like(features), sums)
    if family is windows_by:
        torch.library.opcheck(window_features, (x, weight, *places, None, None, 2, torch.float32))
        torch.library.opcheck(window_gradients, (x.detach(), weight.detach(), *places, *own, 2))
    else:
        torch.library.opcheck(segment_features, (x, weight, *places, torch.float32))
        torch.library.opcheck(segment_gradients, (x.detach(), weight.detach(), *places, *own))


@pytest.mark.slow
def test_a_model_trains_as_with_the_forms_in_torch(
    make_model: Callable, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With documents that begin inside a row, and padding, whose own prediction of the first token counts."""
    model, ids, found = make_model(), torch.randint(32, 127, (2, 45), device=DEVICE), []
    mask, positions = torch.ones_like(ids), torch.arange(45, device=DEVICE).repeat(2, 1)
    mask[1, :7], positions[0, 13:] = 0, torch.arange(32, device=DEVICE)
    for usable in (lambda x: False, kernels.usable):
        monkeypatch.setattr(kernels, "usable", usable)
        model.zero_grad()
        padded = {"attention_mask": mask, "position_ids": positions}
        loss = model(input_ids=ids, labels=ids, use_cache=False, **padded).loss
        loss.backward()
        slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach()} | slopes)
    levels = [*["window_features"] * 4, *["segment_features"] * 4]
    assert calls == ["ring_lookup", *levels, *levels, "slot_recall"]  # the last block has slots
    assert_alike(found[1], found[0])


@pytest.mark.slow
def test_gradients_in_bfloat16_are_as_exact_as_those_in_torch(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all kernels, those of slots included."""
    ids = torch.randint(97, 103, (2, 45), device=DEVICE)
    assert_kernels_as_exact(make_model(num_hidden_layers=1), ids, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that torch itself reads while it compiles
def test_compiled_blocks_call_them(make_model: Callable) -> None:
    """Whole blocks are one graph."""
    model, ids = make_model(num_hidden_layers=1), torch.randint(32, 127, (2, 20), device=DEVICE)
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    found = model(input_ids=ids, labels=ids, use_cache=False).loss
    found.backward()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "fields",
    [{"level_feature": "difference"}, {"salience": False}, {"transport_space": "model"}, {"forgetting": True}],
)
def test_variants_keep_the_forms_in_torch(make_model: Callable, calls: list[str], fields: dict) -> None:
    make_model(slot_contexts=None, **fields)(input_ids=torch.randint(32, 127, (1, 5), device=DEVICE), use_cache=False)
    assert not calls


def test_where_a_state_is_left_the_forms_in_torch_stay(make_model: Callable, calls: list[str]) -> None:
    model, cache = make_model(slot_contexts=None).eval(), DyadCache()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.randint(32, 127, (1, 5), device=DEVICE), past_key_values=cache, use_cache=True)
    assert not calls


def test_the_rule() -> None:
    x = torch.zeros(1, device=DEVICE)
    assert RULE(x) == x.is_cuda
    assert not RULE(x.double())
