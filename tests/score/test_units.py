"""Units of scored lines against slow definitions: oddest spans, documents, tokens, the N oddest."""

import numpy as np
import pytest

from dyadlm.score import Line, Oddest, Reading, Unit, units_of
from dyadlm.score.bits import spread
from dyadlm.score.units import ScoredLine, oddest_span, whole_characters
from dyadlm.score.usual import EXPECTED_BITS, PLACES, Usual
from dyadlm.score.usual import LINES as FOLLOWED


def slowest_span(excess) -> float:
    sizes = range(len(excess))
    return max(sum(excess[a : b + 1]) for a in sizes for b in sizes if b >= a)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 40])
@pytest.mark.parametrize("scale", [0.5, 4.0, 9.0])
def test_the_oddest_span_is_the_best_of_all(size, scale):
    excess = np.random.default_rng(size).exponential(scale, size) - 3
    total, start, stop = oddest_span(excess)
    assert total == pytest.approx(slowest_span(excess.tolist()))
    assert total == pytest.approx(excess[start:stop].sum())
    assert 0 <= start < stop <= size


def test_a_span_cuts_through_no_character():
    content = "aéb€c".encode()
    for start in range(len(content)):
        for stop in range(start + 1, len(content) + 1):
            wide = whole_characters(content, start, stop)
            content[wide[0] : wide[1]].decode()
            assert wide[0] <= start
            assert wide[1] >= stop
    assert whole_characters(b"\x80\x80\x80\x80\x80", 4, 5) == (1, 5)  # at most three bytes are added


def scored(document: str, number: int, offset: int, content: bytes, *bits: float) -> ScoredLine:
    return ScoredLine(
        Line(document, number, offset, content), np.array(bits), np.arange(len(content)), np.full(len(content), 3.0)
    )


LINES = [
    scored("a", 1, 0, b"ab\n", 1, 9, 1),
    scored("a", 2, 3, b"c\n", 20, 2),
    scored("b", 1, 0, b"\n", 3),
    scored("c", 1, 0, b"de", 5, 6),
]


def test_lines():
    first, second, third, _ = units_of(LINES, Reading())
    assert first == Unit("a", 1, 0, b"ab\n", 11, 3, 6, (1, 2))
    assert second == Unit("a", 2, 3, b"c\n", 22, 2, 17, (0, 1))
    assert third.score == 0
    assert [unit.score for unit in units_of(LINES, Reading(score="mean"))] == pytest.approx([11 / 3, 11, 3, 5.5])


def test_all_that_is_beyond_what_is_expected_counts():
    """Two odd places of a line, one of them where much is usual; the larger is shown."""
    line = Line("a", 1, 0, b"abcdef\n")
    bits, expected = np.array([8.0, 1, 0, 9, 9, 0, 0]), np.array([6.0, 3, 3, 3, 3, 3, 3])
    (unit,) = units_of([ScoredLine(line, bits, np.arange(7), expected)], Reading())
    assert (unit.score, unit.span, unit.bits) == (2 + 6 + 6, (3, 5), 27)
    first, *_ = units_of([ScoredLine(line, bits, np.arange(7), expected)], Reading("token"))
    assert first.score == 2


@pytest.mark.parametrize("size", [1, 7, PLACES + 50])
def test_what_is_usual_at_a_place_is_a_mean_over_the_last_lines(size):
    draw = np.random.default_rng(size)
    lines = [draw.exponential(5, draw.integers(size // 2, size) + 1) for _ in range(5 * FOLLOWED)]
    means, counts = {}, {}
    usual = Usual()
    for line in lines:
        expected = usual.expected(line)
        for place, bits in enumerate(line):
            slow = means.get(place, 0.0) if place < PLACES else 0.0
            assert expected[place] == pytest.approx(max(EXPECTED_BITS, slow))
            counts[place] = counts.get(place, 0) + 1
            means[place] = means.get(place, 0.0) + (bits - means.get(place, 0.0)) / min(counts[place], FOLLOWED)
    resumed = Usual()
    resumed.take(usual.numbers())
    assert resumed.expected(lines[0]).tobytes() == usual.expected(lines[0]).tobytes()
    for damaged in (np.zeros((2, 3)), np.full((2, PLACES), -1.0)):
        with pytest.raises(ValueError, match="usual costs"):
            resumed.take(damaged)


def test_what_every_line_costs_at_a_place_is_not_odd():
    """A date that the model does not know: only its first line is odd, and what is odd elsewhere remains so."""
    usual, content = Usual(), b"2031 all well\n"
    usual_bits = np.array([9.0] * 4 + [0.1] * 10)
    scores = []
    for number in range(30):
        bits = usual_bits + (number == 20) * np.array([0.0] * 6 + [8.0] * 3 + [0] * 5)
        scored = ScoredLine(Line("a", 1, 0, content), bits, np.arange(14), usual.expected(bits))
        scores += [unit.score for unit in units_of([scored], Reading())]
    assert scores[0] == 24
    assert scores[20] == pytest.approx(3 * 5.1)
    assert max(scores[1:20] + scores[21:]) == 0


def test_documents_show_their_oddest_line():
    a, b, c = units_of(LINES, Reading("document"))
    assert a == Unit("a", 2, 3, b"c\n", 33, 5, 17, (0, 1))
    assert (b.size, c.size, c.score) == (1, 2, 5)
    assert [unit.score for unit in units_of(LINES, Reading("document", "mean"))] == pytest.approx([6.6, 3, 5.5])


def test_tokens():
    bits, starts = np.array([2.0, 2, 2, 2, 7, 1]), np.array([0, 4, 5])
    line = ScoredLine(Line("a", 4, 10, b"wide \n"), bits, starts, np.full(6, 3.0))
    found = list(units_of([line], Reading("token")))
    assert [(unit.offset, unit.content, unit.bits) for unit in found] == [
        (10, b"wide", 8),
        (14, b" ", 7),
        (15, b"\n", 1),
    ]
    assert [unit.score for unit in found] == [8 - 12, 7 - 3, 1 - 3]
    assert {unit.number for unit in found} == {4}


@pytest.mark.parametrize(
    ("bits", "starts", "size", "expected"),
    [
        ([3.0, 4.0], [0, 1], 3, [3, 2, 2]),
        ([3.0, 4.0], [0, 0], 2, [3.5, 3.5]),  # the bits of a token without bytes go to the one that has its bytes
        ([3.0, 4.0, 2.0], [0, 2, 2], 3, [1.5, 1.5, 6]),
        ([6.0], [1], 3, [2, 2, 2]),  # what stands before the first token is its own
        ([6.0, 1.0], [0, 3], 3, [3, 3, 1]),
        ([], [], 2, [0, 0]),
    ],
)
def test_bits_of_tokens_are_spread_over_their_bytes(bits, starts, size, expected):
    found, own = spread(np.array(bits), np.array(starts, np.int64), size)
    assert found.tolist() == pytest.approx(expected)
    assert found.sum() == pytest.approx(sum(bits))
    assert own[0] == 0


def test_the_oddest_of_all_are_kept_in_order():
    draw = np.random.default_rng(0)
    units = [Unit("a", number, 0, b"x", 0, 1, float(draw.integers(20)), (0, 1)) for number in range(300)]
    oddest = Oddest(25)
    for unit in units:
        oddest.add(unit)
    assert oddest.ordered() == sorted(units, key=lambda unit: (-unit.score, unit.number))[:25]
