"""The selector: fast forms against the loops, the state contract, and the measures of routes.

Dimension letters: B batch, T time, H heads, K levels.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import reference
from dyadlm.ops.pyramid import make_clock, next_position
from dyadlm.ops.selection import (
    KINDS,
    SPAN,
    balanced,
    best,
    choose,
    chosen_count,
    entmax,
    entropy,
    gumbel_noise,
    load,
    mean_run_length,
    real_tokens,
    select,
)

CHOOSING = ("topk", "gumbel")


def signal(*shape, seed=0, ties=False):
    """Random scores in float64; with ties, from a few values that add without rounding."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-4, 5, shape, generator=generator).double() / 4
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def ragged_clock(time, starts_at, lengths):
    """A clock with padding and packed documents."""
    starts = torch.zeros(len(lengths), time, dtype=torch.bool)
    for b, columns in enumerate(starts_at):
        starts[b, columns] = True
    return make_clock(len(lengths), time, length=torch.tensor(lengths), starts=starts)


def in_chunks(scores, clock, cuts, kind, **options):
    """Weights of one row set, taken in pieces with what is held handed on, and what is held at the end."""
    parts, held, position = [], None, None
    starts = (clock.index == 0) & real_tokens(clock)
    for a, b in zip([0, *cuts], [*cuts, scores.shape[1]], strict=True):
        length = (clock.length - a).clamp(0, b - a)
        piece = make_clock(len(scores), b - a, position=position, length=length, starts=starts[:, a:b])
        weights, held = select(scores[:, a:b], kind, piece, held=held, **options)
        position = next_position(piece)
        parts.append(weights)
    return torch.cat(parts, 1), held


# ---- Against the loops


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("kind", "margin"), [("dense", 0.0), ("entmax", 0.0), *((kind, m) for kind in CHOOSING for m in (0.0, 0.5, 1.5))]
)
def test_equals_the_loop(kind, margin, ties):
    """Padding, packing, bias, a held choice."""
    time, heads, levels = 73, 2, 5
    scores = signal(3, time, heads, levels, ties=ties)
    clock = ragged_clock(time, [[0, 20, 21], [40], [5]], [time, time - 3, 0])
    bias = signal(heads, levels, seed=1, ties=ties) if kind in CHOOSING else None
    held = signal(3, heads, levels, seed=2) > 0.5
    weights, after = select(scores, kind, clock, count=3, bias=bias, margin=margin, held=held)
    expected, expected_after = reference.select(scores, kind, clock, 3, bias, margin, held=held)
    real = real_tokens(clock)
    assert weights.dtype == torch.float64
    assert (weights - expected)[real].abs().max() < 1e-12
    assert torch.equal((weights > 0)[real], (expected > 0)[real])
    if kind in CHOOSING:
        assert torch.equal(after, expected_after)
        assert torch.equal(after[2], held[2])  # a row of pads alone
    else:
        assert after is None


@pytest.mark.parametrize("margin", [0.0, 0.75])
def test_noise_moves_the_choice_of_gumbel(margin):
    scores, clock = signal(2, 50, 2, 6), make_clock(2, 50)
    torch.manual_seed(3)
    weights, held = select(scores, "gumbel", clock, margin=margin, noisy=True)
    torch.manual_seed(3)
    expected, expected_held = reference.select(scores, "gumbel", clock, margin=margin, noise=gumbel_noise(scores))
    assert torch.equal(weights, expected)
    assert torch.equal(held, expected_held)
    assert not torch.equal(weights, select(scores, "gumbel", clock, margin=margin)[0])


def test_noise_samples_from_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -math.inf])
    weights, _ = select(scores.expand(1, 100_000, 1, 4), "gumbel", make_clock(1, 100_000), noisy=True)
    assert (weights.mean((0, 1, 2)) - scores.softmax(-1)).abs().max() < 0.006  # four standard errors


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-24, 24), min_size=1, max_size=12))
def test_entmax_equals_bisection(row):
    """With ties, and differences of 2, where the support begins and ends."""
    scores = torch.tensor(row, dtype=torch.float64) / 8
    expected = torch.tensor(reference.entmax(scores.tolist()), dtype=torch.float64)
    assert (entmax(scores) - expected).abs().max() < 1e-12
    single = entmax(scores.float())
    assert (single - expected).abs().max() < 1e-6
    assert (single[scores <= scores.max() - 2] == 0).all()


# ---- Gradients


def test_gradients_of_entmax():
    for seed in range(5):
        scores = (signal(7, 6, seed=seed) * 1.5).requires_grad_()
        weights = entmax(scores)
        assert (weights == 0).any()
        assert torch.autograd.gradcheck(entmax, scores)


@pytest.mark.parametrize("kind", CHOOSING)
def test_gradients_are_those_of_the_softmax(kind):
    """Straight through, whatever was chosen; gumbel at its temperature and with its noise."""
    scores, upstream = signal(2, 40, 2, 6).requires_grad_(), signal(2, 40, 2, 6, seed=1)
    bias, temperature = signal(2, 6, seed=2), torch.tensor(0.6, dtype=torch.float64)
    torch.manual_seed(5)
    weights, held = select(scores, kind, make_clock(2, 40), bias=bias, margin=0.5, temperature=temperature, noisy=True)
    torch.manual_seed(5)
    soft = scores.softmax(-1) if kind == "topk" else ((scores + gumbel_noise(scores)) / temperature).softmax(-1)
    got, expected = (torch.autograd.grad(w, scores, upstream)[0] for w in (weights, soft))
    assert (got - expected).abs().max() < 1e-14
    assert (got[weights == 0] != 0).any()
    assert not held.requires_grad


# ---- One state contract


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunks_padding_and_packing_equal_each_document_alone(data):
    """Any cuts, any margin: bit for bit, in float32."""
    kind = data.draw(st.sampled_from(CHOOSING))
    options = {
        "margin": data.draw(st.sampled_from([0.0, 0.25, 1.0, 3.0, 1e6])),
        "count": data.draw(st.integers(1, 4)),
        "bias": data.draw(st.sampled_from([None, signal(2, 4, seed=1, ties=True).float()])),
    }
    rows = [data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3)) for _ in range(2)]
    time = max(map(sum, rows)) + data.draw(st.integers(1, 3))
    scores = signal(2, time, 2, 4, seed=time, ties=data.draw(st.booleans())).float()
    clock = ragged_clock(time, [[sum(row[:i]) for i in range(len(row))] for row in rows], [sum(row) for row in rows])
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=6)))
    whole, held = select(scores, kind, clock, **options)
    parts, carried = in_chunks(scores, clock, cuts, kind, **options)
    assert torch.equal(parts[real_tokens(clock)], whole[real_tokens(clock)])
    assert torch.equal(carried, held)
    for b, row in enumerate(rows):
        at = 0
        for size in row:
            alone, final = select(scores[b : b + 1, at : at + size], kind, make_clock(1, size), **options)
            assert torch.equal(whole[b, at : at + size], alone[0])
            at += size
        assert torch.equal(held[b], final[0])


@pytest.mark.parametrize("kind", CHOOSING)
def test_token_by_token_equals_the_whole(kind):
    scores, clock = signal(2, 70, 2, 5).float(), make_clock(2, 70)
    whole, held = select(scores, kind, clock, margin=0.5)
    parts, carried = in_chunks(scores, clock, list(range(1, 70)), kind, margin=0.5)
    assert torch.equal(parts, whole)
    assert torch.equal(carried, held)


def test_a_huge_margin_holds_until_the_document_ends():
    scores, clock = signal(1, 100, 3, 6), ragged_clock(100, [[0, 45]], [100])
    free, _ = select(scores, "topk", clock)
    weights, held = select(scores, "topk", clock, margin=1e9)
    chosen = weights > 0
    assert (chosen[:, :45] == chosen[:, :1]).all()
    assert (chosen[:, 45:] == chosen[:, 45:46]).all()
    assert torch.equal(chosen[:, 45], (free > 0)[:, 45])  # the first choice of a document owes nothing to the last
    assert not torch.equal(chosen[:, 44], chosen[:, 45])
    assert torch.equal(held, chosen[:, -1])


def test_a_choice_changes_when_the_evidence_passes_the_margin():
    lead = torch.tensor([0.0, 0.5, 1.0, 1.25, 0.0, -1.0, -1.25, 0.0])  # of level 1 over level 0
    scores = torch.stack([torch.zeros(8), lead], -1)[None, :, None]
    weights, _ = select(scores, "gumbel", make_clock(1, 8), margin=1.0)
    assert weights[0, :, 0, 1].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]  # at equal evidence, the lower level


def test_margin_costs_nothing_where_it_is_zero(monkeypatch):
    """One pass over all tokens, where a margin takes one a token on a CPU."""
    seen = []
    monkeypatch.setattr(
        "dyadlm.ops.selection.best", lambda evidence, count: seen.append(len(evidence[0])) or evidence > 0
    )
    choose(signal(1, 80, 1, 4), 2, make_clock(1, 80))
    assert seen == [80]
    choose(signal(1, 80, 1, 4), 2, make_clock(1, 80), margin=0.5)
    assert seen == [80] + [1] * 80


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sweeps_over_spans_equal_the_loop(data):
    """Any span, margin and held choice; documents that start anywhere; chains from one token to the whole span."""
    time = data.draw(st.integers(1, 90))
    span = data.draw(st.sampled_from([2, 7, SPAN, 64, 100]))
    count = data.draw(st.integers(1, 3))
    margin = data.draw(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 1e6]))
    starts = [sorted(data.draw(st.sets(st.integers(0, time - 1), max_size=3))) for _ in range(2)]
    clock = ragged_clock(time, starts, [time, time])
    evidence = signal(2, time, 2, 5, seed=time, ties=data.draw(st.booleans()))
    held = data.draw(st.sampled_from([None, signal(2, 2, 5, seed=span) > 0.5]))
    swept = choose(evidence, count, clock, margin, held, span=span)
    assert torch.equal(swept, choose(evidence, count, clock, margin, held, span=1))
    expected, _ = reference.select(evidence, "topk", clock, count, margin=margin, held=held)
    assert torch.equal(swept, expected > 0)


def test_sweeps_stop_when_nothing_changes(monkeypatch):
    """Far fewer than tokens where chains are short, never more than tokens where one runs through all of the span."""
    sweeps = []
    monkeypatch.setattr("dyadlm.ops.selection.best", lambda evidence, count: sweeps.append(1) or best(evidence, count))
    evidence, clock = signal(4, SPAN, 2, 8), make_clock(4, SPAN)
    choose(evidence, 1, clock, margin=0.1, span=SPAN)
    assert 1 < len(sweeps) < 8
    sweeps.clear()
    choose(evidence, 1, clock, margin=1e6, span=SPAN)
    assert len(sweeps) == SPAN


# ---- What is chosen


@pytest.mark.parametrize("count", [1, 2, 5])
def test_topk_chooses_exactly_count(count):
    weights, held = select(signal(2, 30, 3, 5).float(), "topk", make_clock(2, 30), count=count)
    assert (chosen_count(weights) == count).all()
    assert ((weights == 0).sum(-1) == 5 - count).all()
    assert (held.sum(-1) == count).all()
    assert (weights.sum(-1) - 1).abs().max() < 1e-6


def test_topk_of_all_levels_is_dense():
    scores, clock = signal(2, 20, 2, 5).float().requires_grad_(), make_clock(2, 20)
    every, dense = (select(scores, kind, clock, count=5)[0] for kind in ("topk", "dense"))
    assert torch.equal(every, dense)
    gradients = [torch.autograd.grad(w.square().sum(), scores)[0] for w in (every, dense)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", CHOOSING)
def test_ties_go_to_the_lower_level(kind):
    weights, _ = select(torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0]).expand(2, 40, 2, 5), kind, make_clock(2, 40))
    expected = [0, 0.5, 0.5, 0, 0] if kind == "topk" else [0, 1, 0, 0, 0]
    assert (weights == torch.tensor(expected)).all()


def test_the_bias_chooses_and_does_not_weigh():
    scores = torch.tensor([2.0, 1.0, 0.0]).expand(1, 4, 1, 3)
    weights, _ = select(scores, "topk", make_clock(1, 4), bias=torch.tensor([[-5.0, 0.0, 0.0]]))
    assert torch.allclose(weights[0, 0, 0], torch.tensor([0.0, *torch.tensor([1.0, 0.0]).softmax(-1).tolist()]))
    assert (weights[..., 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_level_has_all_the_weight(kind):
    scores = signal(2, 40, 2, 1).requires_grad_()
    weights, _ = select(scores, kind, make_clock(2, 40), count=1, margin=0.5 if kind in CHOOSING else 0.0)
    assert (weights == 1).all()
    assert (torch.autograd.grad(weights.sum(), scores)[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_is_that_of_the_scores(kind):
    scores = signal(1, 9, 2, 4).bfloat16().requires_grad_()
    weights, _ = select(scores, kind, make_clock(1, 9))
    assert weights.dtype == torch.bfloat16
    assert torch.autograd.grad(weights.square().sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_absent_levels_weigh_zero(kind):
    scores = signal(2, 30, 2, 5).float()
    scores[..., 3] = -math.inf
    scores.requires_grad_()
    weights, _ = select(scores, kind, make_clock(2, 30))
    assert (weights[..., 3] == 0).all()
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    assert torch.autograd.grad(weights.square().sum(), scores)[0].isfinite().all()


def test_entmax_far_from_the_best_is_exactly_zero():
    """Rounding must not lift levels beyond the support: a lone best at any scale, among many."""
    gaps = 2 + torch.rand(2000, 40, generator=torch.Generator().manual_seed(0)) * 1e4
    gaps[:, 0] = 0
    for offset in (0.0, 3.3, -1e4):
        weights = entmax(offset - gaps)
        assert (weights[:, 1:] == 0).all()
        assert (weights[:, 0] == 1).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sparse", {}),
        ("topk", {"count": 0}),
        ("topk", {"count": 4}),
        ("topk", {"margin": -1.0}),
        ("dense", {"margin": 0.5}),
        ("entmax", {"bias": torch.zeros(1, 3)}),
    ],
)
def test_refuses_what_has_no_meaning(kind, options):
    with pytest.raises(AssertionError):
        select(torch.zeros(1, 2, 1, 3), kind, make_clock(1, 2), **({"count": 1} | options))


# ---- Load


def test_load_is_the_share_of_real_tokens():
    chosen = torch.tensor([[0, 0, 1, 2], [1, 1, 0, 0]])  # by token; the second row ends in two pads
    weights = torch.nn.functional.one_hot(chosen, 4)[:, :, None].bfloat16() * 0.25
    shares = load(weights, make_clock(2, 4, length=torch.tensor([4, 2])))
    assert shares.dtype == torch.float32
    assert torch.equal(shares, torch.tensor([[2.0, 3.0, 1.0, 0.0]]) / 6)
    assert (load(weights, make_clock(2, 4, length=torch.tensor([0, 0]))) == 0).all()


def test_balancing_raises_what_is_below_the_mean():
    bias = torch.zeros(2, 4)
    after = balanced(bias, torch.tensor([[1.0, 0.5, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5]]), 0.125)
    assert torch.equal(after, torch.tensor([[-0.125, 0.0, 0.125, 0.125], [0.0, 0.0, 0.0, 0.0]]))
    assert (bias == 0).all()


def test_balancing_evens_the_load():
    scores = signal(1, 400, 2, 6).float() + torch.arange(6.0)
    clock, bias = make_clock(1, 400), torch.zeros(2, 6)
    first = load(select(scores, "topk", clock)[0], clock)
    for _ in range(600):
        bias = balanced(bias, load(select(scores, "topk", clock, bias=bias)[0], clock), 0.01)
    last = load(select(scores, "topk", clock, bias=bias)[0], clock)
    assert first.max() > 0.9
    assert (last - 2 / 6).abs().max() < 0.05


# ---- Measures of routes


def test_entropy_of_one_level_is_zero_and_of_all_alike_one():
    assert (entropy(torch.eye(5)) == 0).all()
    assert (entropy(torch.full((3, 2, 5), 0.2)) - 1).abs().max() < 1e-6
    assert (entropy(torch.ones(4, 1)) == 0).all()
    half = entropy(torch.tensor([0.5, 0.5, 0.0, 0.0]).bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(0.5)


def test_run_length_of_a_sticky_route():
    """Two heads, two documents, one row padded: 3, 2 | 4 and 9 cut by the document into 5 | 4; then 6 of its own."""
    chosen = torch.tensor(
        [[[0, 0, 0, 1, 1, 1, 1, 1, 1], [2] * 9], [[3, 3, 3, 3, 3, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 1, 1, 1]]]
    ).transpose(1, 2)
    weights = torch.nn.functional.one_hot(chosen, 4).float() * torch.rand(2, 9, 2, 1).clamp(min=0.1)
    clock = ragged_clock(9, [[0, 5], [0]], [9, 6])
    runs = [3, 2, 4, 5, 4, 6, 1, 1, 1, 1, 1, 1]
    assert mean_run_length(weights, clock) == pytest.approx(sum(runs) / len(runs))
    assert reference.mean_run_length(weights, clock) == pytest.approx(sum(runs) / len(runs))
    assert mean_run_length(weights, make_clock(2, 9, length=torch.tensor([0, 0]))) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 30), st.integers(0, 30))
def test_run_length_equals_the_loop(seed, first, second):
    clock = ragged_clock(30, [[0, 11, 12], [7]], [first, second])
    weights, _ = select(signal(2, 30, 2, 4, seed=seed), "topk", clock, margin=1.0)
    assert mean_run_length(weights, clock) == pytest.approx(reference.mean_run_length(weights, clock))


def test_margins_make_runs_longer():
    scores, clock = signal(2, 200, 2, 6), make_clock(2, 200)
    lengths = [mean_run_length(select(scores, "topk", clock, margin=m)[0], clock) for m in (0.0, 0.5, 1.0, 2.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 1.3
    assert lengths[-1] > 2
