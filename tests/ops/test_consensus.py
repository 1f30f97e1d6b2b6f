"""Consensus of two distributions against its definition, and what must hold of it whatever they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import reference
from dyadlm.ops.consensus import consensus, nucleus

logits = st.lists(st.floats(-12, 12), min_size=2, max_size=9)
masses = st.sampled_from([0.0, 0.2931, 0.7133, 0.9071, 1.0])  # none that equal likelihoods add up to
examples = settings(max_examples=30, deadline=None)


def make_pair(values: list[float], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    engineer = torch.tensor(values, dtype=torch.float64)
    return engineer, 3 * torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@examples
@given(values=logits, mass=masses, seed=st.integers(0, 50))
def test_it_is_its_definition_and_a_distribution(values, mass, seed):
    engineer, artist = make_pair(values, seed)
    found = consensus(engineer, artist, mass).exp()
    expected = reference.consensus(engineer.softmax(-1).tolist(), artist.softmax(-1).tolist(), mass)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert found.sum().item() == pytest.approx(1, abs=1e-9)


@examples
@given(values=logits, mass=masses, seed=st.integers(0, 50))
def test_nothing_changes_outside_the_nucleus_nor_its_mass(values, mass, seed):
    engineer, artist = make_pair(values, seed)
    alone = engineer.log_softmax(-1)
    inside, found = nucleus(alone, mass), consensus(engineer, artist, mass)
    assert torch.equal(found[~inside], alone[~inside])
    held = alone.exp()[inside].sum().item()
    assert found.exp()[inside].sum().item() == pytest.approx(held, abs=1e-9)
    assert held >= mass - 1e-9
    assert mass or not inside.any()
    if inside.any():  # and no smaller set of likeliest tokens reaches the mass
        assert held - alone.exp()[inside].min().item() < mass + 1e-9
        assert alone[inside].min() >= alone[~inside].max() if (~inside).any() else True


@examples
@given(values=logits, mass=masses, seed=st.integers(0, 50), weight=st.floats(-1, 1))
def test_a_weighted_pool_is_its_definition_and_a_distribution(values, mass, seed, weight):
    engineer, artist = make_pair(values, seed)
    found = consensus(engineer, artist, mass, weight).exp()
    expected = reference.consensus(engineer.softmax(-1).tolist(), artist.softmax(-1).tolist(), mass, weight)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert found.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.9, 1.0])
def test_weights_are_those_of_each_token_and_zero_is_the_engineer_to_the_bit(mass):
    engineer, artist = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.0, 1.0, 0.3, -0.7, 0.0]).expand(4, 5)
    found = consensus(engineer, artist, mass, weight)
    assert torch.equal(found[:, [0, 4]], engineer.log_softmax(-1)[:, [0, 4]])
    assert torch.equal(found[:, 1], consensus(engineer, artist, mass)[:, 1])
    for place in (2, 3):
        alone = consensus(engineer[:, place], artist[:, place], mass, float(weight[0, place]))
        torch.testing.assert_close(found[:, place], alone)


def test_a_veto_counts_where_the_artist_is_believed_and_leaves_finite_gradients():
    engineer = torch.zeros(3, 4, requires_grad=True)
    artist = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(3, 4)
    weight = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    found = consensus(engineer, artist, 1.0, weight)
    assert (found[:, 3] > -torch.inf).tolist() == [False, True, True]
    found[:, :3].sum().backward()
    assert engineer.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@examples
@given(values=logits, mass=masses)
def test_an_artist_without_opinion_changes_nothing(values, mass):
    engineer = torch.tensor(values, dtype=torch.float64)
    found = consensus(engineer, torch.full_like(engineer, 2.5), mass)
    torch.testing.assert_close(found, engineer.log_softmax(-1))


def test_mass_zero_is_the_engineer_and_mass_one_the_product():
    engineer, artist = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(consensus(engineer, artist, 0.0), engineer.log_softmax(-1))
    torch.testing.assert_close(consensus(engineer, artist, 1.0), (engineer + artist).log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_are_added_up_exactly_enough(dtype):
    alone = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).log_softmax(-1).to(dtype)
    for mass in (0.9, 0.99):
        expected = nucleus(alone.double(), mass).sum().item()
        assert nucleus(alone, mass).sum().item() == pytest.approx(expected, rel=1e-3)
    assert nucleus(alone, 1.0).all()


def test_what_is_forbidden_stays_so_and_a_veto_of_everything_is_overruled():
    never = -torch.inf
    engineer = torch.tensor([[2.0, 1.0, never, 0.0], [2.0, 1.0, never, 0.0]], requires_grad=True)
    artist = torch.tensor([[0.0, 1.0, 5.0, never], [never, never, 0.0, 0.0]])
    found = consensus(engineer, artist, 0.9)
    assert found[0, 2] == found[1, 2] == never
    assert not found.isnan().any()
    torch.testing.assert_close(found[1], engineer[1].log_softmax(-1))  # the artist allows nothing of the nucleus
    assert found[0, 1] > engineer[0].log_softmax(-1)[1]
    found[:, :2].sum().backward()
    assert not engineer.grad.isnan().any()


def test_what_cannot_come_is_in_no_nucleus():
    """Neither where all that is possible is taken, nor where rounding keeps the sum below the mass."""
    rounded = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]).log().bfloat16()
    assert rounded.float().exp().sum() < 0.999
    for mass in (0.999, 1.0):
        assert nucleus(rounded, mass).tolist() == [True, True, True, False]
