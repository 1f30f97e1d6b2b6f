"""Long carried streams of the models that a comparison has trained, with and without a memory.

    python benchmarks/arena_streams.py FOLDER [--families dyad mamba2]

FOLDER: that of `benchmarks/arena.py` or `dyadlm compare`. Each model reads the first 65,536 bytes of each validation
text, those of seed 0 also a third of 1,000,000 bytes of each, as far as there are so many. Models without
a state of constant size read overlapping windows. Differences to the first family are paired by seed.
"""

import statistics
from pathlib import Path

import torch

from common import Cells, arguments
from dyadlm.causal_lm import continues
from dyadlm.compare.kept import load_model, load_recipe, taken_cells
from dyadlm.data import byte_tokenizer, resolve_data
from dyadlm.data.encoding import prefix_token
from dyadlm.diagnose.pool import STUDENT
from dyadlm.evaluate.protocols import carried_scores
from dyadlm.memory import MemoryOptions
from dyadlm.zoo import FAMILIES, find_family

EACH, ALL = 65_536, 1_000_000


def main() -> None:
    parser = arguments(__doc__ or "", "arena_streams.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    recipe = load_recipe(asked.folder)
    data = resolve_data(list(recipe.data), byte_tokenizer())
    prefix, memory = prefix_token(data.tokenizer), MemoryOptions.of_vocabulary(len(data.tokenizer))
    parts = {f"{name}, {EACH}": ([stream], EACH) for name, stream in zip(recipe.data, data.validation, strict=True)}
    wanted = {
        f"{family}, seed {cell.seed}, {part}": (family, cell.seed, *parts[part])
        for family in asked.families
        for cell in taken_cells(asked.folder, family)
        for part in parts
    }
    wanted |= {
        f"{family}, seed 0, all, {ALL}": (family, 0, data.validation, ALL)
        for family in asked.families
        if any(cell.seed == 0 for cell in taken_cells(asked.folder, family))
    }
    cells = Cells(asked.output)
    for name in cells.missing(list(wanted)):
        family, seed, streams, tokens = wanted[name]
        model = load_model(asked.folder, family, seed)
        carry = find_family(family).decodes == "state" and continues(model) != "from the beginning"
        scores = carried_scores(model, streams, recipe.length, prefix, carry, tokens, memory)
        cells.store(name, {"carried": carry} | {way: score._asdict() for way, score in scores.items()})
    report(cells, asked.families, list(parts))


def report(cells: Cells, families: list[str], parts: list[str]) -> None:
    """Means over seeds, and paired differences to the first family."""
    for way in ("carried", "remembered"):
        means: dict[str, dict[int, float]] = {}
        for family in families:
            for seed in range(100):
                names = [f"{family}, seed {seed}, {part}" for part in parts]
                if all(name in cells.results for name in names):
                    own = [cells.results[name][way]["nats"] for name in names]
                    means.setdefault(family, {})[seed] = statistics.fmean(own)
        for family, values in means.items():
            first = means[next(iter(means))]
            differences = [value - first[seed] for seed, value in values.items() if seed in first]
            told = ""
            if len(differences) > 1:
                spread = STUDENT[len(differences) - 2] * statistics.stdev(differences) / len(differences) ** 0.5
                told = f", less {next(iter(means))} {statistics.fmean(differences):+.4f} ± {spread:.4f}"
            print(f"{way}: {family} {statistics.fmean(values.values()):.4f} ({len(values)} seeds){told}")


if __name__ == "__main__":
    main()
