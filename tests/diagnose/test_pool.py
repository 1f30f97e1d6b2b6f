"""Seeds of one model as one: the mean, what another seed may change, and no silence about what a seed lacks."""

import json
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyadlm.diagnose import Curve, Diagnosis, ProbeResult, Reading, pool
from dyadlm.diagnose.pool import STUDENT
from dyadlm.errors import UserError

VALUES = st.floats(-1e6, 1e6)


def diagnosis(name: str, *results: ProbeResult, text: str = "a text", **identity) -> Diagnosis:
    circumstances = {
        "subject": {"name": name, "vocabulary": 256, "type": "llama", "weights": name, **identity},
        "material": {"name": text, "tokens": 99},
        "budget": {"tokens": 1.0, "fast": False, "seed": 7},
        "versions": {"dyadlm": "0"},
    }
    return Diagnosis(name, {result.probe: result for result in results}, circumstances)


def result(value: float, note: str = "", curve: Curve | None = None, **others) -> ProbeResult:
    readings = {"half_depth": Reading(value, "layers", "lower", (value - 1, value + 1), note)}
    return ProbeResult("loop", readings, {"by step": curve} if curve else {}, "Its own.", **others)


def pooled(*results: ProbeResult) -> ProbeResult:
    (one,) = pool([diagnosis(f"plain-seed{number}", each) for number, each in enumerate(results)])
    assert one.subject == "plain"
    return one.results["loop"]


def curve(x, y) -> Curve:
    return Curve(x, y, "step", "bits", log_x=True)


@given(st.lists(VALUES, min_size=2, max_size=40), st.randoms())
def test_the_mean_and_its_interval(values, draw):
    reading = pooled(*map(result, values)).readings["half_depth"]
    near = 1e-9 * max(1e-3, *map(abs, values))
    assert min(values) - near <= reading.value <= max(values) + near
    low, high = reading.interval
    assert (low + high) / 2 == pytest.approx(reading.value, abs=near)
    expected = STUDENT[min(len(values), 31) - 2] * np.std(values, ddof=1) / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(expected, rel=1e-6, abs=near)
    draw.shuffle(values)
    again = pooled(*map(result, values)).readings["half_depth"]
    assert (again.value, *again.interval) == pytest.approx((reading.value, low, high), abs=near)
    assert (reading.unit, reading.better) == ("layers", "lower")


@pytest.mark.parametrize("freedom", range(1, 31))
def test_quantiles_are_those_of_student(freedom):
    t = (np.arange(20000) + 0.5) / 20000 * STUDENT[freedom - 1]
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * STUDENT[freedom - 1] * density.mean() == pytest.approx(0.95, abs=1e-4)


def test_in_ninety_five_of_a_hundred_cases_the_interval_holds_the_truth():
    drawn = np.random.default_rng(0).normal(3.0, 0.5, (2000, 3))
    held = [
        low <= 3.0 <= high for low, high in (pooled(*map(result, row)).readings["half_depth"].interval for row in drawn)
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_order_of_models_and_what_stays_as_it_is():
    names = ["b-seed1", "gpt2", "a-seed0", "b-seed10", "lone-seed4", "a-seed2", "c-seed0-late", "seed3"]
    found = [diagnosis(name, result(1.0)) for name in names]
    shown = pool(found)
    assert [each.subject for each in shown] == ["b", "gpt2", "a", "lone-seed4", "c-seed0-late", "seed3"]
    assert all(each in found for each in shown if each.subject not in "ab")
    assert pool(shown) == shown


def test_trainings_and_checkpoints_keep_what_they_are():
    names = [f"a-seed{seed}{rest}" for rest in (" over time", " checkpoint-40", "") for seed in (0, 1)]
    assert [each.subject for each in pool([diagnosis(name) for name in names])] == [
        "a over time", "a checkpoint-40", "a",
    ]  # fmt: skip


def test_trainings_are_of_one_kind_if_their_last_checkpoints_are():
    runs = [
        diagnosis(f"a-seed{seed} over time", last={"vocabulary": 9 + seed // 2, "weights": seed}) for seed in range(3)
    ]
    (one,) = pool(runs[:2])
    assert [each["last"]["weights"] for each in one.circumstances["subject"]["seeds"]] == [0, 1]
    with pytest.raises(UserError, match="their vocabulary differ"):
        pool(runs)


def test_circumstances_hold_what_repeats_it():
    seeds = [
        diagnosis(f"a-seed{seed}", result(seed, settings={"length": 8, "place": seed}, seconds=1.5)) for seed in (0, 1)
    ]
    (one,) = pool(seeds)
    assert one.circumstances["subject"] == {
        "name": "a",
        "vocabulary": 256,
        "type": "llama",
        "seeds": [seed.circumstances["subject"] for seed in seeds],
    }
    assert {**one.circumstances, "subject": None} == {**seeds[0].circumstances, "subject": None}
    assert one.results["loop"].settings == {"length": 8}
    assert one.results["loop"].seconds == 3.0
    json.dumps(one.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (diagnosis("a-seed1", text="another"), "their material differ; ask .* on the same --data"),
        (diagnosis("a-seed1", vocabulary=9), "their vocabulary differ"),
        (diagnosis("a-seed1", type="gpt2"), "their type differ"),
        (diagnosis("a-seed0"), "a-seed0 comes twice"),
    ],
)
def test_what_was_not_asked_alike_is_not_one(other, reason):
    with pytest.raises(UserError, match=reason):
        pool([diagnosis("a-seed0"), other])


def test_the_sentence_and_the_note():
    one = pooled(*map(result, (0.31, 0.33, 0.29)))
    assert one.sentence == "Mean of 3 seeds: half depth is 0.31 layers, between 0.29 and 0.33 among seeds."
    assert one.readings["half_depth"].note == "mean of 3 seeds: 0.31, 0.33, 0.29"
    assert pooled(result(1, "of 4"), result(2, "of 4")).readings["half_depth"].note == "mean of 2 seeds: 1, 2; of 4"
    differ = pooled(result(1, "at 8"), result(2, "at 9")).readings["half_depth"]
    assert differ.note == "mean of 2 seeds: 1 (at 8), 2 (at 9)"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_one_seed_is_none_in_the_mean(bad):
    for values in permutations([bad, 1.0, -bad]):
        one = pooled(*map(result, values))
        reading = one.readings["half_depth"]
        assert not math.isfinite(reading.value)
        assert reading.interval is None
        assert one.sentence == "Of 3 seeds, 2 have no finite half depth, so there is no mean."


def test_a_reading_that_some_lack():
    more = replace(result(1.0), readings={**result(1.0).readings, "other": Reading(5.0, "bits", "profile", (4, 6))})
    one = pooled(more, result(2.0), result(3.0))
    assert one.readings["other"] == Reading(5.0, "bits", "profile", None, "mean of the 1 of 3 seeds that has it: 5")
    assert pooled(more, more, result(3.0)).readings["other"].note.startswith("mean of the 2 of 3 seeds that have it")


def test_not_applicable_and_failed():
    never = ProbeResult("loop", not_applicable="it cannot write")
    assert pooled(never, never).not_applicable == "it cannot write"
    some = pooled(result(1.0), never, result(2.0))
    assert not some.not_applicable
    assert some.left_out == "plain-seed1: not applicable, it cannot write"
    assert some.sentence.startswith("Mean of 2 of 3 seeds: ")
    failed = pooled(result(1.0), ProbeResult("loop", failed="ValueError: no luck"), never)
    assert failed.failed == "in 1 of 3 seeds (plain-seed1: ValueError: no luck)"
    assert not failed.readings
    (unasked,) = pool([diagnosis("a-seed0", result(1.0)), diagnosis("a-seed1")])
    assert unasked.results["loop"].left_out == "a-seed1: not asked"


def test_what_was_left_out_is_said_once_if_all_left_out_the_same():
    assert pooled(result(1.0, left_out="half"), result(2.0, left_out="half")).left_out == "half"
    assert pooled(result(1.0, left_out="half"), result(2.0)).left_out == "plain-seed0: half"


@given(st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=2, max_size=5))
def test_curves_lie_between_the_lowest_and_the_highest_seed(heights):
    one = pooled(*(result(1.0, curve=curve([1, 2, 4], y)) for y in heights))
    drawn = one.curves["by step"]
    assert (drawn.low, drawn.high) == (np.min(heights, 0).tolist(), np.max(heights, 0).tolist())
    assert drawn.y == pytest.approx(np.mean(heights, 0), abs=1e-9 * max(1e-3, np.abs(heights).max()))
    assert (drawn.x, drawn.x_label, drawn.y_label, drawn.log_x, drawn.log_y) == ([1, 2, 4], "step", "bits", True, False)
    assert one.left_out == ""


def test_curves_at_the_points_that_all_have():
    one = pooled(result(1.0, curve=curve([1, 2, 4], [1, 2, math.nan])), result(1.0, curve=curve([2, 4, 8], [4, 5, 6])))
    drawn = one.curves["by step"]
    assert drawn.x == [2, 4]
    assert drawn.y == pytest.approx([3, math.nan], nan_ok=True)
    assert one.left_out == "points of the curve 'by step' that not all seeds have"
    for other in (result(1.0), result(1.0, curve=curve([16], [1]))):
        lost = pooled(result(1.0, curve=curve([1, 2], [1, 2])), other)
        assert not lost.curves
        assert lost.left_out == "all of the curve 'by step' that not all seeds have"


def test_curves_of_older_files_have_a_linear_height():
    stored = result(1.0, curve=curve([1], [2])).to_dict()
    del stored["curves"]["by step"]["log_y"]
    assert ProbeResult.from_dict(stored).curves["by step"].log_y is False
