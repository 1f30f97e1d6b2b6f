"""What fingerprints and the goldfish loss do to memorisation: half a megabyte, ten times over, with planted canaries.

    python benchmarks/memorisation.py

The tiny preset on the first part of Shakespeare (Hamlet for validation), windows of 256 bytes, trained as by `dyadlm
train`. Of each arm: exposure and extraction of the canaries, the gap between training and validation text, nats of
validation (at the end, and all along of a sample), whiteout over checkpoints (1, 2, 4 … 512, then every tenth of the
run), and the steps to given losses of validation. Differences are paired by seed, which decides the weights, the order
of the text and the canaries.
"""

import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from common import Cells, arguments, require_green
from dyadlm.data import TokenStream, resolve_data
from dyadlm.data.streams import SegmentTable
from dyadlm.evaluate import evaluate
from dyadlm.evaluate.memorisation import (
    Estimate,
    forced_scores,
    generalisation_gap,
    lexicon,
    memorisation_of_run,
    whiteout,
)
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainingData, TrainSettings, train
from dyadlm.train.checkpoint import checkpoints

FINGERPRINT = ("fingerprint.shown=true",)
ARMS: dict[str, tuple[str, ...]] = {
    "none": (),
    **{
        f"fingerprint {dropout}{'' if cooldown else ', no cooldown'}": (
            *FINGERPRINT,
            f"fingerprint.dropout={dropout}",
            f"fingerprint.cooldown={cooldown}",
        )
        for dropout in (0.5, 0.75, 0.9)
        for cooldown in (0.1, 0.0)
    },
    "goldfish 4": ("train.goldfish=4",),
}
BATCH, WINDOW, LEARNING_RATE = 4, 256, 4e-3
CONTEXT = 64  # bytes of the validation text before each canary
LOSSES = (2.0, 1.8, 1.7, 1.6)
# What the arms are compared by, and in which order these are printed.
SCORES = ("exposure", "extracted", "gap", "nats", "regained")


def first_part(stream: TokenStream, size: int) -> TokenStream:
    """The first `size` tokens of a stream, with their segments."""
    table = stream.segments
    kept = int(np.searchsorted(table.starts, size))
    columns = (table.starts[:kept], table.documents[:kept], table.sections[:kept], table.kinds[:kept])
    names = (table.document_names, table.section_names, table.kind_names)
    return TokenStream(
        [stream.tokens(0, size)], partial(SegmentTable, *columns, *names), index_start=stream.index_start, name="text"
    )


def text_of(stream: TokenStream) -> bytes:
    """Its bytes; a blank for each special token."""
    tokens = stream.tokens(0, len(stream))
    return bytes(np.where(tokens < 256, tokens, ord(" ")).astype(np.uint8))


def measure(arm: str, seed: int, steps: int, canaries: int, data: TrainingData) -> dict[str, Any]:
    """Train one arm and ask it everything."""
    assignments = (
        f"max_steps={steps}",
        f"save_steps={max(1, steps // 10)}",
        "save_total_limit=null",
        "train.log_spaced_checkpoints=true",
        f"eval_steps={max(10, steps // 40)}",
        "data.validation_tokens=16384",
        f"logging_steps={max(1, steps // 40)}",
        f"per_device_train_batch_size={BATCH}",
        f"data.sequence_length={WINDOW}",
        f"data.canaries={canaries}",
        f"learning_rate={LEARNING_RATE}",
        f"seed={seed}",
        *ARMS[arm],
    )
    ((training, _),), (validation,) = data.train, data.validation
    words = lexicon(text_of(training))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings.create(
            Path(folder) / "run", preset="tiny", data=["shakespeare"], device="cpu", assignments=assignments
        )
        result = train(settings, data, Console(quiet=True))
        model = load_weights(result.output, torch.float32)
        known = memorisation_of_run(result.output, context=validation.tokens(0, CONTEXT).tolist())
        scores = []
        for checkpoint in checkpoints(result.output).values():
            earlier = load_weights(checkpoint, torch.float32)
            scores.append(forced_scores(earlier, validation, words, WINDOW, tokens=32_768))
    gap = generalisation_gap(model, training, validation, WINDOW)
    lost = whiteout(np.stack(scores))
    validated = [(line["step"], line["eval_loss"]) for line in result.metrics if "eval_loss" in line]
    return {
        "nats": round(evaluate(model, validation, data.tokenizer, window=WINDOW).nats_per_token, 4),
        "exposure": shown(known.together.exposure),
        "twin_exposure": shown(known.together.twin_exposure),
        "extracted": shown(known.together.extracted),
        "twin_extracted": shown(known.together.twin_extracted),
        "by_repetitions": {
            str(group.repetitions): {
                "exposure": shown(group.exposure),
                "extracted": shown(group.extracted),
                "nats": shown(group.nats),
            }
            for group in known.groups
        },
        "gap": {"mean": round(gap.gap, 4), "interval": gap.interval},
        "training_text_nats": shown(gap.training),
        "regained": {"mean": round(lost.regained, 4), "interval": lost.interval},
        "whiteout": asdict(lost),
        "validation": validated,
        "steps_to": {str(loss): next((step for step, nats in validated if nats <= loss), None) for loss in LOSSES},
        "steps": steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "milliseconds_per_step": round(1000 * result.seconds / steps, 2),
    }


def shown(estimate: Estimate) -> dict[str, Any]:
    return {"mean": round(estimate.mean, 4), "interval": estimate.interval, "units": estimate.units}


def main() -> None:
    parser = arguments(__doc__ or "", "memorisation.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only, beside `none`")
    parser.add_argument("--bytes", type=int, default=500_000, help="of text")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="to train on, for each arm and seed")
    parser.add_argument("--canaries", type=int, default=8, help="for each number of repetitions")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    resolved = resolve_data(["shakespeare"])
    ((stream, weight),) = resolved.train
    training = first_part(stream, options.bytes)
    data = TrainingData(resolved.tokenizer, [(training, weight)], resolved.validation, f"shakespeare {options.bytes}")
    cells = Cells(options.output)
    arms = [arm for arm in ARMS if arm == "none" or arm in (options.arm or ARMS)]
    seeds, steps = range(options.seeds), options.tokens // (BATCH * WINDOW)
    for name in cells.missing([f"{arm} / {seed}" for seed in seeds for arm in arms]):
        arm, seed = name.split(" / ")
        cells.store(name, measure(arm, int(seed), steps, options.canaries, data))
    for score in SCORES:
        for arm in arms:
            found, plain = (
                [mean(cells.results[f"{other} / {seed}"][score]) for seed in seeds] for other in (arm, "none")
            )
            less = statistics.fmean(found) - statistics.fmean(plain)
            print(f"{score:10s} {arm:30s} {statistics.fmean(found):8.4f} {less:+.4f} against none")


def mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, dict) else value)


if __name__ == "__main__":
    main()
