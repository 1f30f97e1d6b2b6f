"""Diagnoses of one model or of several side by side: a page that needs nothing else, its pictures, and JSON."""

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib.figure import Figure as Drawing

from dyadlm.diagnose import PROBES, Control, Diagnosis, ProbeResult, Published, Reading
from dyadlm.errors import UserError
from dyadlm.files import require_new, staged_folder, write_atomically
from dyadlm.report.comparison import Look, compact, draw_curves, draw_readings, to_svg, write_picture
from dyadlm.report.page import render
from dyadlm.report.usual import Kind, ground, measured, parameters_of, usual_of_all
from dyadlm.report.verdicts import Subject, Verdict, compare, enumeration, number, subjects, told, written
from dyadlm.version import __version__

PAGE_NAME, JSON_NAME, FIGURES_NAME = "index.html", "diagnoses.json", "figures"
FORMAT = "dyadlm-diagnosis-report"
# Of the docstring of a probe.
PARTS = ("Definition", "Formula", "Units", "Direction", "Paper", "Papers", "Evidence", "Pitfalls")
# By the name of a setting: the one value that all models have, without a look; or each model its own.
Agreement = Sequence[tuple[str, Sequence[tuple[Look | None, str]]]]
# The rows of the paper's table of failure modes.
FAILURE_MODES = {
    "F1": "tokens decide what can be learned",
    "F2": "no part owns a scale",
    "F3": "partitions by position miss meaning",
    "F4": "mixing is uniform, and text repeats itself",
    "F5": "layers rewrite one space",
    "F6": "structure decays with depth",
    "F7": "the decoder blends instead of choosing",
    "F8": "skills are lost, or learned by heart",
    "F9": "identity is lost",
    "F10": "nothing is planned",
    "F11": "themes come before grammar",
    "F12": "cost grows faster than the text",
    "all": "what would make every other figure wrong",
}
DIRECTIONS = {"lower": "↓ lower is better", "higher": "↑ higher is better", "profile": "profile"}


class Column(NamedTuple):
    """A reading at the head of a table."""

    name: str
    unit: str
    direction: str
    note: str


class Cell(NamedTuple):
    """A figure in a table. note: if not all models have the same."""

    value: str
    interval: str
    best: bool
    note: str


class Row(NamedTuple):
    """One model of a table. cells: by column, None where it lacks the reading; empty where `status` stands instead."""

    look: Look
    cells: Sequence[Cell | None]
    status: str
    alike: bool


class Picture(NamedTuple):
    """A picture of the page. file: the same as PNG, relative to the page."""

    title: str
    sentence: str
    svg: Markup
    file: str


class Known(NamedTuple):
    """A control. expected: by column, empty where it expects nothing; all: in words, whatever the columns."""

    name: str
    expected: Sequence[str]
    all: str
    derivation: str


class Range(NamedTuple):
    """From the lowest to the highest seed of measured models. cells: by column, empty where none was measured."""

    name: str
    cells: Sequence[str]


class Section(NamedTuple):
    """All about one probe. meaning: how to read its headline. evidence: what others found, to stand beside the
    results. usual: what was measured on models of this size; the first entry is of all of them."""

    anchor: str
    id: str
    question: str
    failure_mode: str
    meaning: str
    summary: Markup
    parts: Sequence[tuple[str, Markup]]
    evidence: Markup
    results: Sequence[tuple[Look, ProbeResult | None]]
    columns: Sequence[Column]
    rows: Sequence[Row]
    usual: Sequence[Range]
    controls: Sequence[Known]
    published: Sequence[Published]
    pictures: Sequence[Picture]
    settings: Agreement


def write_diagnosis(
    diagnoses: Sequence[Diagnosis],
    output: Path,
    references: Sequence[Diagnosis] = (),
    seeds: Sequence[Diagnosis] = (),
) -> Path:
    """Write the new folder `output`: index.html, diagnoses.json, and figures/ with every picture as PNG.

    diagnoses: the models, side by side. references: to compare them with; shown muted and never marked as best. seeds:
    what the models are means of (`dyadlm.diagnose.pool`); kept in the JSON. The page needs neither the network nor
    another file; the folder appears when it is complete. Returns the page's path.
    Raises `UserError` if `output` holds something, or there is no diagnosis.
    """
    require_new(output, "the report")
    if not diagnoses:
        raise UserError("There is nothing to report; give at least one diagnosis.")
    models, others = subjects(diagnoses, references)
    asked = dict.fromkeys(name for each in (*models, *others) for name in each.diagnosis.results)
    order = [name for name in PROBES if name in asked] + [name for name in asked if name not in PROBES]
    controls = {name: PROBES[name]().controls() if name in PROBES else () for name in order}
    with staged_folder(output) as folder:
        (folder / FIGURES_NAME).mkdir()
        near = usual_of_all(diagnoses)
        sections = [
            _section(name, place, models, others, controls[name], near, folder) for place, name in enumerate(order)
        ]
        write_atomically(folder / PAGE_NAME, _page(models, others, sections, near))
        write_atomically(folder / JSON_NAME, _json(diagnoses, references, seeds, controls))
    return output / PAGE_NAME


def _json(
    diagnoses: Sequence[Diagnosis],
    references: Sequence[Diagnosis],
    seeds: Sequence[Diagnosis],
    controls: Mapping[str, Sequence[Control]],
) -> str:
    """What is needed to repeat everything; null for what is no number."""
    expected = {
        probe: [
            {
                "name": control.name,
                "shows": control.shows,
                "expected": {name: [value.value, value.tolerance] for name, value in control.expected.items()},
                "derivation": control.derivation,
            }
            for control in each
        ]
        for probe, each in controls.items()
    }
    stored = {
        "format": FORMAT,
        "version": __version__,
        "diagnoses": [each.to_dict() for each in diagnoses],
        "references": [each.to_dict() for each in references],
        "seeds": [each.to_dict() for each in seeds],
        "controls": expected,
    }
    return json.dumps(_strict(stored), indent=1, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _section(
    probe: str,
    place: int,
    models: Sequence[Subject],
    others: Sequence[Subject],
    controls: Sequence[Control],
    near: Sequence[Kind],
    folder: Path,
) -> Section:
    everyone = [*models, *others]
    results = [(subject.look, subject.result(probe)) for subject in everyone]
    names = list(dict.fromkeys(name for _, result in results if result for name in result.readings))
    verdicts = {name: compare(models, probe, name) for name in names}
    columns = [
        _column(name, [reading for each in everyone if (reading := each.reading(probe, name))]) for name in names
    ]
    kind = PROBES.get(probe)
    summary, parts = described(kind.__doc__ or "") if kind else (Markup(), [])
    return Section(
        anchor=f"probe-{place}",
        id=probe,
        question=kind.question if kind else probe,
        failure_mode=_failure(kind.failure_mode) if kind else "",
        meaning=kind.meaning if kind else "",
        summary=summary,
        parts=[(part, text) for part, text in parts if part != "Evidence"],
        evidence=dict(parts).get("Evidence", Markup()),
        results=results[: len(models)],
        columns=columns,
        rows=[
            _row(subject, probe, columns, [verdicts[name].best == number for name in names])
            for number, subject in enumerate(everyone)
            if not subject.look.muted or subject.result(probe)
        ],
        usual=_usual(probe, names, near),
        controls=[_known(control, names) for control in controls],
        published=kind.published if kind else (),
        pictures=_pictures(probe, place, everyone, names[0] if names else "", verdicts, folder / FIGURES_NAME),
        settings=_agreement(
            [
                (look, _flat({**result.settings, "seconds": result.seconds}))
                for look, result in results
                if result and result.readings
            ]
        ),
    )


def _column(name: str, readings: Sequence[Reading]) -> Column:
    first = readings[0]
    note = first.note if all(reading.note == first.note for reading in readings) else ""
    return Column(name, first.unit, DIRECTIONS[first.better], note)


def _row(subject: Subject, probe: str, columns: Sequence[Column], best: Sequence[bool]) -> Row:
    status = _status(subject.result(probe))
    cells = []
    for column, here in zip(columns, best, strict=True):
        reading = subject.reading(probe, column.name)
        note = reading.note if reading and not column.note else ""
        cells.append(Cell(*written(reading), here, note) if reading else None)
    return Row(subject.look, [] if status else cells, status, subject.alike)


def _status(result: ProbeResult | None) -> str:
    """Why there are no figures, with the reason; empty if there are."""
    if result is None:
        return "not asked"
    if result.not_applicable:
        return f"not applicable: {result.not_applicable}"
    if result.failed:
        return f"failed: {result.failed}"
    return "" if result.readings else "no figures"


def _failure(modes: str) -> str:
    """The rows of the paper's table, each with its name."""
    return "; ".join(f"{mode}: {FAILURE_MODES[mode]}" for mode in modes.split(", "))


def _usual(probe: str, names: Sequence[str], near: Sequence[Kind]) -> list[Range]:
    """Of all measured models of this size, then of each kind. Empty where nothing was measured."""
    found = [(kind.name, kind.ranges[probe]) for kind in near if kind.ranges.get(probe)]
    every: dict[str, Sequence[float]] = {}
    for _, ranges in found:
        for name, (low, high) in ranges.items():
            least, most = every.get(name, (low, high))
            every[name] = (min(least, low), max(most, high))
    rows = [("all of them", every), *found] if len(found) > 1 else found
    told = [Range(kind, [_between(ranges.get(name)) for name in names]) for kind, ranges in rows]
    return [each for each in told if any(each.cells)]


def _between(limits: Sequence[float] | None) -> str:
    if limits is None:
        return ""
    size = max(map(abs, limits))
    low, high = (number(each, size, abs(limits[1] - limits[0])) for each in limits)
    return low if low == high else f"{low} to {high}"


def _known(control: Control, names: Sequence[str]) -> Known:
    def told(name: str) -> str:
        expected = control.expected.get(name)
        if expected is None:
            return ""
        around = f" ± {compact(expected.tolerance)}" if expected.tolerance else ""
        return f"{number(expected.value)}{around}"

    sign = "+" if control.shows else "−"
    return Known(
        f"{sign} {control.name}",
        [told(name) for name in names],
        ", ".join(f"{name} = {told(name)}" for name in control.expected),
        control.derivation,
    )


def _pictures(
    probe: str, place: int, everyone: Sequence[Subject], headline: str, verdicts: Mapping[str, Verdict], folder: Path
) -> list[Picture]:
    """The headline of all, if there is something to compare; then every curve."""
    pictures: list[Picture] = []

    def add(drawing: Drawing, title: str, sentence: str) -> None:
        stem = _slug(title)
        while (folder / f"{stem}.png").exists():
            stem += "-again"
        write_picture(drawing, title, folder / f"{stem}.png")
        svg = Markup(to_svg(drawing, f"figure-{place}-{len(pictures)}", f"{title}. {sentence}"))
        pictures.append(Picture(title, sentence, svg, f"{folder.name}/{stem}.png"))

    readings = [
        (subject.look, reading)
        for subject in everyone
        if (reading := subject.reading(probe, headline)) and math.isfinite(reading.value)
    ]
    if len(readings) > 1:
        sentence = verdicts[headline].sentence
        if not sentence:
            (look, reading), *rest = readings
            sentence = f"{look.short} has {number(reading.value)}, beside "
            sentence += (
                enumeration([f"{number(other.value)} of {other_look.short}" for other_look, other in rest]) + "."
            )
        add(draw_readings(readings), f"{probe}: {headline}", sentence)
    found = [(subject.look, result.curves) for subject in everyone if (result := subject.result(probe))]
    for name in dict.fromkeys(name for _, curves in found for name in curves):
        same = [(look, curves[name]) for look, curves in found if name in curves]
        drawn = [(look, curve) for look, curve in same if any(map(math.isfinite, curve.y))]
        if drawn:
            add(draw_curves(drawn), f"{probe}: {name}", told(drawn))
    return pictures


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "figure"


def described(docstring: str) -> tuple[Markup, list[tuple[str, Markup]]]:
    """The first paragraph of a probe's docstring, and its parts by name."""
    summary, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    pieces = re.split(rf"(?:^|(?<=[.;]\s))({'|'.join(PARTS)}):\s", rest, flags=re.MULTILINE)
    parts = zip(pieces[1::2], pieces[2::2], strict=True)
    return _marked(summary), [(name, _marked(text)) for name, text in parts]


def _marked(text: str) -> Markup:
    """Plain text with its code and its papers marked as such."""
    safe = str(escape(" ".join(text.split())))
    safe = re.sub(r"`+([^`]+)`+", r"<code>\1</code>", safe)
    return Markup(re.sub(r"arXiv (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', safe))


def _flat(entries: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested settings as one list of names and values."""
    flat: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            value = {str(place): entry for place, entry in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{name} ")
        else:
            flat[f"{above}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _agreement(settings: Sequence[tuple[Look, Mapping[str, str]]]) -> Agreement:
    agreed: list[tuple[str, Sequence[tuple[Look | None, str]]]] = []
    for name in dict.fromkeys(name for _, each in settings for name in each):
        values = [(look, each[name]) for look, each in settings if name in each]
        same = len(values) == len(settings) and len({value for _, value in values}) == 1
        agreed.append((name, [(None, values[0][1])] if same else values))
    return agreed


def _page(
    models: Sequence[Subject], others: Sequence[Subject], sections: Sequence[Section], near: Sequence[Kind]
) -> str:
    names = [model.look.name for model in models]
    pooled = [model.look.name for model in models if model.pooled]
    first = models[0].diagnosis.circumstances
    return render(
        "diagnosis.html",
        title=f"Diagnosis of {enumeration(names) if len(names) <= 4 else f'{len(names)} models'}",
        models=models,
        references=others,
        pooled=enumeration(pooled) if pooled else "",
        sections=sections,
        near=enumeration([f"{kind.name} ({compact(kind.parameters)} parameters)" for kind in near]) if near else "",
        ground=ground(),
        smallest=compact(min(kind.parameters for kind in measured())),
        largest=compact(max(kind.parameters for kind in measured())),
        modes=FAILURE_MODES,
        sizes=[_size(each) for each in models],
        facts=_facts(first),
        unlike=[subject.look.name for subject in (*models, *others) if not subject.alike],
        circumstances=_agreement([(each.look, _flat(each.diagnosis.circumstances)) for each in (*models, *others)]),
        files={"json": JSON_NAME, "figures": FIGURES_NAME},
    )


def _size(model: Subject) -> str:
    """The number of parameters, empty if it is not known."""
    parameters = parameters_of(model.diagnosis)
    return f"{parameters:,} parameters" if parameters else ""


def _facts(circumstances: Mapping[str, Any]) -> list[str]:
    """What was asked, in a line."""
    material, budget = circumstances.get("material", {}), circumstances.get("budget", {})
    facts = []
    if "name" in material:
        facts.append(f"text: {material['name']}" + (f", {material['tokens']:,} tokens" if "tokens" in material else ""))
    if "tokens" in budget:
        facts.append(f"budget × {budget['tokens']:g}" + (", fast" if budget.get("fast") else ""))
    if "seed" in budget:
        facts.append(f"seed {budget['seed']}")
    return facts
