"""Does the best learning rate of `tiny` hold for wider models, as it is or scaled by the width (muP)?

    python benchmarks/transfer.py [--optimizer muon] [--width 512]

Models of `tiny`'s depth at widths of 64 to 512 (ranks and feed-forward widths in proportion), 400 steps of four windows
of 128 bytes of the medium corpus, one seed, rates in steps of two, and more while the best is at an end. "plain": one
rate for all weights. "scaled": `train.base_width` is 128. The best rate is where a parabola through the best cell and
its neighbours is lowest; beside it is what a width loses, in nats, at the best rate of 128. Where both
ways exist, each is trained at its best rate from three seeds.
"""

import math
import statistics
from typing import Any

import torch

from common import Cells, arguments, dyad, medium_corpus, require_green, size, train
from optimizers import score

BASE, BASE_RANK = 128, 22
WIDTHS = (64, 128, 256, 512)
RATES = {"muon": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
BATCH = {"batch_size": 4, "sequence_length": 128}
TOKENS, VALIDATION_TOKENS = 204_800, 131_072
SEEDS = 3


def model_of(width: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return dyad(hidden_size=width, level_rank=BASE_RANK * width // BASE)


def ways_of(width: int) -> tuple[str, ...]:
    """At the base width both ways are the same. Below it nothing is scaled."""
    return ("plain",) if width <= BASE else ("plain", "scaled")


def best(losses: dict[float, float]) -> tuple[float, bool]:
    """The rate at which a parabola in log2 of the rate is lowest, and whether the best cell is inside of the sweep."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1):
        return rates[at], False
    left, middle, right = (losses[rates[i]] for i in (at - 1, at, at + 1))
    return rates[at] * 2 ** ((left - right) / (2 * (left - 2 * middle + right))), True


def at_rate(losses: dict[float, float], rate: float) -> float:
    """The loss at a rate between two of the sweep, on a line in log2 of the rate."""
    rates = sorted(losses)
    rate = min(max(rate, rates[0]), rates[-1])
    high = next(i for i, each in enumerate(rates) if each >= rate)
    if rates[high] == rate:
        return losses[rate]
    part = math.log2(rate / rates[high - 1]) / math.log2(rates[high] / rates[high - 1])
    return losses[rates[high - 1]] * (1 - part) + losses[rates[high]] * part


def main() -> None:
    parser = arguments(__doc__ or "", "transfer.json")
    parser.add_argument("--optimizer", action="append", choices=list(RATES))
    parser.add_argument("--width", type=int, action="append", choices=WIDTHS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    training, fresh = medium_corpus(BATCH["sequence_length"], VALIDATION_TOKENS)
    cells = Cells(options.output)

    def measured(name: str, optimizer: str, width: int, way: str, rate: float, seed: int) -> float:
        """Nats of a cell, which is trained where it is missing."""
        for _ in cells.missing([name]):
            model = model_of(width, seed)
            cost = train(
                model, training, tokens=TOKENS, learning_rate=rate, seed=seed, optimizer=optimizer,
                final_learning_rate=0.0, base_width=BASE if way == "scaled" else 0, **BATCH,
            )  # fmt: skip
            cells.store(name, {"parameters": size(model), "nats": score(model, fresh), **cost})
        return float(cells.results[name]["nats"])

    def losses_of(optimizer: str, width: int, way: str) -> dict[float, float]:
        """By rate."""
        rates = list(RATES[optimizer])
        while True:
            losses = {
                rate: measured(f"{optimizer} / {width} / {way} / {rate:g}", optimizer, width, way, rate, 0)
                for rate in rates
            }
            if best(losses)[1]:
                return losses
            rates.append(min(rates) / 2 if min(losses, key=losses.__getitem__) == min(rates) else 2 * max(rates))

    def paired(optimizer: str, width: int, rates: dict[str, float]) -> None:
        """Both ways at their best rates, from three seeds."""
        differences = []
        for seed in range(SEEDS):
            plain, scaled = (
                measured(f"{optimizer} / {width} / {way} / best / {seed}", optimizer, width, way, rates[way], seed)
                for way in ("plain", "scaled")
            )
            differences.append(plain - scaled)
        spread = statistics.stdev(differences) / math.sqrt(SEEDS)
        print(f"{optimizer} {width}: plain - scaled {statistics.mean(differences):+.4f} (standard error {spread:.4f})")

    for optimizer in options.optimizer or RATES:
        base = best(losses_of(optimizer, BASE, "plain"))[0]
        for width in options.width or WIDTHS:
            rates = {}
            for way in ways_of(width):
                losses = losses_of(optimizer, width, way)
                lowest, rates[way] = min(losses.values()), best(losses)[0]
                print(
                    f"{optimizer} {width} {way}: best rate {rates[way]:.2g}, {lowest:.4f} nats; at the rate of "
                    f"{BASE}: +{at_rate(losses, base) - lowest:.4f}"
                )
            if len(rates) == 2:
                paired(optimizer, width, rates)


if __name__ == "__main__":
    main()
