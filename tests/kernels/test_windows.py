"""The kernels of sliding levels against the form in torch: values and gradients. On a CPU, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM, kernels
from dyadlm.kernels.windows import window_features, window_gradients
from dyadlm.model.cache import BlockState
from dyadlm.model.layout import ChunkLayout, chunk_layout
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import make_clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_tower(**fields) -> Tower:
    config = DyadConfig(
        hidden_size=16, num_hidden_layers=1, level_alignment="sliding", salience=True,
        **{"level_rank": [3, 17, 5], "num_levels": 3, **fields},
    )  # fmt: skip
    tower = Tower(config).to(DEVICE)
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return tower


def make_layout(tower: Tower, batch: int, time: int, keep: bool, starts=None, length=None) -> ChunkLayout:
    clock = make_clock(batch, time, starts=starts, length=length, device=DEVICE)
    return chunk_layout(clock, None, torch.ones((), device=DEVICE), tower.config, torch.float32, keep)


def both(tower: Tower, x: Tensor, layouts: tuple[ChunkLayout, ChunkLayout]) -> list[dict[str, Tensor]]:
    """Features, and the gradients of x and of all weights, of the form in torch and of the kernels."""
    found = []
    (family,) = tower.families
    for layout in layouts:
        own = x.clone().requires_grad_()
        (weights,) = tower.weights(own)
        if layout.keep:
            features = family.read(own, weights, layout, BlockState())[0].features
        else:
            features = family.read_by_kernel(own, weights.sums, layout)
        generator = torch.Generator().manual_seed(1)
        loss = sum((f * torch.randn(f.shape, generator=generator).to(f)).float().sum() for f in features.values())
        read = {name: p for name, p in tower.named_parameters() if name.startswith(("bottlenecks", "salience"))}
        slopes = torch.autograd.grad(loss, [own, *read.values()])
        named = {f"feature {k}": f.detach() for k, f in features.items()}
        found.append(named | dict(zip(["x", *read], slopes, strict=True)))
    return found


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to the order in which float32 is summed."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("early", ["zero", "partial", "mask"])
@pytest.mark.parametrize("packed", [False, True])
def test_features_and_gradients_equal_the_form_in_torch(early: str, packed: bool) -> None:
    """At a length that no tile divides, with documents that begin anywhere and rows that end in padding."""
    tower, batch, time = make_tower(early=early), 2, 67
    starts = torch.rand(batch, time, device=DEVICE) < 0.08 if packed else None
    length = torch.tensor([67, 50], device=DEVICE) if packed else None
    layouts = [make_layout(tower, batch, time, keep, starts, length) for keep in (True, False)]
    expected, found = both(tower, torch.randn(batch, time, 16, device=DEVICE), layouts)
    assert_alike(found, expected)


@pytest.mark.parametrize("time", [1, 2, 64])
def test_short_texts_and_whole_tiles(time: int) -> None:
    tower = make_tower(early="partial")
    layouts = [make_layout(tower, 1, time, keep) for keep in (True, False)]
    expected, found = both(tower, torch.randn(1, time, 16, device=DEVICE), layouts)
    assert_alike(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Tokens in half precision, features in float32, as under autocast: exact but for what is written in halves."""
    x, weight = torch.randn(2, 70, 9, device=DEVICE).to(dtype), torch.rand(2, 70, device=DEVICE) + 0.5
    index, slope = make_clock(2, 70, device=DEVICE).index, torch.randn(2, 70, 27, device=DEVICE)
    features, scales = window_features(x, weight, index, None, None, 3, torch.float32)
    expected, scales_expected = window_features(x.float(), weight, index, None, None, 3, torch.float32)
    assert torch.equal(features, expected)
    assert torch.equal(scales, scales_expected)
    x_slope, weight_slope = window_gradients(x, weight, index, features, slope, scales, 3)
    x_expected, weight_expected = window_gradients(x.float(), weight, index, features, slope, scales, 3)
    assert torch.equal(weight_slope, weight_expected)
    assert x_slope.dtype == dtype
    # The interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(x_slope.float(), x_expected, rtol=2**-7, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_features_in_half_precision(dtype: torch.dtype, rounding: float) -> None:
    """Values are those of float32, rounded once; gradients differ by the rounding of the factors of the product."""
    x, weight = torch.randn(2, 70, 9, device=DEVICE).to(dtype), torch.rand(2, 70, device=DEVICE) + 0.5
    index, slope = make_clock(2, 70, device=DEVICE).index, torch.randn(2, 70, 27, device=DEVICE).to(dtype)
    exact, scales = window_features(x, weight, index, None, None, 2, torch.float32)
    features, _ = window_features(x, weight, index, None, None, 2, dtype)
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), exact, rtol=rounding, atol=1e-6)
    expected = window_gradients(x, weight, index, exact, slope, scales, 2)
    found = window_gradients(x, weight, index, exact.to(dtype), slope, scales, 2)
    for part, whole in zip(found, expected, strict=True):
        assert (part - whole).float().norm() < rounding * whole.float().norm()


@pytest.mark.slow
def test_the_widest_level() -> None:
    tower = make_tower(level_rank=2, num_levels=kernels.WIDEST + 1, early="partial")
    layouts = [make_layout(tower, 1, 75, keep) for keep in (True, False)]
    expected, found = both(tower, torch.randn(1, 75, 16, device=DEVICE), layouts)
    assert_alike(found, expected)


@pytest.mark.slow
def test_torch_takes_them_for_operators() -> None:
    """Their schemas, shapes without values (for `torch.compile`) and gradients, as torch itself checks them."""
    x = torch.randn(2, 9, 5, device=DEVICE, requires_grad=True)
    weight = torch.rand(2, 9, device=DEVICE, requires_grad=True)
    index = make_clock(2, 9, device=DEVICE).index
    torch.library.opcheck(window_features, (x, weight, index, None, None, 2, torch.float32))
    features, scales = (part.detach() for part in window_features(x, weight, index, None, None, 2, torch.float32))
    given = (x.detach(), weight.detach(), index, features, torch.ones_like(features), scales, 2)
    torch.library.opcheck(window_gradients, given)


def make_model(**fields) -> DyadForCausalLM:
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, **fields)).to(DEVICE)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.train()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels are chosen on this device, too; the levels that they computed."""
    computed = []

    def counted(*arguments):
        computed.append(arguments[5])
        return window_features(*arguments)

    monkeypatch.setattr(kernels, "usable", lambda x: x.dtype in kernels.DTYPES)
    monkeypatch.setattr("dyadlm.kernels.windows.window_features", counted)
    return computed


@pytest.mark.slow
def test_a_model_trains_as_with_the_form_in_torch(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model(), torch.randint(32, 127, (2, 45), device=DEVICE)
    found = []
    for usable in (lambda x: False, kernels.usable):
        monkeypatch.setattr(kernels, "usable", usable)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach()} | slopes)
    assert calls == [0, 1, 2, 3] * 2
    assert_alike(found[1], found[0])


@pytest.mark.parametrize(
    "fields", [{"level_feature": "difference"}, {"salience": False}, {"transport_space": "model"}]
)  # fmt: skip
def test_variants_keep_the_form_in_torch(calls: list[int], fields: dict) -> None:
    make_model(**fields)(input_ids=torch.randint(32, 127, (1, 5), device=DEVICE), use_cache=False)
    assert not calls


def test_where_a_state_is_left_the_form_in_torch_stays(calls: list[int]) -> None:
    model, cache = make_model().eval(), DyadCache()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.randint(32, 127, (1, 5), device=DEVICE), past_key_values=cache, use_cache=True)
    assert not calls


def test_the_rule() -> None:
    x = torch.zeros(1, device=DEVICE)
    assert kernels.usable(x) == x.is_cuda
    assert not kernels.usable(x.double())
