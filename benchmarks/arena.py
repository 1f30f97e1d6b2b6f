"""Every family of the zoo that can be built, at one size, on one text, with equal sweeps: the table of docs/arena.md.

    python benchmarks/arena.py     # about 1M parameters, 1.5M tokens of Shakespeare, one seed
    python benchmarks/arena.py --tokens 5M --seeds 3 --families dyad llama --output benchmarks/results/arena-5M

Costs are measured first. Then the families are trained, the fastest first, as many at once as there are jobs, each with
all of its cells, so that a study that is stopped has whole rows; the same command goes on. The page is written after
each group.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from common import ROOT, require_green
from dyadlm.compare import Budget, Cell, Recipe, Study, run_study
from dyadlm.compare.cell import Done
from dyadlm.compare.study import Results, run_cells, summary
from dyadlm.data import byte_tokenizer, resolve_data
from dyadlm.files import locked, make_folder
from dyadlm.report.arena import write_arena
from dyadlm.zoo import FAMILIES

ALL = [name for name, family in FAMILIES.items() if not family.excluded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["shakespeare"])
    parser.add_argument("--ngrams", type=int, nargs="*", default=[], help="sizes of hashed n-grams, the same for all")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", nargs="*", default=[], help="families to compile")
    parser.add_argument("--tokens", default="1.5M")
    parser.add_argument("--budget", help="flops=N or seconds=N, in place of --tokens")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sweep", type=float, default=0.1, help="the part of the tokens that each rate gets")
    parser.add_argument("--families", nargs="+", default=ALL)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "arena")
    asked = parser.parse_args()
    require_green()
    recipe = Recipe(
        data=tuple(asked.data),
        ngrams=tuple(asked.ngrams),
        text=resolve_data(asked.data, byte_tokenizer()).identity,
        dtype=asked.dtype,
        compiled=tuple(asked.compile),
    )
    budget = Budget.parse(asked.budget or f"tokens={asked.tokens}")
    study = Study(recipe, tuple(asked.families), budget, asked.seeds, asked.sweep)
    command = shlex.join(["python", "benchmarks/arena.py", *_told(sys.argv[1:])])
    finals: dict[str, list[Cell]] = {}
    names = fastest_first(study, asked.output)
    for first in range(0, len(names), asked.jobs):
        group = replace(study, families=tuple(names[first : first + asked.jobs]))
        finals |= run_study(group, asked.output, asked.jobs, progress=show)
        found = summary(replace(study, families=tuple(finals)), asked.output, finals)
        write_arena(found, asked.output, command)


def _told(arguments: list[str]) -> list[str]:
    """Without what is of one machine."""
    kept, left_out = [], 0
    for argument in arguments:
        left_out = 2 if argument in ("--jobs", "--output") else max(0, left_out - 1)
        kept += [] if left_out else [argument]
    return kept


def fastest_first(study: Study, folder: Path) -> list[str]:
    """The sound families of a study, in the order of the time that they take for a token."""
    make_folder(folder)
    with locked(folder):
        results = Results(folder, study)

        def missing() -> list[Cell]:
            return [cell for cell in map(Cell, study.families) if cell.name not in results.found]

        for done in run_cells(study.recipe, missing, jobs=1):
            results.keep(done)
            show(done, len(missing()))
    costs = {name: results.found[Cell(name).name] for name in study.families}
    for name, cost in costs.items():
        if cost["faults"]:
            print(f"{name} is left out: {cost['faults'][0]}", flush=True)
    sound = [name for name in costs if not costs[name]["faults"]]
    return sorted(sound, key=lambda name: float(costs[name]["seconds_per_token"]))


def show(done: Done, left: int) -> None:
    scores = done.found.get("scores", {"fresh": {"nats": None}})
    print(done.cell.name, scores["fresh"]["nats"], f"({left} left of what is known)", flush=True)


if __name__ == "__main__":
    main()
