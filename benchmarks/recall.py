"""Recall beside the state it takes: ours with and without slots, Mamba-2, Gated DeltaNet and attention, one sweep.

    python benchmarks/recall.py [--family dyad-slots] [--rates 3e-3 1e-2] [--minutes 10]

Multi-query associative recall over 8192 tokens, 2 layers of width 64, one model per learning rate on the whole mixture,
a step of each part in turn, then the same weights on rows of 4k and 64k, filled with random or with blank tokens. The
mixture has a short, dense part more: most of what a model must find out (copy a value, tell keys from values) it finds
there at a fraction of the cost.
A cell takes at most --minutes of training, of the training thread's own time, whatever else runs on the machine.
"""

import json

import torch
from transformers.utils import logging

from common import arguments, commit, require_green
from dyadlm.cli.recall import show
from dyadlm.recall import Cell, Recipe, Study, parse_fields

PARTS = (
    "length=16,pairs=4",
    "length=64,pairs=4",
    "length=128,pairs=8",
    "length=256,pairs=16",
    "length=512,pairs=64",
)
TESTS = (
    "length=4096,pairs=64",
    "length=65536,pairs=64",
    "length=4096,pairs=64,filler=blank",
    "length=65536,pairs=64,filler=blank",
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# All have 2 layers of width 64 (`dyadlm.recall.models`); here stands what is not the default.
FAMILIES = {
    "dyad-slots": ("tiny", {"num_levels": 2, "salience": False}),
    "dyad-plain": ("tiny", {"num_levels": 9, "slot_contexts": []}),
    "mamba2": ("mamba2", {}),
    "gated-deltanet": ("qwen3_next", {}),
    "attention": ("llama", {}),
}


def main() -> None:
    parser = arguments(__doc__ or "", "recall.json")
    parser.add_argument("--family", choices=FAMILIES, help="measure this family only")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="more fields, with --family")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="a schedule of so many steps, for all alike, instead of the clock's")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    options = parser.parse_args()
    if options.set and not options.family:
        parser.error("--set belongs to one --family")
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    require_green()
    recipe = Recipe(
        "mqar",
        PARTS,
        TESTS,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        steps=options.steps,
        minutes=options.minutes,
        weight_decay=options.weight_decay,
    )
    study = Study(options.output, recipe, {"commit": commit()})
    cells = [
        Cell(model, rate, seed, fields | parse_fields(options.set))
        for model, fields in ([FAMILIES[options.family]] if options.family else FAMILIES.values())
        for rate in options.rates
        for seed in range(options.seeds)
    ]
    for number, cell in enumerate(cells):
        print(f"[{number + 1}/{len(cells)}] {cell.name}", flush=True)
        result = study.run(cell)
        print(f"    {json.dumps({key: result[key] for key in ('stopped', 'steps', 'seconds', 'running_accuracy')})}")
    show(cells, study.results)


if __name__ == "__main__":
    main()
