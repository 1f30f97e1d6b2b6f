"""`dyadlm compare`: families of models on the same text, by the same trainer, and one page with the results."""

import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dyadlm.cli.shared import Address, WorkEngine, errors, require_ray
from dyadlm.cli.stopping import saying_when_stopped

if TYPE_CHECKING:
    from dyadlm.compare import Cell, Recipe, Study
    from dyadlm.compare.cell import Done


def compare(
    models: Annotated[
        str, typer.Option("--models", metavar="A,B,…", help="Families, as `dyadlm zoo list` shows them.")
    ],
    data: Annotated[list[str], typer.Option("--data", metavar="DIR|CORPUS|FILE ...", help="The text to train on.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Cells, weights, results.json and index.html.")],
    budget: Annotated[
        str,
        typer.Option(help="Of each training: tokens=5M, seconds=300 (of one core) or flops=1e15."),
    ] = "tokens=1M",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds at the best rate.")] = 1,
    sweep: Annotated[
        float, typer.Option(metavar="PART", help="The part of the budget that each rate of the sweep gets.")
    ] = 0.2,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option(
            "--learning-rates",
            metavar="RATE ...",
            help="Where the sweep begins. Default: 4e-3 8e-3 16e-3, with adamw half of these.",
        ),
    ] = None,
    parameters: Annotated[str, typer.Option(help="Of each model, n-gram tables aside.")] = "1M",
    length: Annotated[int, typer.Option(min=8, help="Tokens of a training text.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 4,
    optimizer: Annotated[Literal["adamw", "muon"], typer.Option(help="The same for all families.")] = "muon",
    ngrams: Annotated[
        str, typer.Option(metavar="2,3,…", help="Sizes of hashed n-grams beside the embedding, the same for all.")
    ] = "",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="What training computes in (autocast), the same for all.")
    ] = "float32",
    compiled: Annotated[
        str,
        typer.Option(
            "--compile",
            metavar="A,B,…",
            help="Families to train with torch.compile: faster, after minutes for each cell. It needs a C++ compiler.",
        ),
    ] = "",
    plugin: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py|MODULE", help="Your own code that registers families; may be given again."),
    ] = None,
    engine: WorkEngine = "local",
    address: Address = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Cells at once. Default: one for each core. A Ray cluster decides by itself."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(metavar="PART", help="Score this part of the usual number of tokens.")] = 1.0,
    force: Annotated[
        bool, typer.Option("--force", help="Compare also families that the audit finds fault with.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")] = False,
) -> None:
    """Train families of models on the same text with the same budget, and write a page that compares them.

    Learning rates are swept alike: each rate gets a fifth of the budget (--sweep), and the sweep goes on while the
    best rate is at its end. The best rate is trained on the whole budget, and so is half of it, as long as half is
    better. Then the other seeds are trained at the best. With three rates and one seed a family takes 2.6 budgets or
    more; cells run at once on all cores. Run the same command again to go on after a stop.
    """
    from dyadlm.compare import Budget, Recipe, Study, run_study
    from dyadlm.compare.budget import parse_amount
    from dyadlm.compare.study import summary
    from dyadlm.errors import UserError
    from dyadlm.report.arena import write_arena
    from dyadlm.zoo.plugins import load_plugins

    require_ray(engine, address)
    recipe = Recipe(
        data=tuple(data),
        parameters=int(parse_amount(parameters, "--parameters")),
        length=length,
        batch=batch_size,
        optimizer=optimizer,
        ngrams=_sizes(ngrams),
        scale=scale,
        dtype=dtype,
        compiled=_names(compiled),
        plugins=tuple(plugin or ()),
        code=load_plugins(plugin or ()),
    )
    families = _names(models)
    if others := [name for name in recipe.compiled if name not in families]:
        raise UserError(f"--compile names {others[0]}, which is not among --models; add it there, or leave it out.")
    rates = tuple(learning_rates or ())
    study = Study(recipe, families, Budget.parse(budget), seeds, sweep, rates, force)
    at_once = jobs or os.cpu_count() or 1
    if dry_run:
        _show_plan(study, at_once)
        return
    study = replace(study, recipe=replace(recipe, text=_prepare(recipe)))
    progress = _Progress()
    with saying_when_stopped(
        lambda: f"Stopped; {progress.done} cells are kept in {output}. The same command goes on from there."
    ):
        finals = run_study(study, output, at_once, engine, address, progress)
    page = write_arena(summary(study, output, finals), output, _command())
    errors.print(f"{page}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sizes(text: str) -> tuple[int | str, ...]:
    from dyadlm.errors import UserError

    found: list[int | str] = []
    for part in _names(text):
        if part != "word" and not (part.isdecimal() and 1 <= int(part) <= 16):
            raise UserError(f"--ngrams takes sizes from 1 to 16 and `word`, such as 2,3,4, not {part!r}.")
        found.append(part if part == "word" else int(part))
    return tuple(found)


def _command() -> str:
    return shlex.join(["dyadlm", *sys.argv[1:]])


def _prepare(recipe: "Recipe") -> str:
    """Prepare the text once, before the processes that all read it; its identity. Raises `UserError` where there is too
    little of it."""
    from dyadlm.data import byte_tokenizer, resolve_data
    from dyadlm.data.progress import preparation_progress
    from dyadlm.data.resolve import parse_weight
    from dyadlm.errors import UserError

    if any(parse_weight(source)[0] == "-" for source in recipe.data):
        raise UserError("Several processes read the text of a comparison, and standard input only once; give a file.")
    with preparation_progress(errors) as progress:
        resolved = resolve_data(list(recipe.data), byte_tokenizer(), progress=progress)
    if not any(len(stream) for stream in resolved.validation):
        raise UserError("The text leaves nothing to validate on; give more text.")
    if short := next((stream for stream, _ in resolved.train if len(stream) < recipe.length), None):
        raise UserError(
            f"{short.name} has {len(short)} tokens, fewer than a training text of {recipe.length}; "
            "give more text, or a smaller --length."
        )
    return resolved.identity


def _show_plan(study: "Study", at_once: int) -> None:
    rates = len(study.rates) if len(study.rates) > 1 else 0
    halves = 1 if rates and study.sweep < 1 else 0
    budgets = len(study.families) * (rates * study.sweep + halves + study.seeds)
    typer.echo(f"families: {', '.join(study.families)}")
    half = ", one at half of the best rate," * halves
    typer.echo(f"each: {rates} rates at {study.sweep:g} of {study.budget}{half} and {study.seeds} at the best rate")
    typer.echo(f"in all: {budgets:g} times {study.budget}, and more where the search goes on; {at_once} cells at once")
    if study.budget.kind == "seconds":
        typer.echo(f"about {budgets * study.budget.amount / at_once / 60:.1f} minutes of training, and scoring")


class _Progress:
    """A line for each cell. done: cells that are."""

    def __init__(self) -> None:
        self.done, self._begun = 0, time.monotonic()

    def __call__(self, done: "Done", left: int) -> None:
        self.done += 1
        minutes = (time.monotonic() - self._begun) / 60
        errors.print(f"{self._told(done.cell, done.found)} ({self.done} done, {left} left, {minutes:.1f} min)")

    @staticmethod
    def _told(cell: "Cell", found: dict[str, Any]) -> str:
        if not cell.tokens:
            return (
                f"{cell.family}: {found['parameters']:,} parameters, {1e6 * found['seconds_per_token']:.0f} µs a token"
            )
        if found.get("diverged"):
            return f"{cell.family}: {cell.tokens:,} tokens at {cell.rate:g}, seed {cell.seed}: diverged"
        nats = found["scores"]["fresh"]["nats"]
        return f"{cell.family}: {cell.tokens:,} tokens at {cell.rate:g}, seed {cell.seed}: {nats:.4f} nats"
