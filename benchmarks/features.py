"""What a level should say: every `level_feature`, with equal parameters and the same data, order and seeds.

    python benchmarks/features.py

Shakespeare (Hamlet for validation), windows of 256 bytes. Ranks are chosen so that the number of parameters is that of
the tiny preset; differences are paired by seed.
"""

import statistics
from typing import Any

import torch

from common import Cells, arguments, dyad, require_green, size, train, validation_nats
from dyadlm import DyadConfig
from dyadlm.accounting import parameters
from dyadlm.data import resolve_data

FORMS: dict[str, dict[str, Any]] = {
    "pair": {"level_feature": "pair"},
    "transport": {"level_feature": "transport"},
    "difference": {"level_feature": "difference"},
    "centroid": {"level_feature": "centroid"},
    "transport+centroid": {"level_feature": "transport+centroid"},
    "transport+pair": {"level_feature": "transport+pair"},
    "product+pair": {"level_feature": "product+pair"},
    "transport+pair, model space": {"level_feature": "transport+pair", "transport_space": "model"},
}
SEEDS = (0, 1, 2)
BUDGET = {"tokens": 512_000, "batch_size": 4, "sequence_length": 256, "learning_rate": 4e-3}


def rank_for(form: dict[str, Any], target: int) -> int:
    """The rank whose number of parameters is nearest to the target."""
    return min(
        range(4, 97), key=lambda r: abs(parameters(DyadConfig.from_preset("tiny", level_rank=r, **form)) - target)
    )


def main() -> None:
    parser = arguments(__doc__ or "", "features.json")
    parser.add_argument("--form", action="append", choices=FORMS, help="measure these forms only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    data = resolve_data(["shakespeare"])
    cells = Cells(options.output)
    target = parameters(DyadConfig.from_preset("tiny"))
    forms = options.form or list(FORMS)
    for name in cells.missing([f"{form} / {seed}" for seed in SEEDS for form in forms]):
        form, seed = name.split(" / ")
        torch.manual_seed(int(seed))
        model = dyad(level_rank=rank_for(FORMS[form], target), **FORMS[form])
        cost = train(model, data.train[0][0], seed=int(seed), **BUDGET)
        cells.store(name, {"parameters": size(model), **validation_nats(model, data.validation[0], 256), **cost})
    for form in forms:
        differences = [cells.results[f"{form} / {s}"]["nats"] - cells.results[f"pair / {s}"]["nats"] for s in SEEDS]
        mean, spread = statistics.fmean(differences), statistics.stdev(differences)
        # Student's t with two degrees of freedom.
        print(f"{form:35s} {mean:+.4f} ± {4.303 * spread / len(SEEDS) ** 0.5:.4f} nats against pair")


if __name__ == "__main__":
    main()
