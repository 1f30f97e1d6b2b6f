"""Seeds of one model shown as one: means over them, and intervals for claims about what they are seeds of."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.run import Diagnosis
from dyadlm.errors import UserError

SEED = re.compile(r"(?P<model>.+)-seed\d+(?P<rest> over time| checkpoint-\d+)?")
# Student's t, 95 % on both sides, of 1 to 30 degrees of freedom; of more it is less, so that the last is a little wide.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def pool(diagnoses: Sequence[Diagnosis]) -> list[Diagnosis]:
    """NAME-seed0, NAME-seed1 … as one diagnosis of NAME where the first stood; all else, a lone seed too, as it is.

    A reading is the mean over the seeds. Its interval, Student's t over their values, takes the place of theirs and
    says what a claim about an architecture needs: how far the mean of many seeds may be from that of these few. It
    holds what differs from seed to seed (weights at the start, order of the data, chance in the probe), and takes their
    values to be normally distributed, so that it may reach beyond what a reading can be. What another text would change
    is not in it, for all seeds read the same text, nor what another corpus, size or length of training would. Curves
    are means at the points that all seeds have, low and high the lowest and highest of them. A reading that is no
    finite number in one seed is none in the mean.

    Raises:
        UserError: seeds of one name were not asked alike, are not of one kind, or one comes twice.
    """
    groups: dict[str | int, list[Diagnosis]] = {}
    for place, diagnosis in enumerate(diagnoses):
        groups.setdefault(_model(diagnosis.subject) or place, []).append(diagnosis)
    return [group[0] if len(group) == 1 else _as_one(group) for group in groups.values()]


def _model(subject: str) -> str:
    """The name without its seed; empty if it has none."""
    found = SEED.fullmatch(subject)
    return found["model"] + (found["rest"] or "") if found else ""


def _as_one(seeds: Sequence[Diagnosis]) -> Diagnosis:
    _require_alike(seeds)
    name = _model(seeds[0].subject)
    identities = [dict(seed.circumstances.get("subject", {})) for seed in seeds]
    subject = {"name": name, **_common(identities), "seeds": identities}
    asked = dict.fromkeys(probe for seed in seeds for probe in seed.results)
    results = {probe: _result(probe, {seed.subject: seed.results.get(probe) for seed in seeds}) for probe in asked}
    return Diagnosis(name, results, {**seeds[0].circumstances, "subject": subject})


def _require_alike(seeds: Sequence[Diagnosis]) -> None:
    names = [seed.subject for seed in seeds]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} comes twice; give each seed once, or leave --pool-seeds out.")
    facts = [_facts(seed) for seed in seeds]
    for other, name in zip(facts, names, strict=True):
        differing = [what for what in facts[0] if other[what] != facts[0][what]]
        if differing:
            raise UserError(
                f"{names[0]} and {name} cannot be shown as one, for their {' and '.join(differing)} differ; "
                "ask seeds of one model on the same --data with the same options, or leave --pool-seeds out."
            )


def _facts(seed: Diagnosis) -> dict[str, Any]:
    """What all seeds of a model must have alike."""
    subject = seed.circumstances.get("subject", {})
    model = subject.get("last", subject)  # of a training, its last checkpoint
    return {
        **{what: seed.circumstances.get(what) for what in ("material", "budget", "versions")},
        **{what: model.get(what) for what in ("vocabulary", "context", "type", "tokenizer", "dtype", "device")},
    }


def _result(probe: str, asked: Mapping[str, ProbeResult | None]) -> ProbeResult:
    """asked: by the name of the seed; None where it was not."""
    results = [result for result in asked.values() if result]
    seconds = round(sum(result.seconds for result in results), 2)
    failed = [f"{seed}: {result.failed}" for seed, result in asked.items() if result and result.failed]
    if failed:
        reason = f"in {len(failed)} of {len(asked)} seeds ({'; '.join(failed)})"
        return ProbeResult(probe, failed=reason, seconds=seconds)
    found = [result for result in results if not result.not_applicable]
    if not found:
        reasons = dict.fromkeys(result.not_applicable for result in results)
        return ProbeResult(probe, not_applicable="; ".join(reasons), seconds=seconds)
    readings = {
        name: _reading([result.readings[name] for result in found if name in result.readings], len(asked))
        for name in dict.fromkeys(name for result in found for name in result.readings)
    }
    curves, lost = {}, []
    for name in dict.fromkeys(name for result in found for name in result.curves):
        same = [result.curves[name] for result in found if name in result.curves]
        curve = _curve(same) if len(same) == len(asked) else None
        if curve is not None:
            curves[name] = curve
        if curve is None or any(len(curve.x) < len(each.x) for each in same):
            lost.append(f"{'points' if curve else 'all'} of the curve {name!r} that not all seeds have")
    return ProbeResult(
        probe,
        readings,
        curves,
        _sentence(found, readings, len(asked)),
        _common([result.settings for result in found]),
        left_out="; ".join([*_left_out(asked), *lost]),
        seconds=seconds,
    )


def _reading(readings: Sequence[Reading], seeds: int) -> Reading:
    """The mean over those of `seeds` seeds that have it, and who has which in the note."""
    first, count = readings[0], len(readings)
    assert all((each.unit, each.better) == (first.unit, first.better) for each in readings)
    values = [each.value for each in readings]
    notes = list(dict.fromkeys(each.note for each in readings))
    told = [_written(each.value) + (f" ({each.note})" if each.note and len(notes) > 1 else "") for each in readings]
    whose = (
        f"{seeds} seeds"
        if count == seeds
        else f"the {count} of {seeds} seeds that {'has' if count == 1 else 'have'} it"
    )
    note = f"mean of {whose}: {', '.join(told)}" + (f"; {notes[0]}" if len(notes) == 1 and notes[0] else "")
    if not all(map(math.isfinite, values)):
        return Reading(sum(values) / count, first.unit, first.better, None, note)
    mean = statistics.fmean(values)
    if count == 1:  # its own interval is not one over seeds
        return Reading(mean, first.unit, first.better, None, note)
    half = STUDENT[min(count - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(count)
    return Reading(mean, first.unit, first.better, (mean - half, mean + half), note)


def _curve(curves: Sequence[Curve]) -> Curve | None:
    """Mean, lowest and highest at the points that all have; None without any."""
    first = curves[0]
    labels = {(each.x_label, each.y_label) for each in curves}
    assert len(labels) == 1, labels
    shared = set.intersection(*(set(each.x) for each in curves))
    points = [[(x, y) for x, y in zip(each.x, each.y, strict=True) if x in shared] for each in curves]
    x = [place for place, _ in points[0]]
    if not x or any([place for place, _ in each] != x for each in points):
        return None
    heights = [[each[at][1] for each in points] for at in range(len(x))]
    missing = [not all(map(math.isfinite, each)) for each in heights]
    y, low, high = (
        [math.nan if gap else of(each) for gap, each in zip(missing, heights, strict=True)]
        for of in (statistics.fmean, min, max)
    )
    logarithmic = {scale: all(getattr(each, scale) for each in curves) for scale in ("log_x", "log_y")}
    return Curve(x, y, first.x_label, first.y_label, low, high, **logarithmic)


def _sentence(found: Sequence[ProbeResult], readings: Mapping[str, Reading], seeds: int) -> str:
    """The headline of all, in plain words."""
    if not readings:
        return ""
    headline, reading = next(iter(readings.items()))
    values = [result.readings[headline].value for result in found if headline in result.readings]
    whose = f"{seeds} seeds" if len(values) == seeds else f"{len(values)} of {seeds} seeds"
    name = headline.replace("_", " ")
    if lost := sum(not math.isfinite(value) for value in values):
        return f"Of {whose}, {lost} {'has' if lost == 1 else 'have'} no finite {name}, so there is no mean."
    return (
        f"Mean of {whose}: {name} is {_written(reading.value)} {reading.unit}, "
        f"between {_written(min(values))} and {_written(max(values))} among seeds."
    )


def _written(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _left_out(asked: Mapping[str, ProbeResult | None]) -> list[str]:
    """In words; seed by seed where they differ."""
    said = {seed: _missing(result) for seed, result in asked.items()}
    if len(set(said.values())) == 1:
        return [text for text in list(said.values())[:1] if text]
    return [f"{seed}: {text}" for seed, text in said.items() if text]


def _missing(result: ProbeResult | None) -> str:
    if result is None:
        return "not asked"
    return f"not applicable, {result.not_applicable}" if result.not_applicable else result.left_out


def _common(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say alike."""
    first, *others = entries
    return {
        name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)
    }
