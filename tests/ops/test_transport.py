"""The laws of phase transport, as properties."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from dyadlm.ops import phase_transport, reference

seeds = st.integers(0, 2**32 - 1)
widths = st.integers(2, 9)
ratios = st.floats(0.021, 1.0)  # |shorter| / |longer|, above twice the guard


def vectors(seed: int, width: int, ratio: float, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pairs (count, width) float64 whose norms have the given ratio; the pair's order alternates."""
    generator = torch.Generator().manual_seed(seed)
    q, p = torch.randn(2, count, width, generator=generator, dtype=torch.float64).unbind(0)
    q, p = q / q.norm(dim=-1, keepdim=True), ratio * p / p.norm(dim=-1, keepdim=True)
    scale = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 10 + 0.1
    swap = (torch.arange(count) % 2 == 0)[:, None]
    return scale * torch.where(swap, q, p), scale * torch.where(swap, p, q)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@settings(max_examples=40, deadline=None)
@given(seeds, widths, ratios)
def test_keeps_the_length_of_the_difference(seed, width, ratio):
    q, p = vectors(seed, width, ratio)
    close(phase_transport(q, p).norm(dim=-1), (q - p).norm(dim=-1))


@settings(max_examples=40, deadline=None)
@given(seeds, widths, st.floats(0.0, 1.0))
def test_equals_the_matrix_form(seed, width, ratio):
    """The rotation as an explicit matrix, the guard region included."""
    q, p = vectors(seed, width, ratio)
    # Nearer to the antipode the matrix, not the fast form, loses digits.
    assume(bool((torch.cosine_similarity(q, p) > 1e-6 - 1).all()))
    close(phase_transport(q, p), reference.phase_transport(q, p), 1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, widths, st.floats(0.0, 1.0), st.booleans())
def test_commutes_with_orthogonal_maps(seed, width, ratio, reflect):
    q, p = vectors(seed, width, ratio)
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(matrix).Q
    if reflect != bool(torch.linalg.det(rotation) < 0):
        rotation[:, 0] = -rotation[:, 0]
    assert math.isclose(torch.linalg.det(rotation).item(), -1.0 if reflect else 1.0, abs_tol=1e-9)
    close(phase_transport(q @ rotation.T, p @ rotation.T), phase_transport(q, p) @ rotation.T)


@settings(max_examples=40, deadline=None)
@given(seeds, widths, st.floats(0.0, 1.0), st.floats(1e-6, 1e6))
def test_scales_with_its_arguments(seed, width, ratio, factor):
    q, p = vectors(seed, width, ratio)
    close(phase_transport(factor * q, factor * p) / factor, phase_transport(q, p))


@settings(max_examples=20, deadline=None)
@given(seeds, widths)
def test_no_change_is_zero(seed, width):
    q, _ = vectors(seed, width, 0.5)
    assert torch.equal(phase_transport(q, q), torch.zeros_like(q))


@settings(max_examples=20, deadline=None)
@given(seeds, widths, ratios)
def test_parallel_vectors_give_the_plain_difference(seed, width, ratio):
    q, _ = vectors(seed, width, 0.5)
    close(phase_transport(q, ratio * q), q - ratio * q)


@settings(max_examples=20, deadline=None)
@given(seeds, widths, ratios)
def test_the_antipode_is_regular(seed, width, ratio):
    p, _ = vectors(seed, width, 0.5)
    q = -ratio * p
    close(phase_transport(q, p), (1 + ratio) * p)


def test_outside_the_guard_plain_inside_exact_and_continuous():
    p = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for ratio in (0.0, 1e-3, 1e-2):
        q = torch.tensor([[ratio, 0.0]], dtype=torch.float64)
        assert torch.equal(phase_transport(q, p), q - p)
    ratios = torch.linspace(0.005, 0.03, 2001, dtype=torch.float64)
    path = phase_transport(torch.stack([ratios, torch.zeros_like(ratios)], -1), p)
    assert path.diff(dim=0).norm(dim=-1).max() < 5e-3  # a jump would be about 1
    assert not torch.allclose(path[0], path[-1], atol=0.5)


def test_does_not_cancel_in_float32():
    """Relative error 1e-2 for the textbook expression at |q - p| / |q| = 1e-5; here rounding only."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(256, 32, generator=generator)
    step = torch.randn(256, 32, generator=generator)
    q = p + 1e-5 * step / step.norm(dim=-1, keepdim=True) * p.norm(dim=-1, keepdim=True)
    exact = phase_transport(q.double(), p.double())
    error = (phase_transport(q, p).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 1e-6


@pytest.mark.parametrize("ratio", [0.025, 0.1, 0.3, 1.0])
def test_unequal_lengths_in_float32(ratio):
    q, p = (v.float() for v in vectors(0, 32, ratio, count=256))
    exact = phase_transport(q.double(), p.double())
    error = (phase_transport(q, p).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 2e-6


def test_near_the_antipode_in_float32():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(256, 16, generator=generator)
    q = -p * (0.5 + torch.rand(256, 1, generator=generator)) + 1e-6 * torch.randn(256, 16, generator=generator)
    exact = phase_transport(q.double(), p.double())
    error = (phase_transport(q, p).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 1e-5


def test_bfloat16_inputs_within_their_rounding():
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 128, 32, generator=generator).bfloat16().unbind(0)
    result = phase_transport(q, p)
    exact = phase_transport(q.double(), p.double())
    assert result.dtype == torch.bfloat16
    assert ((result.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2**-8


def test_gradients_against_finite_differences():
    q, p = vectors(3, 4, 0.4, count=3)
    inside = vectors(4, 4, 0.015, count=2)  # between guard and twice the guard: the blend is differentiated too
    for a, b in ((q, p), inside):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        assert gradcheck(phase_transport, (a, b))
        assert gradgradcheck(phase_transport, (a, b), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_everywhere(dtype):
    zero, unit = torch.zeros(5, dtype=dtype), torch.eye(5, dtype=dtype)[0]
    special = [
        zero,
        unit,
        -unit,
        1e-18 * unit,
        1e-30 * unit,
        1e15 * unit,
        1e-2 * unit,
        2e-2 * unit,
        unit.flip(0),
    ]
    for q in special:
        for p in special:
            q, p = q.clone().requires_grad_(), p.clone().requires_grad_()
            result = phase_transport(q, p)
            assert result.isfinite().all()
            for gradient in torch.autograd.grad(result.sum(), (q, p)):
                assert gradient.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    q, p = vectors(0, 8, 0.3, count=64)
    close(phase_transport(q.cuda(), p.cuda()).cpu(), phase_transport(q, p))
