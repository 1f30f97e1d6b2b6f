"""`dyadlm diagnose`: how any causal language model fails, in figures with intervals and plain sentences."""

import json as json_format
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dyadlm.cli.diagnosing import Progressed, Request, diagnose_all, diagnose_one, diagnose_references, names
from dyadlm.cli.early import require_models, require_report_folder, require_sources, require_split
from dyadlm.cli.shared import (
    Address,
    Device,
    Dtype,
    Jobs,
    WorkEngine,
    at_once,
    errors,
    require_ray,
    silence_transformers,
)
from dyadlm.cli.stopping import saying_when_stopped, where_it_goes_on
from dyadlm.console import print_table

if TYPE_CHECKING:
    from dyadlm.diagnose import Diagnosis, Probe, ProbeResult

REPORT = "report"


def diagnose(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="Folders, runs, checkpoints, tiny-en, Hugging Face names or GGUF files to compare."
        ),
    ] = None,
    probe: Annotated[
        list[str] | None, typer.Option(metavar="ID ...", help="Run only these probes. Default: all that --list shows.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|CORPUS|FILE ...", help="The text to read. Default for a run of dyadlm: its validation text."
        ),
    ] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references",
            help="Also measure the first model with random weights, and a 4-gram of its training text if known.",
        ),
    ] = False,
    over_time: Annotated[
        bool,
        typer.Option(
            "--over-time", help="Measure every checkpoint of a run, to show when a skill was learned or lost."
        ),
    ] = False,
    pool_seeds: Annotated[
        bool,
        typer.Option(
            "--pool-seeds",
            help="Show NAME-seed0, NAME-seed1 ... as one model NAME: mean and interval over the seeds.",
        ),
    ] = False,
    split: Annotated[
        str, typer.Option(help="Which part of the data to read: train, validation or test.")
    ] = "validation",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Read a quarter of the text (a sixteenth above 30M parameters) and skip slow parts.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write a JSON file for each model and the report here. Existing answers are reused."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for choosing the text.")] = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Run the probes on models whose right answers are known.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="Print the probes and their questions.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: WorkEngine = "local",
    address: Address = None,
    jobs: Jobs = None,
) -> None:
    """Run probes on one or more models and report how each model fails.

    A probe that does not apply to a model is reported as not applicable. Other probes still run.
    """
    from dyadlm.diagnose import chosen, pool
    from dyadlm.errors import UserError

    require_ray(engine, address)
    silence_transformers()
    if over_time and references:
        raise UserError("--references stand beside one model, not beside its training; leave --over-time or it out.")
    probes = chosen(list(dict.fromkeys(probe or ())))
    if over_time:
        probes = _over_time(probes, named=bool(probe))
    if show:
        _list(probes, json)
    elif self_test:
        _self_test(probes)
    elif not models:
        raise UserError("There is no model to diagnose; name one, or give --list or --self-test.")
    else:
        _refuse_early(models, data or [], split, output, over_time)
        request = Request(
            models=dict(zip(names(models), models, strict=True)),
            probes=[probe.id for probe in probes],
            data=data or [],
            split=split,
            fast=fast,
            seed=seed,
            output=output,
            device=device,
            dtype=dtype,
            over_time=over_time,
        )
        bar = partial(_bar, probes=probes)
        with saying_when_stopped(lambda: where_it_goes_on(output)):
            if engine == "ray" or at_once(engine, jobs) > 1:
                found = diagnose_all(request, at_once(engine, jobs), engine, address)
            else:
                found = [diagnose_one(request, name, bar) for name in request.models]
            others = diagnose_references(request, bar) if references else []
        shown = pool(found) if pool_seeds else found
        if pool_seeds and shown == found:
            errors.print("No two models are seeds of one: those named NAME-seed0, NAME-seed1 and so on are.")
        if output is not None:
            _report(shown, others, [each for each in found if each not in shown], output)
        if json:
            typer.echo(json_format.dumps([diagnosis.to_dict() for diagnosis in [*shown, *others]], indent=2))
        else:
            _show([*shown, *others])


def _refuse_early(models: Sequence[str], data: list[str], split: str, output: Path | None, over_time: bool) -> None:
    """Raise `UserError` for what would fail only after minutes: the last model, the text, the page."""
    from dyadlm.diagnose.candidates import load_trajectory
    from dyadlm.report.diagnosis import FIGURES_NAME, JSON_NAME, PAGE_NAME

    require_split(split)
    require_sources(data)
    if output is not None:
        require_report_folder(output / REPORT, {FIGURES_NAME, JSON_NAME, PAGE_NAME})
    if over_time:
        for model in models:
            load_trajectory(model)  # which loads nothing yet
    else:
        require_models(models)


def _over_time(probes: "Sequence[Probe]", named: bool) -> "list[Probe]":
    """Those that look at checkpoints. Raises `UserError` if another one was asked for by name."""
    from dyadlm.diagnose import OverTime
    from dyadlm.errors import UserError

    others = [probe.id for probe in probes if not isinstance(probe, OverTime)]
    if named and others:
        raise UserError(f"{', '.join(others)} looks at one model, not at its training; leave --over-time or it out.")
    return [probe for probe in probes if isinstance(probe, OverTime)]


def _report(found: "list[Diagnosis]", references: "list[Diagnosis]", seeds: "list[Diagnosis]", output: Path) -> None:
    """The page is made anew each time, of what the JSON files hold; nothing but an older page is replaced."""
    import shutil

    from dyadlm.report.diagnosis import FIGURES_NAME, JSON_NAME, PAGE_NAME, write_diagnosis

    folder = output / REPORT
    if folder.is_dir() and {file.name for file in folder.iterdir()} == {FIGURES_NAME, JSON_NAME, PAGE_NAME}:
        shutil.rmtree(folder)
    page = write_diagnosis(found, folder, references, seeds)
    errors.print(f"Wrote {page}.")


def _list(probes: "Sequence[Probe]", json: bool) -> None:
    if json:
        told = [
            {
                "id": probe.id,
                "failure_mode": probe.failure_mode,
                "question": probe.question,
                "tokens": probe.tokens,
                "published": [asdict(value) for value in probe.published],
            }
            for probe in probes
        ]
        typer.echo(json_format.dumps(told, indent=2))
        return
    rows = [(probe.id, probe.failure_mode, f"{probe.tokens:,}", probe.question) for probe in probes]
    print_table(("probe", "failure", "tokens", "question"), rows, right=("tokens",))


def _self_test(probes: "Sequence[Probe]") -> None:
    """A line for each check, as it is made. Raises `RunFailed` if one leaves its tolerance."""
    from dyadlm.diagnose import self_test
    from dyadlm.errors import RunFailed

    failed = number = 0
    for check in self_test(probes):
        measured = f"no value: {check.reason}" if check.measured is None else f"{check.measured:.6g}"
        expected = f"{check.expected:.6g} ± {check.tolerance:.2g}"
        verdict = "passed" if check.passed else "FAILED"
        typer.echo(f"{verdict}  {check.probe}: {check.control}: {check.reading} {measured} (expected {expected})")
        number, failed = number + 1, failed + (not check.passed)
    if failed:
        raise RunFailed(f"{failed} of {number} checks left their tolerance.")
    typer.echo(f"All {number} checks passed.")


class RateColumn(ProgressColumn):
    """Steps of a probe's own, per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0.0:,.1f}/s")


@contextmanager
def _bar(title: str, probes: "Sequence[Probe]") -> Iterator[Progressed]:
    """A bar with the probe's name and number, rate and time left; call what it yields with (probe, done, total)."""
    numbers = {probe.id: f"{number} of {len(probes)}" for number, probe in enumerate(probes, 1)}
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        asked: dict[str, TaskID] = {}

        def progress(probe: str, done: int, total: int) -> None:
            if probe not in asked:
                for task in asked.values():
                    bar.remove_task(task)
                asked.clear()
                asked[probe] = bar.add_task(f"{title}: {probe}, {numbers[probe]}")
            bar.update(asked[probe], completed=done, total=total)

        yield progress


def _show(found: "list[Diagnosis]") -> None:
    """A row for each probe and model: the headline, its interval, and the sentence."""
    several = len(found) > 1
    titles = ("probe", *(["model"] if several else []), "headline", "value", "95 % interval", "reading")
    rows = [
        (name, *([diagnosis.subject] if several else []), *_row(diagnosis.results[name]))
        for name in dict.fromkeys(name for diagnosis in found for name in diagnosis.results)
        for diagnosis in found
        if name in diagnosis.results
    ]
    print_table(titles, rows, right=("value",))


def _row(result: "ProbeResult") -> tuple[str, str, str, str]:
    if result.not_applicable:
        return "", "–", "", f"Not applicable: {result.not_applicable}."
    if result.failed:
        return "", "–", "", f"Failed: {result.failed}"
    name, reading = next(iter(result.readings.items()))
    interval = "" if reading.interval is None else f"{reading.interval[0]:.4g} to {reading.interval[1]:.4g}"
    left_out = f" Left out: {result.left_out}." if result.left_out else ""
    return name, f"{reading.value:.4g}", interval, result.sentence + left_out
