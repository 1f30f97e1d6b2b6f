"""Loss on the medium corpus at a fixed budget: our preset beside a Llama and a Mamba-2 of its size.

    python benchmarks/medium.py [--family dyad]

Shakespeare, the King James Bible and the State of the Union before 2000, mixed as they are large. Learning rates are
swept alike at 1M tokens; the best of each family then trains on 6M. Windows of 256 bytes, four a step.
"""

from typing import Any

import torch

from common import Cells, arguments, dyad, mamba2, matched_llama, medium_corpus, require_green, size, train

FAMILIES = {"dyad": dyad, "llama": matched_llama, "mamba2": mamba2}
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
BATCH = {"batch_size": 4, "sequence_length": 256}
SWEEP, FULL = 1_024_000, 6_000_640
VALIDATION_TOKENS = 262_144


def main() -> None:
    parser = arguments(__doc__ or "", "medium.json")
    parser.add_argument("--family", choices=FAMILIES, help="measure this family only")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the full budget")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    training, validation = medium_corpus(BATCH["sequence_length"], VALIDATION_TOKENS)
    cells = Cells(options.output)

    def measure(names: list[str]) -> None:
        for name in cells.missing(names):
            family, tokens, rate, seed = name.split()
            torch.manual_seed(int(seed))
            model = FAMILIES[family]()
            cost = train(model, training, tokens=int(tokens), learning_rate=float(rate), seed=int(seed), **BATCH)
            cells.store(name, {"parameters": size(model), **score(model), **cost})

    def score(model: Any) -> dict[str, float]:
        model.eval()
        nats, tokens, _ = validation.measure(model, 0, 1, 16).sum(0).tolist()
        return {"nats": round(nats / tokens, 4), "validation_tokens": int(tokens)}

    for family in [options.family] if options.family else FAMILIES:
        measure([f"{family} {SWEEP} {rate:g} 0" for rate in LEARNING_RATES])
        best = min(LEARNING_RATES, key=lambda rate: cells.results[f"{family} {SWEEP} {rate:g} 0"]["nats"])
        measure([f"{family} {FULL} {best:g} {seed}" for seed in range(options.seeds)])
        for seed in range(options.seeds):
            print(f"{family}: {cells.results[f'{family} {FULL} {best:g} {seed}']['nats']:.4f} nats at {best:g}")


if __name__ == "__main__":
    main()
