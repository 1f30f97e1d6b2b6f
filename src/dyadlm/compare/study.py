"""A study: rates are swept alike for each family, then the best rate is trained on the whole budget with each seed.

Each cell is a file of its own, written when the cell is done, so that a study that was stopped goes on where it was.
Trainings on the whole budget go on from their last checkpoint; there is one at each eighth.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dyadlm.cluster import Engine
from dyadlm.compare.budget import Budget
from dyadlm.compare.cell import Cell, Done, Recipe, run_cell
from dyadlm.compare.content import is_whole, read_object
from dyadlm.errors import UserError
from dyadlm.files import locked, make_folder, write_atomically
from dyadlm.model.configuration import BYTE_VOCABULARY
from dyadlm.workers import run_tasks
from dyadlm.zoo import Sizes, find_family, solve
from dyadlm.zoo.family import Family
from dyadlm.zoo.plugins import blaming

RATES = {"muon": (4e-3, 8e-3, 1.6e-2), "adamw": (2e-3, 4e-3, 8e-3)}  # where a sweep begins
SMALLEST, LARGEST = 1.25e-4, 6.4e-2  # a sweep is not extended beyond
WILDEST, SEEDS = 1e6, 1000  # the largest rate and the most seeds that can be asked for
RECIPE = "recipe.json"
UNFINISHED = "unfinished"  # checkpoints of trainings that have begun
EARLIER = {
    "dtype": "float32",
    "compiled": [],
    "plugins": [],
    "code": "",
}  # of studies that were begun when there was no choice


@dataclass(frozen=True)
class Study:
    """What is asked for.

    sweep: the part of the budget that each rate of the sweep gets. rates: where it begins; it is extended by factors of
    two while the best is at an end; empty takes those of the optimizer. The rate is then settled on the whole budget
    (`settled`). force: families that the audit finds fault with are compared all the same.

    Raises:
        UserError: a family, a sweep or a number that cannot be compared.
    """

    recipe: Recipe
    families: tuple[str, ...]
    budget: Budget
    seeds: int = 1
    sweep: float = 0.2
    rates: tuple[float, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        if not self.rates:
            object.__setattr__(self, "rates", RATES[self.recipe.optimizer])
        if not self.families:
            raise UserError("There is nothing to compare; name families with --models (`dyadlm zoo list`).")
        if len(set(self.families)) < len(self.families):
            raise UserError("A family is named twice in --models; name each once.")
        if not 0 < self.sweep <= 1:
            raise UserError("--sweep is a part of the budget, above 0 and at most 1.")
        if not 1 <= self.seeds <= SEEDS or not all(0 < rate <= WILDEST for rate in self.rates):
            raise UserError(f"A study has 1 to {SEEDS} seeds, and rates above 0 and up to {WILDEST:,.0f}.")
        if len({f"{rate:g}" for rate in self.rates}) < len(self.rates):  # as cells are named
            raise UserError("A learning rate is given twice; give each once, with up to six digits.")
        for name in self.families:
            require_comparable(find_family(name), self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: what another study in the same folder must agree with."""
        asked = asdict(self.recipe) | {"budget": str(self.budget), "sweep": self.sweep}
        return dict(json.loads(json.dumps(asked)))


def require_comparable(family: Family, recipe: Recipe) -> None:
    """Raise `UserError` where a family cannot be built at the size of the recipe."""
    with blaming(family.name):
        if family.build is None or family.missing:
            family.make(Sizes(32, 1, 32, BYTE_VOCABULARY, recipe.length))  # raises
        solve(family, recipe.parameters, None, BYTE_VOCABULARY, recipe.length)


class Results:
    """The cells of a folder. found: by name."""

    def __init__(self, folder: Path, study: Study):
        self.folder = folder
        self.found: dict[str, dict[str, Any]] = {}
        make_folder(folder / "cells")
        place, asked = folder / RECIPE, study.to_dict()
        if not place.exists():
            write_atomically(place, json.dumps(asked, indent=1) + "\n")
        else:
            earlier = EARLIER | read_object(place, "choose another --output")
            if changed := [name for name in asked if earlier.get(name) != asked[name]]:
                raise UserError(f"{folder} holds a study with another {changed[0]}; choose another --output.")
        recipe = json.loads(json.dumps(asdict(study.recipe)))
        for file in sorted((folder / "cells").glob("*.json")):
            content = read_object(file)
            try:
                cell = Cell(**content["cell"])
                ours = EARLIER | content["recipe"] == recipe
                whole = ours and file.name == f"{cell.file_name}.json" and is_whole(cell, content)
            except (KeyError, TypeError, ValueError, OverflowError):
                whole = False
            if not whole:
                raise UserError(f"{file} is no cell of this study; move it away, or choose another --output.")
            self.found[cell.name] = content

    def keep(self, done: Done) -> None:
        """Write what a cell found, and its weights before that."""
        cells, name = self.folder / "cells", done.cell.file_name
        if done.weights:
            write_atomically(cells / f"{name}.safetensors", done.weights)
        write_atomically(cells / f"{name}.json", json.dumps(done.found, indent=1) + "\n")
        shutil.rmtree(self.folder / UNFINISHED / name, ignore_errors=True)
        self.found[done.cell.name] = done.found

    def nats(self, cell: Cell) -> float:
        """Loss of a trained cell in fresh windows; infinite where it diverged."""
        found = self.found[cell.name]
        return math.inf if found.get("diverged") else float(found["scores"]["fresh"]["nats"])


def tokens_of(study: Study, results: Results, family: str, part: float = 1.0) -> int:
    """Tokens of whole steps that a part of the budget is for a family."""
    cost = results.found[Cell(family).name]
    step = study.recipe.length * study.recipe.batch
    tokens = study.budget.tokens(cost["seconds_per_token"], cost["flops_per_token"])
    return max(1, int(tokens * part) // step) * step


class Sweep(NamedTuple):
    """Trainings that differ in their rate. cells: of all rates that are tried so far. missing: those still to be run.
    best: the best rate, once none is missing."""

    cells: list[Cell]
    missing: list[Cell]
    best: float | None


def swept(study: Study, results: Results, family: str) -> Sweep:
    """The sweep of a family. One rate is no sweep."""
    if len(study.rates) == 1:
        return Sweep([], [], study.rates[0])
    tokens = tokens_of(study, results, family, study.sweep)
    rates = sorted(study.rates)
    while True:
        cells = [Cell(family, tokens, rate) for rate in rates]
        if missing := _missing(cells, results):
            return Sweep(cells, missing, None)
        best = min(cells, key=results.nats).rate
        further = best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None
        if further is None or not SMALLEST <= further <= LARGEST:
            return Sweep(cells, [], best)
        rates = sorted([*rates, further])


def settled(study: Study, results: Results, family: str) -> Sweep:
    """The rate that the seeds are trained at: the best of the sweep, or a half of it (a quarter, ...), as long as that
    is better on the whole budget with the first seed. Long trainings want lower rates than the short ones of a sweep.

    There is nothing to settle where one rate was asked for, or where each rate of the sweep got the whole budget.
    """
    sweep = swept(study, results, family)
    if sweep.best is None or not sweep.cells or study.sweep == 1:
        return Sweep([], sweep.missing, sweep.best)
    tokens = tokens_of(study, results, family)
    cells = [Cell(family, tokens, sweep.best, final=True)]
    while cells[-1].rate / 2 >= SMALLEST:
        cells.append(replace(cells[-1], rate=cells[-1].rate / 2))
        if missing := _missing(cells, results):
            return Sweep(cells, missing, None)
        twice, half = (results.nats(cell) for cell in cells[-2:])
        if math.isfinite(twice) and twice <= half:
            return Sweep(cells, [], cells[-2].rate)
    missing = _missing(cells, results)
    return Sweep(cells, missing, None if missing else cells[-1].rate)


def _missing(cells: Iterable[Cell], results: Results) -> list[Cell]:
    return [cell for cell in cells if cell.name not in results.found]


def final_cells(study: Study, results: Results, family: str, rate: float) -> list[Cell]:
    """The cells of the whole budget, one for each seed."""
    tokens = tokens_of(study, results, family)
    return [Cell(family, tokens, rate, seed, final=True) for seed in range(study.seeds)]


def next_cells(study: Study, results: Results) -> list[Cell]:
    """What can be run now: the cost of each family, then sweeps, then whole budgets, of each kind the longest first."""
    if costs := _missing(map(Cell, study.families), results):
        return costs[:1]  # one by one: they are timed
    cells: list[Cell] = []
    for family in study.families:
        if (faults := results.found[Cell(family).name]["faults"]) and not study.force:
            raise UserError(f"{family} is not sound ({faults[0]}); leave it out of --models, or give --force.")
        _, missing, best = settled(study, results, family)
        if best is not None:
            missing = _missing(final_cells(study, results, family, best), results)
        cells += missing
    seconds = {name: results.found[Cell(name).name]["seconds_per_token"] for name in study.families}
    # Seeds wait until all sweeps have begun: a sweep that begins late is what all would wait for.
    return sorted(cells, key=lambda cell: (cell.final, -cell.tokens * seconds[cell.family]))


def run_cells(
    recipe: Recipe,
    wanted: Callable[[], Iterable[Cell]],
    jobs: int,
    engine: Engine = "local",
    address: str | None = None,
    unfinished: Path | None = None,
) -> Iterator[Done]:
    """Run cells, `jobs` at once, until none is wanted, as `dyadlm.workers.run_tasks` does. unfinished: as `run_cell`
    takes it."""
    work = partial(run_cell, recipe, unfinished=unfinished)
    for cell, result in run_tasks(work, wanted, jobs, engine, address):
        yield Done(cell, *result)


def run_study(
    study: Study,
    folder: Path,
    jobs: int,
    engine: Engine = "local",
    address: str | None = None,
    progress: Callable[[Done, int], None] = lambda done, left: None,
) -> dict[str, list[Cell]]:
    """Run what is missing, and return the final cells of each family; `Results` reads what they found.

    progress: called with each cell that is done, and the number of those that are now known to be left.

    Raises:
        UserError: a folder with another study, or what a cell refuses. RunFailed: a worker that died twice.
    """
    make_folder(folder)
    with locked(folder):
        results = Results(folder, study)
        # Workers of a cluster may not see the folder.
        unfinished = (folder / UNFINISHED).absolute() if engine == "local" else None
        for content in results.found.values():  # where a stop came before it was removed
            shutil.rmtree(folder / UNFINISHED / Cell(**content["cell"]).file_name, ignore_errors=True)
        for done in run_cells(study.recipe, partial(next_cells, study, results), jobs, engine, address, unfinished):
            results.keep(done)
            progress(done, len(next_cells(study, results)))
        with suppress(OSError):  # others may be left, of families that are not asked for
            (folder / UNFINISHED).rmdir()
        return {family: final_cells(study, results, family, _best(study, results, family)) for family in study.families}


def _best(study: Study, results: Results, family: str) -> float:
    rate = settled(study, results, family).best
    assert rate is not None
    return rate


def summary(study: Study, folder: Path, finals: dict[str, list[Cell]]) -> dict[str, Any]:
    """Everything that the page shows, as JSON can hold it."""
    results = Results(folder, study)
    families: dict[str, Any] = {}
    for name, cells in finals.items():
        family, cost = find_family(name), results.found[Cell(name).name]
        sweep, settling = (
            {cell.rate: results.nats(cell) for cell in trainings(study, results, name).cells}
            for trainings in (swept, settled)
        )
        seeds = [results.found[cell.name] for cell in cells]
        families[name] = {
            "title": family.title,
            "paper": family.paper,
            "decodes": family.decodes,
            "parameters": cost["parameters"],
            "flops_per_token": cost["flops_per_token"],
            "seconds_per_token": cost["seconds_per_token"],
            "faults": cost["faults"],
            "sweep": _finite(sweep),
            "settling": _finite(settling),
            "rate": cells[0].rate,
            "rate_at_the_edge": len(sweep) > 1 and cells[0].rate in (min(settling or sweep), max(sweep)),
            "tokens": cells[0].tokens,
            "decoding": cost["decoding"],
            "decoding_ends": cost["decoding_ends"],
            "seeds": [seed for seed in seeds if not seed.get("diverged")],
            "diverged": [seed["cell"]["seed"] for seed in seeds if seed.get("diverged")],
        }
    return {"recipe": study.to_dict(), "seeds": study.seeds, "families": families}


def _finite(losses: dict[float, float]) -> dict[float, float | None]:
    """None: diverged."""
    return {rate: nats if math.isfinite(nats) else None for rate, nats in losses.items()}
