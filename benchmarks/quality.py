"""Loss on one text at a fixed budget: the tiny preset beside a Llama of its size, learning rates swept alike.

    python benchmarks/quality.py --text tinyshakespeare.txt

Windows of 256 bytes, at most 1.54M training tokens, whole validation split, three seeds at each family's best rate.
AdamW, and Muon with hashed n-grams of 2, 3, 4 and 6 bytes, the same tables for both.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from common import (
    Cells,
    arguments,
    dyad,
    matched_llama,
    median_and_spread,
    require_green,
    size,
    split_text,
    train,
    validation_nats,
)
from dyadlm.peer_ngrams import add_ngrams

NGRAMS = (2, 3, 4, 6)


def llama_with_ngrams() -> PreTrainedModel:
    model = matched_llama()
    add_ngrams(model, NGRAMS)
    return model


def sweep(loss: Callable[[float], float]) -> float:
    """The best rate: halved or doubled from the first two, until the loss rises on both sides."""
    found = {rate: loss(rate) for rate in FIRST_RATES}
    while (best := min(found, key=lambda rate: found[rate])) in (min(found), max(found)):
        near = best / 2 if best == min(found) else 2 * best
        found[near] = loss(near)
    return best


# Models, and the optimizer of each.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "dyad": (dyad, "adamw"),
    "llama": (matched_llama, "adamw"),
    "dyad-muon": (dyad, "muon"),
    "dyad-muon-ngrams": (lambda: dyad(ngram_sizes=list(NGRAMS)), "muon"),
    "dyad-muon-ngrams-dropout": (lambda: dyad(ngram_sizes=list(NGRAMS), dropout=0.1), "muon"),
    "llama-muon-ngrams": (llama_with_ngrams, "muon"),
}
FIRST_RATES = (1e-3, 2e-3)
SEEDS = (0, 1, 2)
BUDGET = {"tokens": 1_536_000, "batch_size": 4, "sequence_length": 256}


def main() -> None:
    parser = arguments(__doc__ or "", "quality.json", text=True)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="measure this family only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    training, validation = split_text(options.text)
    cells = Cells(options.output)

    def measure(names: list[str]) -> None:
        for name in cells.missing(names):
            family, rate, seed = name.split()
            torch.manual_seed(int(seed))
            make, optimizer = FAMILIES[family]
            model = make()
            cost = train(model, training, learning_rate=float(rate), seed=int(seed), optimizer=optimizer, **BUDGET)
            cells.store(name, {"parameters": size(model), **validation_nats(model, validation, 256), **cost})

    def measured(name: str) -> float:
        measure([name])
        nats: float = cells.results[name]["nats"]
        return nats

    for family in options.family or FAMILIES:
        best = sweep(lambda rate, family=family: measured(f"{family} {rate:g} 0"))
        measure([f"{family} {best:g} {seed}" for seed in SEEDS])
        nats = [cells.results[f"{family} {best:g} {seed}"]["nats"] for seed in SEEDS]
        print(f"{family}: {median_and_spread(nats)} nats at {best:g}")


if __name__ == "__main__":
    main()
