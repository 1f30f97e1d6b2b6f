"""One mechanism at a time: selectors, slots, semantic levels, far geometric levels, salience, at equal parameters.

    python benchmarks/composition.py [--arm "topk" ...] [--tokens 1536000] [--seeds 1]
    python benchmarks/composition.py --times    # what a step of each takes, in turns

Shakespeare's plays (Hamlet for validation), windows of 256 bytes, four a step, three paired seeds. Every arm is the
tiny preset with some fields changed; its ranks are chosen so that it has the preset's number of parameters. For arms
that select: the entropy of the routes over log K, how many levels weigh more than zero, and how long a choice lasts.
No byte of the training text comes twice, so the loss of the last training steps (`training_nats`) is one of fresh text,
the same for all arms of a seed: it tells small differences better than one play does (gumbel samples its routes then).
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from common import Cells, arguments, dyad, require_green, size, step_times, train, validation_nats
from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data import TokenStream, resolve_data
from dyadlm.ops.pyramid import make_clock
from dyadlm.ops.selection import chosen_count, entropy, mean_run_length

# The preset is the composition; each arm changes one thing about it.
ARMS: dict[str, dict[str, Any]] = {
    "composed": {},
    # Many small heads choose better than few large ones.
    "dense": {"selector": "dense", "selector_heads": 32},
    "topk": {"selector": "topk", "selector_heads": 32},
    "entmax": {"selector": "entmax", "selector_heads": 32},
    "without slots": {"slot_contexts": []},
    "without semantic levels": {"semantic_levels": [], "num_levels": 8},
    "with far levels": {"num_levels": 8},
    "without salience": {"salience": False},
    "gumbel": {"selector": "gumbel", "selector_heads": 32},
    "topk, balance 1e-3": {"selector": "topk", "selector_heads": 32, "selector_balance": 1e-3},
    "dense, 4 heads": {"selector": "dense", "selector_heads": 4},
    "topk, margin 0.5": {"selector": "topk", "selector_heads": 32, "selector_margin": 0.5},
    "topk, decision slots": {"selector": "topk", "selector_heads": 32, "decision_slots": True},
    "slots, lru": {"slot_evict": "lru"},
    "slots, gate": {"slot_gate": True},
    "slots, learned code too": {"slot_contexts": [2, 3, 4, 6, 8, "word", "code"]},
    "forgetting": {"forgetting": True},
    "learned boundary for the line": {"semantic_levels": ["syllable", "word", "sentence", "learned"]},
    "paragraph too": {"semantic_levels": ["syllable", "word", "sentence", "line", "paragraph"]},
    "one tower from the input": {"tower": "input"},
    "foundation": {"slot_contexts": [], "semantic_levels": [], "num_levels": 8, "salience": False},
}
SEEDS = (0, 1, 2)
BATCH = {"batch_size": 4, "sequence_length": 256}
STUDENT = 4.303  # t of two degrees of freedom, 95 %


def built(fields: dict[str, Any], rank: int) -> DyadForCausalLM:
    return dyad(**{**fields, "level_rank": rank})


def rank_for(fields: dict[str, Any], target: int) -> int:
    """The rank whose number of parameters is nearest to the target."""
    low, high = 1, 128
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(built(fields, middle)) <= target else (low, middle)
    return min((low, high), key=lambda rank: abs(size(built(fields, rank)) - target))


@torch.no_grad()
def routes_of(model: DyadForCausalLM, stream: TokenStream, windows: int = 32, length: int = 256) -> dict[str, float]:
    """Measures of the routes on windows from the beginning of the stream; nothing if the model does not select."""
    ids = torch.from_numpy(stream.tokens(0, windows * length).astype("int64")).view(windows, length)
    routes = model.eval()(input_ids=ids, output_routes=True, use_cache=False).routes
    if routes is None:
        return {}
    clock = make_clock(windows, length)
    return {
        "commitment": round(statistics.fmean(entropy(route).mean().item() for route in routes), 4),
        "levels_chosen": round(statistics.fmean(chosen_count(route).float().mean().item() for route in routes), 3),
        "mean_run_tokens": round(statistics.fmean(mean_run_length(route, clock) for route in routes), 3),
    }


def paired(pairs: Sequence[tuple[float, float]]) -> str:
    """The mean difference, with its 95 % interval if there are all seeds."""
    differences = [one - other for one, other in pairs]
    if len(differences) < len(SEEDS):
        return " ".join(f"{difference:+.4f}" for difference in differences) or "–"
    spread = STUDENT * statistics.stdev(differences) / len(SEEDS) ** 0.5
    return f"{statistics.fmean(differences):+.4f} ± {spread:.4f}"


def main() -> None:
    parser = arguments(__doc__ or "", "composition.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only")
    parser.add_argument("--tokens", type=int, default=1_536_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--times", action="store_true", help="measure what a step takes instead, all arms in turns")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    data = resolve_data(["shakespeare"])
    cells = Cells(options.output)
    target = size(DyadForCausalLM(DyadConfig.from_preset("tiny")))
    arms = options.arm or list(ARMS)

    def name(arm: str, seed: int) -> str:
        return f"{arm} / {options.tokens} / {options.learning_rate:g} / {seed}"

    if options.times:
        ids = torch.randint(0, 256, (BATCH["batch_size"], BATCH["sequence_length"]))
        batch = {"input_ids": ids, "labels": ids}
        built_arms = {arm: (built(ARMS[arm], rank_for(ARMS[arm], target)), batch) for arm in arms}
        cells.store("milliseconds", step_times(built_arms))
        return
    for cell in cells.missing([name(arm, seed) for seed in SEEDS[: options.seeds] for arm in arms]):
        arm, _, _, seed = cell.split(" / ")
        torch.manual_seed(int(seed))
        rank = rank_for(ARMS[arm], target)
        torch.manual_seed(int(seed))
        model = built(ARMS[arm], rank)
        cost = train(
            model,
            data.train[0][0],
            tokens=options.tokens,
            learning_rate=options.learning_rate,
            seed=int(seed),
            **BATCH,
        )
        loss = validation_nats(model, data.validation[0], 256)
        routes = routes_of(model, data.validation[0])
        cells.store(cell, {"parameters": size(model), "level_rank": rank, **loss, **routes, **cost})
    for arm in arms:
        for other in ("composed", "dense"):
            pairs = [(cells.results.get(name(arm, seed)), cells.results.get(name(other, seed))) for seed in SEEDS]
            told = [paired([(a[score], b[score]) for a, b in pairs if a and b]) for score in ("nats", "training_nats")]
            print(f"{arm:30s} {told[0]} nats of Hamlet, {told[1]} of fresh text, against {other}")


if __name__ == "__main__":
    main()
