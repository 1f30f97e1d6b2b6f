"""Score the trained cells of a comparison anew, where how they are scored has changed since.

    python benchmarks/rescore.py benchmarks/results/arena-medium [--again]

Weights are read from the folder and nothing is trained. Costs, curves and sweeps stay as they are. Cells that were
scored anew before are left, unless with `--again`.
"""

import argparse
import json
from pathlib import Path

import torch

from common import circumstances, require_green
from dyadlm.compare.cell import scored
from dyadlm.compare.kept import kept_cells, load_cell, load_recipe
from dyadlm.data import byte_tokenizer, resolve_data
from dyadlm.files import write_atomically
from dyadlm.zoo import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    folder = options.folder
    torch.set_num_threads(1)
    require_green()
    recipe = load_recipe(folder)
    data = resolve_data(list(recipe.data), byte_tokenizer())
    if data.identity != recipe.text:
        raise SystemExit("The text is not that of the study.")
    commit = circumstances()["commit"]
    for family in FAMILIES:
        for cell in kept_cells(folder, family):
            file = folder / "cells" / f"{cell.file_name}.json"
            found = json.loads(file.read_text())
            if found.get("diverged") or ("scored_at" in found and not options.again):
                continue
            before = {name: score["nats"] for name, score in found["scores"].items()}
            found |= {**scored(recipe, cell, load_cell(folder, cell), data), "scored_at": commit}
            write_atomically(file, json.dumps(found, indent=1) + "\n")
            after = {name: score["nats"] for name, score in found["scores"].items()}
            changes = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in after)
            print(f"{cell.name}: carried {found['carried']}; {changes}", flush=True)


if __name__ == "__main__":
    main()
