"""Mixers beside levels and slots (`dyadlm.model.extras`), each against a model without: short convolutions,
a memory under the gated delta rule, and outer products in windows.

    python benchmarks/mixers.py [--arm ARM] [--rehearse]

The medium corpus (Shakespeare, the King James Bible, the State of the Union before 2000), 1.024M tokens in windows of
256 bytes, four a step, Muon with n-grams of 2, 3, 4 and 6 bytes at 8e-3, three seeds. Each model is scored in fresh
windows of 256, and at the same positions with 1,024 bytes of context before them. Differences are paired by seed. The
time of a step forward and back is the thread's own, of untrained models that take turns.
"""

import statistics
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from common import Cells, arguments, dyad, medium_corpus, require_green, size, step_times, train
from dyadlm.data import TrainingWindows
from optimizers import BATCH, CONTEXT, NGRAMS, SCORES, SEEDS, TOKENS, VALIDATION_TOKENS, after_context, score

LEARNING_RATE = 8e-3
ARMS: dict[str, list[str]] = {
    "baseline": [],
    "convolution": ["convolution"],
    "gated delta": ["delta"],
    "outer products": ["outer"],
}
TIMES = "time of a step"


def model_of(arm: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return dyad(**NGRAMS, mixers=ARMS[arm])


def main() -> None:
    parser = arguments(__doc__ or "", "mixers.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only, beside `baseline`")
    parser.add_argument("--rehearse", action="store_true", help="two steps of each arm, kept in a file beside")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = [arm for arm in ARMS if arm == "baseline" or arm in (options.arm or ARMS)]
    seeds, tokens, scored, rounds = SEEDS, TOKENS, VALIDATION_TOKENS, 7
    if options.rehearse:
        seeds, tokens, scored, rounds = SEEDS[:2], 2048, 4096, 1
        options.output = options.output.with_suffix(".rehearsal.json")
    else:
        require_green()
    training, fresh = medium_corpus(BATCH["sequence_length"], scored)
    late = after_context(fresh, CONTEXT)
    cells = Cells(options.output)
    for name in cells.missing([f"{arm} / {seed}" for seed in seeds for arm in arms]):
        arm, seed = name.split(" / ")
        model, begun = model_of(arm, int(seed)), time.thread_time()
        cost = train(
            model, training, tokens=tokens, learning_rate=LEARNING_RATE, seed=int(seed), optimizer="muon", **BATCH
        )
        own = {"thread_milliseconds_per_step": round(1000 * (time.thread_time() - begun) / cost["steps"], 2)}
        found = {"nats": score(model, fresh), "nats_after_context": score(model, late)}
        cells.store(name, {"parameters": size(model), **found, **cost, **own})
    for name in cells.missing([f"{TIMES}, {', '.join(arms)}"]):
        windows = TrainingWindows(training, BATCH["sequence_length"], BATCH["batch_size"], seed=0)
        batch = next(iter(DataLoader(windows, BATCH["batch_size"])))
        cells.store(name, step_times({arm: (model_of(arm), batch) for arm in arms}, rounds))
    for kind in SCORES:
        for arm in arms:
            pairs = [(cells.results[f"{arm} / {s}"], cells.results[f"baseline / {s}"]) for s in seeds]
            differences = [one[kind] - other[kind] for one, other in pairs]
            mean, spread = statistics.fmean(differences), statistics.stdev(differences)
            # Student's t with two degrees of freedom.
            print(f"{kind:20s} {arm:16s} {mean:+.4f} ± {4.303 * spread / len(seeds) ** 0.5:.4f} nats against baseline")


if __name__ == "__main__":
    main()
