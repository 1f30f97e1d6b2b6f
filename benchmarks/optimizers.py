"""Muon against AdamW, with and without n-gram identity, and learning rates that end at a tenth or at zero.

    python benchmarks/optimizers.py [--arm ARM]

The medium corpus (Shakespeare, the King James Bible, the State of the Union before 2000), 1.024M tokens in windows of
256 bytes, four a step, learning rate 4e-3, three seeds. Each model is scored in fresh windows of 256, and at the same
positions with 1,024 bytes of context before them. Differences are paired by seed.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from common import Cells, arguments, dyad, medium_corpus, require_green, size, train
from dyadlm.train.validation import ValidationSample

NGRAMS = {"ngram_sizes": [2, 3, 4, 6]}
# Fields of the model, optimizer, and where the learning rate ends.
ARMS: dict[str, tuple[dict[str, Any], str, float]] = {
    "adamw": ({}, "adamw", 0.1),
    "muon": ({}, "muon", 0.1),
    "adamw, n-grams": (NGRAMS, "adamw", 0.1),
    "muon, n-grams": (NGRAMS, "muon", 0.1),
    "adamw, to zero": ({}, "adamw", 0.0),
    "muon, n-grams, to zero": (NGRAMS, "muon", 0.0),
    "muon, n-grams and word": ({"ngram_sizes": [2, 3, 4, 6, "word"]}, "muon", 0.1),
}
SEEDS = (0, 1, 2)
BATCH = {"batch_size": 4, "sequence_length": 256}
TOKENS, LEARNING_RATE = 1_024_000, 4e-3
VALIDATION_TOKENS, CONTEXT = 262_144, 1024
SCORES = ("nats", "nats_after_context")


def after_context(sample: ValidationSample, tokens: int) -> ValidationSample:
    """The same targets, each window with so many tokens before it, or as many as there are."""
    parts = [
        (stream, [replace(w, start=max(w.start - tokens, -1), opening=w.start < tokens) for w in windows])
        for stream, windows in sample.parts
    ]
    return replace(sample, parts=parts)


def score(model: Any, sample: ValidationSample) -> float:
    nats, tokens, _ = sample.measure(model.eval(), 0, 1, 16).sum(0).tolist()
    return round(nats / tokens, 4)


def main() -> None:
    parser = arguments(__doc__ or "", "optimizers.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only, beside `adamw`")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    training, fresh = medium_corpus(BATCH["sequence_length"], VALIDATION_TOKENS)
    late = after_context(fresh, CONTEXT)
    cells = Cells(options.output)
    arms = [arm for arm in ARMS if arm == "adamw" or arm in (options.arm or ARMS)]
    for name in cells.missing([f"{arm} / {seed}" for seed in SEEDS for arm in arms]):
        arm, seed = name.split(" / ")
        fields, optimizer, final = ARMS[arm]
        torch.manual_seed(int(seed))
        model = dyad(**fields)
        begun = time.thread_time()
        cost = train(
            model, training, tokens=TOKENS, learning_rate=LEARNING_RATE, seed=int(seed), optimizer=optimizer,
            final_learning_rate=final, **BATCH,
        )  # fmt: skip
        own = {"thread_milliseconds_per_step": round(1000 * (time.thread_time() - begun) / cost["steps"], 2)}
        found = {"nats": score(model, fresh), "nats_after_context": score(model, late)}
        cells.store(name, {"parameters": size(model), **found, **cost, **own})
    for kind in SCORES:
        for arm in arms:
            differences = [cells.results[f"{arm} / {s}"][kind] - cells.results[f"adamw / {s}"][kind] for s in SEEDS]
            mean, spread = statistics.fmean(differences), statistics.stdev(differences)
            # Student's t with two degrees of freedom.
            print(f"{kind:20s} {arm:24s} {mean:+.4f} ± {4.303 * spread / len(SEEDS) ** 0.5:.4f} nats against adamw")


if __name__ == "__main__":
    main()
