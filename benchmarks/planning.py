"""Planning: does a model that forecasts, proposes and lets an artist choose find a way that only its end tells?

    python benchmarks/planning.py [--task path-star] [--arm "planner, teacher" ...] [--rates 1e-3 3e-3] [--minutes 4]

The path-star graph and copying with lookahead (`dyadlm.recall`), of three sizes each in turn: ours without a planner,
with one, with one taught by the true future, and a Llama. All have 3 layers of width 64, one more than for recall:
slots have to hold what a block made of several tokens, and what they say has to reach the next token. All steps of a
way are taught (`ask=all`); the figure to read is that of the first (`ask=first`), chance 1 / degree or 1 / strings. A
model with a planner is asked twice: its engineer alone, and by consensus; one whose artist has a learned weight once
more, by the product. A cell takes at most --minutes of the
training thread's own time.
"""

import statistics
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from common import Cells, arguments, require_green, size
from dyadlm import DyadForCausalLM
from dyadlm.recall import Reader, Recipe, build_model, parse_task, score, train
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions

TASKS = {
    "path-star": ("length=13,path=3,nodes=12", "length=18,path=4,nodes=12", "length=23,path=5,nodes=12"),
    "lookahead": (
        "length=12,strings=2,tokens=3,symbols=12",
        "length=15,strings=2,tokens=4,symbols=12",
        "length=27,strings=4,tokens=4,symbols=12",
    ),
}
LAYERS = {"num_hidden_layers": 3}
# Slots of the second block hold what the first made of a token and those before it; the third tells it on.
OURS = {**LAYERS, "num_levels": 5, "salience": False, "slot_layers": [0, 1]}
PLANNER = {**OURS, "planner": "head", "planner_width": 16}
# By arm: the model, its fields, and what its planner is taught.
ARMS: dict[str, tuple[str, dict[str, Any], PlannerOptions | None]] = {
    "no planner": ("tiny", OURS, None),
    "planner": ("tiny", PLANNER, PlannerOptions()),
    "planner, teacher": ("tiny", PLANNER, PlannerOptions(teacher=0.2)),
    "planner, learned weight": ("tiny", PLANNER | {"pool": "learned"}, PlannerOptions()),
    "llama": ("llama", LAYERS, None),
}
RATES = (1e-3, 3e-3)
CONSENSUS = 0.9


def right(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Of each part, how many of the first steps are right, and how many of all."""
    reader = Reader(model)
    return {
        str(task): {
            ask: score(reader, parse_task(recipe.task, f"{task},ask={ask}"), recipe) for ask in ("first", "all")
        }
        for task in recipe.trained
    }


def measure(arm: str, recipe: Recipe, rate: float, seed: int) -> dict[str, Any]:
    """Train one arm and ask it; with a planner, its engineer alone and by consensus."""
    name, fields, lessons = ARMS[arm]
    tasks = recipe.trained
    model = build_model(name, tasks[0].vocabulary, max(task.length for task in tasks), fields, seed)
    if lessons is not None:
        assert isinstance(model, DyadForCausalLM)
        model.accompany("planner", PlannerLessons(model, lessons))
    found = {
        "parameters": size(model),
        **train(Reader(model), recipe, rate, seed),
        "alone": right(model, recipe),
    }
    if lessons is not None:
        model.config.consensus = CONSENSUS
        found["consensus"] = {"mass": CONSENSUS, **right(model, recipe)}
        if model.planner.belief is not None:  # the same weights, the artist believed as far as the engineer
            model.planner.belief = None
            found["product"] = {"mass": CONSENSUS, **right(model, recipe)}
    return found


def main() -> None:
    parser = arguments(__doc__ or "", "planning.json")
    parser.add_argument("--task", action="append", choices=TASKS, help="measure these tasks only")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    require_green()
    cells = Cells(options.output)
    todo = {
        f"{task} / {arm} / {options.minutes:g} min x {options.batch_size} / {rate:g} / {seed}": (task, arm, rate, seed)
        for task in options.task or TASKS
        for seed in range(options.seeds)
        for rate in options.rates
        for arm in options.arm or ARMS
    }
    for name in cells.missing(list(todo)):
        task, arm, rate, seed = todo[name]
        recipe = Recipe(task, TASKS[task], batch_size=options.batch_size, minutes=options.minutes)
        cells.store(name, measure(arm, recipe, rate, seed))
    for task, arm, rate in dict.fromkeys(key[:3] for key in todo.values()):
        seeds = [cells.results[name] for name, key in todo.items() if key[:3] == (task, arm, rate)]
        for way in ("alone", "consensus", "product"):
            if way in seeds[0]:
                shares = [
                    [found[way][part]["first"]["accuracy"] for found in seeds] for part in seeds[0]["running_accuracy"]
                ]
                print(f"{task:10s} {arm:18s} {way:10s} {rate:g}", *(f"{statistics.fmean(each):.3f}" for each in shares))


if __name__ == "__main__":
    main()
