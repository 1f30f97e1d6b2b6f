"""Studies of models of 1M parameters on a GPU, many at once (`lanes.py`), on the medium corpus.

    python benchmarks/gpu_study.py --output FILE --weights DIR --seconds 200

families: ours, Mamba-2 and Llama, all with Muon and equal n-gram tables: learning rates swept alike at 1.02M tokens,
then 6.0M tokens at the best rate with three seeds, in windows of 256 bytes, and with the same rates in windows of
1,024; 4,096 bytes a step, which takes a GPU hardly longer than 1,024. optimizers: the arms of `optimizers.py` as there,
with three seeds. float32.

Scores: nats in fresh windows of 256, and at the same positions with 1,024 bytes of context. A cell that is there is not
measured again. Weights of the first seed are kept.
"""

import argparse
import json
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from common import dyad, mamba2, matched_llama, size
from dyadlm.data import byte_tokenizer, resolve_data
from dyadlm.files import write_atomically
from dyadlm.peer_ngrams import add_ngrams
from dyadlm.train.validation import ValidationSample
from lanes import Lane, batches, run
from optimizers import ARMS, NGRAMS, after_context

TOKENS, LENGTH, LONG = 4096, 256, 1024  # of a step, and of a window
MAMBA_CHUNK = 32  # of the form in torch; its memory grows with the chunk
SWEEP, FULL = 250, 1465  # steps
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
AT_ONCE = 24
VALIDATION_TOKENS, CONTEXT = 262_144, 1024
FAMILIES = ("dyad", "mamba2", "llama")


def build(family: str) -> Any:
    """A model of a family with n-gram tables."""
    if family == "dyad":
        return dyad(**NGRAMS)
    model = mamba2() if family == "mamba2" else matched_llama(positions=2 * CONTEXT)
    if family == "mamba2":
        for layer in model.backbone.layers:
            layer.mixer.chunk_size = MAMBA_CHUNK
    add_ngrams(model, NGRAMS["ngram_sizes"])
    return model


class Cell(NamedTuple):
    """What is trained, and how."""

    build: Callable[[], Any]
    steps: int
    seed: int
    optimizer: str = "muon"
    rate: float = 4e-3
    final: float = 0.1
    length: int = LENGTH
    tokens: int = TOKENS  # of a step


class Study:
    """Cells, data and scores."""

    def __init__(self, options: argparse.Namespace):
        self.path, self.weights, self.device = options.output, options.weights, options.device
        self.until = time.monotonic() + options.seconds
        self.compile, self.at_once = options.compile, options.at_once
        self.cells: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        data = resolve_data(["shakespeare", "kjv", "sotu"])
        self.streams = [(stream, float(len(stream))) for stream, _ in data.train]
        prefix = byte_tokenizer().bos_token_id
        self.fresh = ValidationSample.draw(data.validation, LENGTH, options.validation_tokens, prefix)
        self.late = after_context(self.fresh, CONTEXT)
        self.batches: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def data(self, steps: int, seed: int, tokens: int, length: int) -> dict[str, torch.Tensor]:
        """The batches of a run; their order depends on all of these."""
        key = (steps, seed, tokens, length)
        if key not in self.batches:
            found = batches(self.streams, steps, tokens // length, length, seed)
            self.batches[key] = {name: values.to(self.device) for name, values in found.items()}
        return self.batches[key]

    def lane(self, cell: "Cell") -> Lane:
        torch.manual_seed(cell.seed)
        model = cell.build().to(self.device)
        if self.compile:
            for layer in model.model.layers if hasattr(model, "model") else model.backbone.layers:
                layer.compile()
        data = self.data(cell.steps, cell.seed, cell.tokens, cell.length)
        return Lane(
            model, data, optimizer=cell.optimizer, rate=cell.rate, final=cell.final, record=self.device == "cuda"
        )

    @torch.no_grad()
    def score(self, lane: Lane) -> dict[str, Any]:
        """Nats in both protocols."""
        model, found = lane.model.eval(), {}
        for name, sample in (("nats", self.fresh), ("nats_after_context", self.late)):
            rows = 32 if "Mamba" in type(model).__name__ else 256
            nats, tokens, _ = sample.measure(model, 0, 1, rows).sum(0).tolist()
            found[name] = round(nats / tokens, 4)
        return found

    def measure(self, cells: dict[str, "Cell"], keep: Collection[str] = ()) -> bool:
        """Train and score the cells that are not there. Whether all are there at the end. keep: names whose weights are
        written."""
        todo = [name for name in cells if name not in self.cells]
        for first in range(0, len(todo), self.at_once):
            names = todo[first : first + self.at_once]
            begun, lanes = time.monotonic(), {}
            for name in names:
                lanes[name] = self.lane(cells[name])
            print(f"{len(names)} lanes in {time.monotonic() - begun:.1f} s: {', '.join(names)}", flush=True)
            begun = time.monotonic()
            whole = run(list(lanes.values()), self.until)
            seconds = time.monotonic() - begun
            done = sum(lane.done for lane in lanes.values())
            print(f"{done} steps in {seconds:.1f} s, {done / seconds:.0f} a second", flush=True)
            if not whole:
                return False
            for name, lane in lanes.items():
                found = self.score(lane)
                self.cells[name] = {
                    **found,
                    "parameters": size(lane.model),
                    "training_nats": round(lane.training_nats(), 4),
                    "tokens": lane.steps * cells[name].tokens,
                    "compiled": self.compile,
                    "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
                }
                print(name, json.dumps(self.cells[name]), flush=True)
                if name in keep:
                    tensors = {k: v.contiguous() for k, v in lane.model.state_dict().items() if k != "lm_head.weight"}
                    save_file(tensors, self.weights / f"{name.replace(' ', '_')}.safetensors")
                write_atomically(self.path, json.dumps(self.cells, indent=1))
        return True

    def left(self) -> float:
        return self.until - time.monotonic()


def families(study: Study, steps: int, sweep: int) -> bool:
    """Ours beside the peers, with the same optimizer and tables; then with windows of 1,024."""
    built = {family: partial(build, family) for family in FAMILIES}
    grid = {f"{f} {sweep} {rate:g} 0": Cell(built[f], sweep, 0, rate=rate) for f in FAMILIES for rate in RATES}
    if not study.measure(grid):
        return False
    best = {f: min(RATES, key=lambda r: study.cells[f"{f} {sweep} {r:g} 0"]["nats"]) for f in FAMILIES}
    print(f"best rates: {best}", flush=True)
    for length, mark in ((LENGTH, ""), (LONG, f" windows of {LONG}")):
        full = {
            f"{f} {steps} {best[f]:g} {seed}{mark}": Cell(built[f], steps, seed, rate=best[f], length=length)
            for f in FAMILIES
            for seed in SEEDS
        }
        if not study.measure(full, keep=[name for name, cell in full.items() if cell.seed == 0]):
            return False
    return True


def optimizers(study: Study, steps: int) -> bool:
    """The arms of `optimizers.py`, with its steps of 1,024 tokens."""
    cells = {
        f"{arm} / {seed}": Cell(partial(dyad, **fields), steps, seed, optimizer, 4e-3, final, tokens=1024)
        for seed in SEEDS
        for arm, (fields, optimizer, final) in ARMS.items()
    }
    return study.measure(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="compile blocks before graphs are recorded")
    parser.add_argument("--steps", type=int, default=FULL)
    parser.add_argument("--sweep-steps", type=int, default=SWEEP)
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--validation-tokens", type=int, default=VALIDATION_TOKENS)
    parser.add_argument("--study", nargs="+", choices=("families", "optimizers"), default=["families", "optimizers"])
    options = parser.parse_args()
    options.weights.mkdir(parents=True, exist_ok=True)
    study = Study(options)
    if "families" in options.study:
        families(study, options.steps, options.sweep_steps)
    if "optimizers" in options.study and study.left() > 10:
        optimizers(study, 4 * options.sweep_steps)


if __name__ == "__main__":
    main()
