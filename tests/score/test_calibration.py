"""Conformal alerts: p-values against their definition, the rate of false alarms, files and what is refused."""

import json
import math

import numpy as np
import pytest

from dyadlm.errors import UserError
from dyadlm.score import Calibration, Drift, Reading, Unit
from dyadlm.score.calibration import STEP, cell_of, load_calibration
from dyadlm.score.drift import BLOCK_LINES, FIRST_BLOCKS, WEIGHT, Level, two_sided
from dyadlm.score.judging import Rule


def calibrated(scores, reading=Reading()) -> Calibration:
    calibration = Calibration("weights", reading)
    for score in scores:
        calibration.add(score)
    return calibration


def test_p_values_are_those_of_the_definition():
    draw = np.random.default_rng(0)
    normal, others = draw.normal(3, 4, 500), draw.normal(5, 6, 200)
    calibration = calibrated(normal)
    for score in [*others, *normal[:5], -100.0, 100.0]:
        rank = sum(cell_of(one) >= cell_of(score) for one in normal)
        assert calibration.p(score) == (rank + 1) / 501
    assert calibration.p(100) == calibration.smallest == 1 / 501
    assert calibration.p(-100) == 1


def test_the_grid_is_monotone_fine_and_bounded():
    scores = np.sort(np.concatenate([np.random.default_rng(0).normal(0, 50, 2000), [-1e9, 0, 1e9]]))
    cells = [cell_of(score) for score in scores]
    assert cells == sorted(cells)
    assert max(map(abs, cells)) < 30_000
    for score in (0.0, 2.0, 300.0):
        assert cell_of(score + 2 * STEP * math.hypot(1, score)) > cell_of(score)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_false_alarms_on_exchangeable_scores_are_as_rare_as_asked(rate):
    draw = np.random.default_rng(1)
    rates = []
    for _ in range(200):
        scores = draw.exponential(5, 1200)
        calibration = calibrated(scores[:1000])
        rates.append(np.mean([calibration.p(score) <= rate for score in scores[1000:]]))
    # Given a calibration the rate itself varies, by about a binomial count of its 1,000 scores.
    error = math.sqrt(rate * (1 - rate) * (1 / 1000 + 1 / 200) / 200)
    exact = math.floor(rate * 1001) / 1001
    assert abs(np.mean(rates) - exact) < 4 * error


def test_alerts_of_a_rule():
    calibration = calibrated(range(99))
    unit = Unit("a", 1, 0, b"x", 5, 1, 97.5, (0, 1))
    assert Rule(calibration, alert=0.02).passes(unit)
    assert not Rule(calibration, alert=0.019).passes(unit)
    assert Rule(threshold=97.5).passes(unit)
    assert not Rule(threshold=97.6).passes(unit)
    assert Rule().passes(unit)
    assert Rule(calibration).p(unit) == 0.02


@pytest.mark.parametrize(
    ("calibration", "alert", "threshold", "message"),
    [
        (None, 0.1, None, "--calibration"),
        (calibrated(range(9)), 0.1, 3.0, "not both"),
        (
            calibrated(range(9)),
            0.05,
            None,
            "9 normal lines allow .* below 0.1; .* at least 19 lines, .* 0.1 ",
        ),
        (calibrated(range(6)), 0.05, None, "0.15 or more"),
        (calibrated(range(9)), 0.0, None, "between 0 and 1"),
        (calibrated(range(9)), 1.0, None, "between 0 and 1"),
        (calibrated(range(9)), math.nan, None, "between 0 and 1"),
    ],
)
def test_rules_that_are_refused(calibration, alert, threshold, message):
    with pytest.raises(UserError, match=message):
        Rule(calibration, alert, threshold)


def test_files_give_the_same_p_values(tmp_path):
    path = tmp_path / "normal.json"
    saved = calibrated(np.random.default_rng(0).normal(0, 20, 300))
    saved.level = Level(3, 0.5, 0.25)
    saved.save(path)
    loaded = load_calibration(path, "weights", Reading())
    scores = np.linspace(-50, 70, 400)
    assert [loaded.p(score) for score in scores] == [saved.p(score) for score in scores]
    assert (loaded.units, vars(loaded.level)) == (300, {"blocks": 3, "mean": 0.5, "squares": 0.25})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no calibration"),
        ({"version": 1}, "another version"),
        ({"weights": "others"}, "another model"),
        ({"unit": "document"}, "another --per"),
        ({"score": "mean"}, "another --score"),
        ({"learn": True}, "another --learn"),
        ({"units": 4}, "damaged"),
        ({"counts": {"1": 0, "2": 3}}, "damaged"),
        ({"counts": {"x": 3}}, "damaged"),
        ({"counts": None}, "damaged"),
        ({"level": {}}, "damaged"),
        ({"level": {"blocks": 2, "mean": math.inf, "squares": 0}}, "damaged"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, change, message):
    path = tmp_path / "normal.json"
    calibrated([1.0, 2.0, 3.0]).save(path)
    load_calibration(path, "weights", Reading())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_calibration(path, "weights", Reading())


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{"])
def test_what_is_no_calibration_is_refused(tmp_path, content):
    (tmp_path / "some").write_bytes(content)
    with pytest.raises(UserError, match="is no calibration"):
        load_calibration(tmp_path / "some", "weights", Reading())
    with pytest.raises(UserError, match="There is no calibration"):
        load_calibration(tmp_path / "none", "weights", Reading())


# ---- drift


def drifted(levels, normal=None) -> Drift:
    drift = Drift(normal)
    for level in levels:
        for _ in range(BLOCK_LINES):
            drift.add(level * 10, 10)
    return drift


def test_the_level_is_an_exponentially_weighted_mean():
    levels = [1.0, 2.0, 4.0]
    drift = drifted(levels, Level(50, 1.5, 49 * 0.04))
    expected = 1.5
    for level in levels:
        expected += WEIGHT * (level - expected)
    assert drift.level == pytest.approx(expected)
    assert drift.all.mean == pytest.approx(np.mean(levels))
    assert drift.all.deviation == pytest.approx(np.std(levels, ddof=1))


def test_p_values_of_drift_are_uniform_without_drift_and_small_with_it():
    draw = np.random.default_rng(3)
    found = []
    for _ in range(400):
        level = Level()
        for block in draw.normal(2, 0.1, 20):
            level.add(block)
        found.append(drifted(draw.normal(2, 0.1, 15), level).p)
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.085  # binomial, 3 standard deviations
    assert 0.42 < np.mean(np.array(found) < 0.5) < 0.58
    assert drifted(draw.normal(2.3, 0.1, 15), level).p < 1e-4


def test_without_a_calibration_the_first_blocks_are_normal():
    draw = np.random.default_rng(3)
    first = draw.normal(1, 0.1, FIRST_BLOCKS)
    drift = drifted(first)
    assert (drift.level, drift.p, drift.summary()) == (None, None, None)
    assert drift.normal.mean == pytest.approx(first.mean())
    assert drifted([*first, *[2.0] * 10]).p < 1e-6


def test_the_p_value_of_t():
    assert two_sided(0, 10) == 1
    assert two_sided(2.228, 10) == pytest.approx(0.05, abs=5e-4)  # from tables
    assert two_sided(-3.169, 10) == pytest.approx(0.01, abs=5e-4)


@pytest.mark.parametrize("lines", [3, BLOCK_LINES * 5 + 7, BLOCK_LINES * 30 + 1])
@pytest.mark.parametrize("normal", [None, Level(20, 1.0, 0.3)])
def test_drift_goes_on_where_it_stopped(lines, normal):
    draw = np.random.default_rng(lines)
    levels = draw.normal(1, 0.2, lines + 5 * BLOCK_LINES)
    whole, first, second = Drift(normal), Drift(normal), Drift(normal)
    for level in levels:
        whole.add(level, 1)
    for level in levels[:lines]:
        first.add(level, 1)
    second.continue_from(np.array(first.numbers()).tolist())
    for level in levels[lines:]:
        second.add(level, 1)
    assert second.numbers() == whole.numbers()
    assert second.summary() == whole.summary()
