"""The linear recurrence against its definition: values, states and gradients, at lengths that fill no tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import reference
from dyadlm.ops.recurrence import linear_scan

EXACT = 1e-12


def make_case(time, seed=0, batch=2, channels=3):
    """Factors between 0 and 1, some of them exactly either."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, time, channels, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    value = torch.randn(batch, time, channels, generator=generator, dtype=torch.float64)
    return keep.clamp(0, 1), value, torch.randn(batch, channels, generator=generator, dtype=torch.float64)


def by_definition(keep, value, state):
    return torch.stack([reference.linear_scan(*row) for row in zip(keep, value, state, strict=True)])


@pytest.mark.parametrize("time", [1, 2, 16, 17, 257])
def test_values_and_gradients_are_those_of_the_definition(time):
    found, expected = [], []
    for results, function in ((found, linear_scan), (expected, by_definition)):
        case = [part.requires_grad_() for part in make_case(time)]
        scanned = function(*case)
        weights = torch.arange(scanned.numel(), dtype=torch.float64).view_as(scanned).cos()
        results += [scanned, *torch.autograd.grad((scanned * weights).sum(), case)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


@settings(max_examples=12, deadline=None)
@given(time=st.integers(2, 70), cut=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_chunks_continue_where_the_state_stands(time, cut, seed):
    keep, value, state = make_case(time, seed)
    at = min(max(1, int(cut * time)), time - 1)
    first = linear_scan(keep[:, :at], value[:, :at], state)
    second = linear_scan(keep[:, at:], value[:, at:], first[:, -1])
    whole = linear_scan(keep, value, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=EXACT)


def test_a_factor_of_zero_forgets_exactly():
    keep, value, state = make_case(40)
    keep[:, 21] = 0
    before = linear_scan(keep, value, state)[:, 21:]
    assert torch.equal(linear_scan(keep, value * (torch.arange(40) >= 21)[:, None], state * 1e9)[:, 21:], before)


def test_nothing_between_events_changes_what_is_held():
    keep, value, state = torch.ones(1, 50, 2), torch.zeros(1, 50, 2), torch.tensor([[0.3, -1.7]])
    assert torch.equal(linear_scan(keep, value, state), state[:, None].expand(1, 50, 2))
