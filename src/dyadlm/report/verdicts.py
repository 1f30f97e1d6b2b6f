"""What may be said of several models beside each other, and figures in words.

Nothing sums models up in one figure. One is called best only where that can be told: the reading has a direction,
every model was asked the same, and its interval overlaps no other's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dyadlm.diagnose import Curve, Diagnosis, ProbeResult, Reading
from dyadlm.report.comparison import Look, compact, looks

MOST_TOLD = 4  # models that a sentence goes through one by one
FREE_OF_TOKENS = ("leak", "cost")  # what a token stands for does not matter to these
SUPERLATIVES = {"lower": "lowest", "higher": "highest"}


class Subject(NamedTuple):
    """A diagnosis and how it is shown. alike: asked of the same text as the first, with the same budget."""

    look: Look
    diagnosis: Diagnosis
    alike: bool

    def result(self, probe: str) -> ProbeResult | None:
        """None if it was not asked."""
        return self.diagnosis.results.get(probe)

    def reading(self, probe: str, name: str) -> Reading | None:
        """None if there is none."""
        result = self.result(probe)
        return result.readings.get(name) if result else None

    @property
    def pooled(self) -> bool:
        """Whether it is the mean of several seeds, which have its intervals."""
        return "seeds" in self.circumstances("subject")

    def circumstances(self, what: str) -> dict[str, Any]:
        """Of its circumstances, "subject", "material", "budget" or "versions"; empty if they are not known."""
        return dict(self.diagnosis.circumstances.get(what, {}))


class Verdict(NamedTuple):
    """best: the place of the best of the models, if that can be told. sentence: why, or why not."""

    best: int | None
    sentence: str


class Figure(NamedTuple):
    """A value and its interval as they are written."""

    value: str
    interval: str = ""


def subjects(diagnoses: Sequence[Diagnosis], references: Sequence[Diagnosis]) -> tuple[list[Subject], list[Subject]]:
    """The models and the references, each with its look."""
    shown = looks([each.subject for each in diagnoses], [each.subject for each in references])
    every = [
        Subject(look, each, _alike(each, diagnoses[0]))
        for look, each in zip(shown, (*diagnoses, *references), strict=True)
    ]
    return every[: len(diagnoses)], every[len(diagnoses) :]


def _alike(one: Diagnosis, other: Diagnosis) -> bool:
    """The same text, as far as can be told, and the same budget. Tokenizers decide how many tokens a text has."""
    known = [each.circumstances for each in (one, other)]
    texts = [dict(each.get("material", {})) for each in known]
    if len({_tokens(each) for each in known}) > 1:
        texts = [{name: value for name, value in text.items() if name != "tokens"} for text in texts]
    return texts[0] == texts[1] and known[0].get("budget") == known[1].get("budget")


def compare(models: Sequence[Subject], probe: str, name: str) -> Verdict:
    """Of one reading of one probe. Says nothing where fewer than two models have it."""
    found = [(place, reading) for place, model in enumerate(models) if (reading := model.reading(probe, name))]
    if len(found) < 2:
        return Verdict(None, "")
    if reason := _incomparable([(models[place], reading) for place, reading in found], probe):
        return Verdict(None, reason)
    better = found[0][1].better
    sign = 1 if better == "lower" else -1
    (leader, leading), *others = sorted(found, key=lambda each: sign * each[1].value)
    near = [models[place].look.short for place, reading in others if _overlap(leading, reading)]
    leads = f"{models[leader].look.short} has the {SUPERLATIVES[better]} value"
    if near:
        whose = enumeration(near) if len(near) <= MOST_TOLD else f"{len(near)} others"
        return Verdict(None, f"{leads}, but its interval overlaps that of {whose}: no best is marked.")
    return Verdict(
        leader, f"{leads}, and its interval overlaps {'no other’s' if len(others) > 1 else 'not the other’s'}."
    )


def _incomparable(found: Sequence[tuple[Subject, Reading]], probe: str) -> str:
    """Why no best can be told among readings whatever their values; empty if it can."""
    first = found[0][1]
    if any((reading.unit, reading.better) != (first.unit, first.better) for _, reading in found):
        return "No best is marked: the models were not measured in the same unit."
    if first.better == "profile":
        return "A profile: no value of it is better than another."
    if not all(model.alike for model, _ in found):
        return "No best is marked: the models were not asked of the same text with the same budget."
    if len({model.pooled for model, _ in found}) > 1:
        return (
            "No best is marked: some models are means of seeds, others are single, and their intervals differ in kind."
        )
    tokens = {_tokens(model.diagnosis.circumstances) for model, _ in found}
    if probe not in FREE_OF_TOKENS and not first.unit.startswith("bits/byte") and len(tokens) > 1:
        return "No best is marked: of models with different tokens only bits per byte compare."
    if probe == "cost" and len({_model(model.diagnosis.circumstances).get("device") for model, _ in found}) > 1:
        return "No best is marked: the models were timed on different devices."
    if len({model.diagnosis.results[probe].left_out for model, _ in found}) > 1:
        return "No best is marked: not the same was left out for every model."
    if len({reading.value for _, reading in found}) == 1:
        return "The models have the same value."
    if not all(math.isfinite(sum((reading.value, *(reading.interval or [math.nan])))) for _, reading in found):
        return "No best is marked: not every model has an interval."
    return ""


def _model(circumstances: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a model; of a training, of its last checkpoint."""
    known = circumstances.get("subject", {})
    return dict(known.get("last", known))


def _tokens(circumstances: Mapping[str, Any]) -> tuple[Any, Any]:
    """What tells a model's tokens from others: their number, and the tokenizer where there is one."""
    known = _model(circumstances)
    return known.get("vocabulary"), known.get("tokenizer")


def _overlap(one: Reading, other: Reading) -> bool:
    assert one.interval is not None
    assert other.interval is not None
    return one.interval[0] <= other.interval[1] and other.interval[0] <= one.interval[1]


def written(reading: Reading) -> Figure:
    """With two digits of half the interval's width, but no more than four of all; three where there is no interval."""
    interval = reading.interval
    if interval is None or not math.isfinite(sum((reading.value, *interval))):
        return Figure(number(reading.value))
    size, step = max(map(abs, (reading.value, *interval))), (interval[1] - interval[0]) / 2
    value, low, high = (number(each, size, step) for each in (reading.value, *interval))
    return Figure(value, f"{low} to {high}")


def number(value: float, size: float | None = None, step: float = 0.0) -> str:
    """For people. size: of the largest number beside it, its own if None, of which three digits are shown; step: if it
    is known, two of its digits are, but no more than four of the size."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value) if size is None else size
    if size == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(size))
    if step:
        decimals = min(1 - math.floor(math.log10(step)), decimals + 1)
    if size >= 1e7:
        return compact(value)
    if decimals > 6:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:,.{max(decimals, 0)}f}"
    return text.replace("-", "−") if text.split("e")[0].strip("-0.,") else "0"


def told(curves: Sequence[tuple[Look, Curve]]) -> str:
    """One sentence: where the curves of models begin, end and turn."""
    first = curves[0][1]
    values = [y for look, curve in curves if not look.muted for y in curve.y if math.isfinite(y)]
    span = max(values, default=0.0) - min(values, default=0.0)
    courses = [course for look, curve in curves if not look.muted and (course := _course(look, curve, span))]
    if not courses:
        return f"{first.y_label} by {first.x_label}, of references alone."
    if len(courses) > MOST_TOLD:
        ends = [curve.y[-1] for look, curve in curves if not look.muted and len(curve.y)]
        return f"The {len(courses)} models end between {number(min(ends))} and {number(max(ends))} {first.y_label}."
    return f"By {first.x_label}, in {first.y_label}: {'; '.join(courses)}."


def _course(look: Look, curve: Curve, span: float) -> str:
    """Of one curve; empty if it has no point. span: of all curves; what is small beside it is left out."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    (begin, first), (end, last) = points[0], points[-1]

    def at(x: float, y: float) -> str:
        return f"{number(y, max(span, abs(y)))} at {compact(x)}"

    if len(points) == 1:
        return f"{look.short} has {at(begin, first)}"
    if abs(last - first) <= max(0.02 * max(abs(first), abs(last)), 0.01 * span):
        course = f"{look.short} begins and ends near {at(end, last).partition(' ')[0]}"
    else:
        course = f"{look.short} {'falls' if last < first else 'rises'} from {at(begin, first)} to {at(end, last)}"
    turns = [
        f"{word} {at(*point)}"
        for word, point in (
            ("lowest", min(points, key=lambda point: point[1])),
            ("highest", max(points, key=lambda point: point[1])),
        )
        if min(abs(point[1] - first), abs(point[1] - last)) > 0.1 * span
    ]
    return ", ".join([course, *turns])


def enumeration(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
