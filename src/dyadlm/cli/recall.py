"""`dyadlm recall`: can a model bind, copy and keep track? Synthetic tasks with exact answers."""

import json as json_format
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from dyadlm.cli.shared import Address, Device, Jobs, WorkEngine, at_once, errors, require_ray, silence_transformers
from dyadlm.cli.stopping import saying_when_stopped, where_it_goes_on
from dyadlm.console import print_table

if TYPE_CHECKING:
    from dyadlm.recall import Cell, Study


# Without a terminal a training says how far it is once in so many seconds.
SECONDS_A_LINE = 60.0


def recall(
    task: Annotated[
        str,
        typer.Option(help="mqar, induction, copying, parity, flipflop, permutations, needle, path-star or lookahead."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="A preset, a folder, tiny-en, or an architecture of transformers by its model type, such as llama."
        ),
    ],
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,... ...", help="Parameters of the training parts, in order (length=64,pairs=4)."
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,... ...", help="Parameters of further tests of the same weights."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE ...", help="Fields of the model's configuration."),
    ] = None,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option(metavar="RATE ...", help="Learning rates to try. Default: the same four for every model."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = 1,
    minutes: Annotated[float, typer.Option(help="Maximum training time of one model at one rate.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of training. Default: as many as fit into --minutes.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a step, limited by --batch-tokens.")] = 32,
    batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in a step.")] = 8192,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices other than embeddings.")] = 0.1,
    questions: Annotated[int, typer.Option(help="Minimum number of questions for each part.")] = 4000,
    output: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Write the results here. Existing results are not measured again."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    engine: WorkEngine = "local",
    address: Address = None,
    jobs: Jobs = None,
) -> None:
    """Train a small model on a synthetic task, and measure how many answers on new items are right.

    Items never repeat; seeds are fixed; answers are exact.
    """
    from dyadlm.files import require_writable
    from dyadlm.generate.pretrained import resolve_device
    from dyadlm.recall import LEARNING_RATES, Cell, Recipe, Study, parse_fields

    require_ray(engine, address)
    silence_transformers()
    if output is not None:
        require_writable(output, "the results")
    recipe = Recipe(
        task,
        tuple(part or ()),
        tuple(test or ()),
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        steps=steps,
        minutes=minutes,
        weight_decay=weight_decay,
        questions=questions,
    )
    study = Study(output, recipe)
    given = parse_fields(assignments or ())
    place = str(resolve_device(device))
    cells = [Cell(model, rate, seed, given) for rate in learning_rates or LEARNING_RATES for seed in range(seeds)]
    plan = [f"{len(cells)} trainings of up to {minutes:g} minutes: up to {len(cells) * minutes:g} minutes in all"]
    if steps is not None or len(cells) == 1:
        plan = []
    with saying_when_stopped(lambda: where_it_goes_on(output)):
        if engine == "ray" or at_once(engine, jobs) > 1:
            _all_at_once(study, cells, study.run_all(cells, at_once(engine, jobs), engine, address, place))
        else:
            _one_by_one(study, cells, place, plan)
    results = {cell.name: study.results[cell.name] for cell in cells}
    if json:
        typer.echo(json_format.dumps(results, indent=2))
        return
    show(cells, results)


def _all_at_once(study: "Study", cells: "Sequence[Cell]", ended: "Iterable[tuple[Cell, dict[str, Any]]]") -> None:
    """Each cell in a process of its own, a line when it has ended."""
    known = sum(cell.name in study.results for cell in cells)
    for number, (cell, result) in enumerate(ended, known + 1):
        errors.print(f"[{number}/{len(cells)}] {cell.name}: {_summary(result)}")


def _one_by_one(study: "Study", cells: "Sequence[Cell]", place: str, plan: list[str]) -> None:
    """The cells in turn, in this process, with a bar for each."""
    for number, cell in enumerate(cells):
        with _bar(f"[{number + 1}/{len(cells)}] {cell.name}") as progress:
            result = study.run(cell, place, partial(_announced, plan, progress))
        if not errors.is_terminal:
            errors.print(f"[{number + 1}/{len(cells)}] {cell.name}: {_summary(result)}")


def _announced(plan: list[str], progress: Callable[[float, str], None], done: float, text: str) -> None:
    """Progress; before the first of it, what is planned, once the request has turned out right."""
    while plan:
        errors.print(plan.pop())
    progress(done, text)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on a terminal, a line now and then elsewhere; call what it yields with (share done, what is done)."""
    # What a narrow terminal cannot show is the end of the text, not how far it is.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(12, table_column=Column(min_width=12)),
        TaskProgressColumn(table_column=Column(min_width=4)),
        TimeRemainingColumn(table_column=Column(min_width=7)),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(title, total=1.0, text="")
        told = time.monotonic()

        def progress(done: float, text: str) -> None:
            nonlocal told
            bar.update(task, completed=done, text=text)
            if not errors.is_terminal and time.monotonic() - told >= SECONDS_A_LINE:
                told = time.monotonic()
                errors.print(f"{title}: {done:.0%}, {text}")

        yield progress


def _summary(result: dict[str, Any]) -> str:
    return f"{result['stopped']} after {result['steps']} steps, {result['seconds']:.0f} s"


def show(cells: "list[Cell]", results: dict[str, dict[str, Any]]) -> None:
    """Accuracy of every cell on every part, with its interval and beside chance."""
    parts = next(iter(results.values()))["parts"]
    asked = [f"{name}\nchance {result['chance']:.3g}" for name, result in parts.items()]
    figures = ("rate", "seed", "state", "ms/step", "steps")
    rows = []
    for cell in cells:
        result = results[cell.name]
        numbers = list(result["state_numbers"].values())
        milliseconds = result["milliseconds_per_step"]
        rows.append(
            (
                cell.label,
                *(_accuracy(part) for part in result["parts"].values()),
                f"{cell.rate:g}",
                str(cell.seed),
                f"{numbers[-1]:,}" + (" (grows)" if numbers[0] != numbers[-1] else ""),
                "–" if milliseconds is None else f"{milliseconds:.0f}",
                f"{result['steps']:,}",
                result["stopped"],
            )
        )
    print_table(["model", *asked, *figures, "ended"], rows, right=figures)


def _accuracy(part: dict[str, Any]) -> str:
    if part["accuracy"] is None:
        return f"– ({part['ended']})"
    low, high = part["interval"]
    return f"{part['accuracy']:.4f}\n{low:.3f}–{high:.3f}"
