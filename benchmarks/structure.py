"""Training-time structure: what twin, fingerprints and planner do to the loss, the text and the time of a step.

    python benchmarks/structure.py [--arm "twin joint" ...] [--corpus shakespeare] [--tokens 1536000]
    python benchmarks/structure.py --times     # what a step of each takes, in turns

`dyadlm train` on Shakespeare's plays (Hamlet for validation), windows of 256 bytes, four a step, three seeds paired by
first weights and order of text. Every arm has as many parameters at inference as the preset: one with a planner has
narrower bottlenecks. Of each: validation nats; nats of fresh text, the windows that would have been trained on next,
which tell small differences better than one play does; the share of repeated 4-grams in greedy text; milliseconds a
step; and how well word and sentence identity can be read off the levels (`dyadlm.evaluate.level_probe`). A planner's
model is scored twice: by its engineer alone and by consensus.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from transformers import PreTrainedModel

from common import Cells, arguments, dyad, require_green, size, step_times, validation_nats
from dyadlm import DyadForCausalLM
from dyadlm.data import TokenStream, TrainingWindows, byte_tokenizer, resolve_data
from dyadlm.data.encoding import decode_bytes
from dyadlm.evaluate.level_probe import probe_levels
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainSettings, train
from dyadlm.train.prepared_run import prepare_run

PLANNER = {"planner": "head", "planner_width": 16}
FINGERPRINT = ("fingerprint.shown=true",)
# What a planner's parameters are paid with, but no planner; smaller than the others.
NARROW = "baseline, a planner's rank"
# By arm: fields of the model, and what training is told beside them.
ARMS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "baseline": ({}, ()),
    NARROW: ({}, ()),
    "twin joint": ({}, ("twin.conditioning=joint",)),
    "twin reverse": ({}, ("twin.conditioning=reverse",)),
    "twin detached": ({}, ("twin.conditioning=detached",)),
    "planner": (PLANNER, ()),
    "planner, teacher": (PLANNER, ("planner.teacher=0.2",)),
    "fingerprint": ({}, FINGERPRINT),
    "all": (PLANNER, ("twin.conditioning=joint", "planner.teacher=0.2", *FINGERPRINT)),
    "twin joint, weight 0.3": ({}, ("twin.conditioning=joint", "twin.weight=0.3")),
    "planner, stack": (PLANNER | {"planner": "stack"}, ()),
    "planner, four futures": (PLANNER | {"planner_futures": 4}, ()),
    "planner, artist sees both": (PLANNER | {"artist_sees": "both"}, ()),
}
SEEDS = (0, 1, 2)
CONSENSUS = 0.9
PROBED_TOKENS = 2**17
FRESH_WINDOWS = 1024
PROMPTS, PROMPT, WRITTEN = 32, 64, 256
LOGGED = ("twin_loss", "proposal_loss", "artist_loss", "teacher_loss", "fingerprint_shown")  # the last of each
STUDENT = 4.303  # t of two degrees of freedom, 95 %


def rank_for(fields: dict[str, Any], target: int) -> int:
    """The rank whose number of parameters is nearest to the target."""
    return min(range(1, 64), key=lambda rank: abs(size(dyad(**fields, level_rank=rank)) - target))


@torch.no_grad()
def repeated_fours(model: DyadForCausalLM, stream: TokenStream) -> float:
    """seq-rep-4 (Welleck et al. 2020, arXiv 1908.04319): 1 less distinct 4-grams of greedy continuations over all."""
    every = len(stream) // PROMPTS
    rows = np.stack([stream.tokens(place * every, place * every + PROMPT) for place in range(PROMPTS)])
    prompts = torch.from_numpy(rows.astype(np.int64))
    written = model.eval().generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
    )[:, PROMPT:]
    shares = []
    for row in written.numpy():
        fours = np.lib.stride_tricks.sliding_window_view(row, 4)
        shares.append(1 - len(np.unique(fours, axis=0)) / len(fours))
    return statistics.fmean(shares)


def probed(model: DyadForCausalLM, stream: TokenStream) -> dict[str, Any]:
    """Of words and of sentences: the mean accuracy over all levels, chance, and that of the levels each."""
    content = decode_bytes(stream.tokens(0, min(len(stream), PROBED_TOKENS)))
    result = probe_levels(model, byte_tokenizer(), content)
    return {
        name: {
            "mean": round(scores.mean(), 4),
            "chance": round(scores.chance, 4),
            "shuffled": round(statistics.fmean(score.shuffled for score in scores.levels), 4),
            "tested": scores.tested,
            "levels": {f"{score.block}/{score.level}": round(score.accuracy, 4) for score in scores.levels},
        }
        for name, scores in (("word", result.word), ("sentence", result.sentence))
    }


@torch.no_grad()
def fresh_nats(model: DyadForCausalLM, fresh: Dataset[dict[str, torch.Tensor]]) -> float:
    """Per byte of windows never trained on, each with a fresh state."""
    model.eval()
    losses = [
        model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.item()
        for batch in DataLoader(fresh, 16)
    ]
    return statistics.fmean(losses)


def scored(
    model: DyadForCausalLM, streams: Sequence[TokenStream], fresh: Dataset[dict[str, torch.Tensor]]
) -> dict[str, float]:
    every = sum(map(len, streams))
    return {
        "nats": round(sum(validation_nats(model, each, 256)["nats"] * len(each) for each in streams) / every, 4),
        "fresh_nats": round(fresh_nats(model, fresh), 4),
        "seq_rep_4": round(repeated_fours(model, streams[0]), 4),
    }


def settings_of(
    arm: str, seed: int, tokens: int, learning_rate: float, target: int, sources: Sequence[str], output: Path
) -> TrainSettings:
    """target: how many parameters the model has for inference, or nearly so."""
    fields, told = ARMS[arm]
    rank = rank_for(PLANNER if arm == NARROW else fields, target)
    assignments = (
        f"max_steps={tokens // 1024}",
        f"seed={seed}",
        f"learning_rate={learning_rate}",
        "eval_steps=0",
        f"model.level_rank={rank}",
        *(f"model.{name}={value}" for name, value in fields.items()),
        *told,
    )
    return TrainSettings.create(output, preset="tiny", data=sources, device="cpu", assignments=assignments)


def ready(arm: str, target: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model with all that trains beside it, and a batch of four windows as its training reads them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arm, 0, 4096, 2e-3, target, ["shakespeare"], Path(folder) / "run")
        plan = prepare_run(settings, None, settings.output)
    return plan.model, default_collate([plan.windows[number] for number in range(4)])


def measure(arm: str, seed: int, corpus: str, tokens: int, learning_rate: float, target: int) -> dict[str, Any]:
    """Train one arm and ask it everything."""
    data = resolve_data(corpus.split(","))
    sources = [f"{name}:{len(stream)}" for name, (stream, _) in zip(corpus.split(","), data.train, strict=True)]
    data = resolve_data(sources)  # mixed by size
    seen = 4 * (tokens // 1024)
    order = TrainingWindows(data.train, 256, seen + FRESH_WINDOWS, seed=seed)  # begins with what is trained on
    fresh = Subset(order, range(seen, seen + FRESH_WINDOWS))
    assert (seen + FRESH_WINDOWS) * 256 < sum(len(each) for each, _ in data.train), "no text is left that is fresh"
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arm, seed, tokens, learning_rate, target, sources, Path(folder) / "run")
        result = train(settings, console=Console(quiet=True))
        model = load_weights(result.output, torch.float32)
        assert isinstance(model, DyadForCausalLM)
    found = {
        "parameters": size(model),
        "level_rank": model.config.level_rank,
        **scored(model, data.validation, fresh),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "milliseconds_per_step": round(1000 * result.seconds / result.steps, 2),
        "logged": {name: value for line in result.metrics for name, value in line.items() if name.endswith(LOGGED)},
        "skill": {
            name: round(value, 4)
            for line in result.metrics
            for name, value in line.items()
            if name.startswith("skill_")
        },
        "probe": probed(model, data.validation[0]),
    }
    if model.planner is not None:
        model.config.consensus = CONSENSUS
        found["consensus"] = {"mass": CONSENSUS, **scored(model, data.validation, fresh)}
    return found


def main() -> None:
    parser = arguments(__doc__ or "", "structure.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only, beside the baseline")
    parser.add_argument("--corpus", default="shakespeare", help="one, or several with commas, mixed by size")
    parser.add_argument("--tokens", type=int, default=1_536_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--times", action="store_true", help="measure what a step takes instead, all arms in turns")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    cells = Cells(options.output)
    target = size(dyad())
    arms = [arm for arm in ARMS if arm == "baseline" or arm in (options.arm or ARMS)]

    if options.times:
        cells.store("milliseconds", step_times({arm: ready(arm, target) for arm in arms}))
        return

    def name(arm: str, seed: int) -> str:
        return f"{arm} / {options.corpus} / {options.tokens} / {options.learning_rate:g} / {seed}"

    todo = {name(arm, seed): (arm, seed) for seed in range(options.seeds) for arm in arms}
    for cell in cells.missing(list(todo)):
        arm, seed = todo[cell]
        cells.store(cell, measure(arm, seed, options.corpus, options.tokens, options.learning_rate, target))
    for arm in arms:
        told = []
        for score in ("nats", "fresh_nats"):
            differences = [
                cells.results[name(arm, seed)][score] - cells.results[name("baseline", seed)][score]
                for seed in range(options.seeds)
            ]
            spread = ""
            if len(differences) == len(SEEDS):
                spread = f" ± {STUDENT * statistics.stdev(differences) / len(SEEDS) ** 0.5:.4f}"
            told.append(f"{statistics.fmean(differences):+.4f}{spread}")
        print(f"{arm:30s} {told[0]} nats of validation, {told[1]} of fresh text, against the baseline")


if __name__ == "__main__":
    main()
