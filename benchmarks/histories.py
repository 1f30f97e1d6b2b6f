"""Histories of unequal length: training with a carried state and with weights by history, against equal weighting.

    python benchmarks/histories.py

The tiny preset on Shakespeare (Hamlet for validation), windows of 256 bytes, trained as by `dyadlm train`. Each arm is
scored with fresh windows of 256, as everywhere, and with the state carried over the whole validation text. Differences
are paired by seed, which decides the weights at the start; the order of the text is another one where state is carried.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common import Cells, arguments, require_green, size
from dyadlm.data import resolve_data
from dyadlm.evaluate import evaluate
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainingData, TrainSettings, train

ARMS: dict[str, tuple[str, ...]] = {
    "equal": (),
    "carried": ("train.carry_state=true",),
    "weighted": ("train.history_weight=0.5",),
    "carried, weighted": ("train.carry_state=true", "train.history_weight=0.5"),
}
SEEDS = (0, 1, 2)
BATCH, WINDOW, LEARNING_RATE = 4, 256, 4e-3
SCORES = ("fresh_nats", "carried_nats")


def measure(arm: str, seed: int, tokens: int, data: TrainingData) -> dict[str, Any]:
    """Train one arm and score it both ways."""
    steps = tokens // (BATCH * WINDOW)
    assignments = (
        f"max_steps={steps}",
        f"save_steps={steps}",
        "eval_steps=0",
        f"logging_steps={max(1, steps // 20)}",
        f"per_device_train_batch_size={BATCH}",
        f"data.sequence_length={WINDOW}",
        f"learning_rate={LEARNING_RATE}",
        f"seed={seed}",
        *ARMS[arm],
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings.create(
            Path(folder) / "run", preset="tiny", data=["shakespeare"], device="cpu", assignments=assignments
        )
        result = train(settings, data, Console(quiet=True))
        model = load_weights(result.output, torch.float32)
    (validation,) = data.validation
    fresh = evaluate(model, validation, data.tokenizer, window=WINDOW)
    carried = evaluate(model, validation, data.tokenizer, mode="stream")
    assert result.loss is not None
    return {
        "parameters": size(model),
        "fresh_nats": round(fresh.nats_per_token, 4),
        "carried_nats": round(carried.nats_per_token, 4),
        "steps": steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "milliseconds_per_step": round(1000 * result.seconds / steps, 2),
        "training_nats": round(result.loss, 4),
    }


def main() -> None:
    parser = arguments(__doc__ or "", "histories.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only, beside `equal`")
    parser.add_argument("--tokens", type=int, default=512_000, help="to train on, for each seed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    resolved = resolve_data(["shakespeare"])
    data = TrainingData(resolved.tokenizer, resolved.train, resolved.validation, id="shakespeare")
    cells = Cells(options.output)
    arms = [arm for arm in ARMS if arm == "equal" or arm in (options.arm or ARMS)]
    for name in cells.missing([f"{arm} / {seed}" for seed in SEEDS for arm in arms]):
        arm, seed = name.split(" / ")
        cells.store(name, measure(arm, int(seed), options.tokens, data))
    for score in SCORES:
        for arm in arms:
            differences = [cells.results[f"{arm} / {s}"][score] - cells.results[f"equal / {s}"][score] for s in SEEDS]
            mean, spread = statistics.fmean(differences), statistics.stdev(differences)
            # Student's t with two degrees of freedom.
            print(f"{score:13s} {arm:18s} {mean:+.4f} ± {4.303 * spread / len(SEEDS) ** 0.5:.4f} nats against equal")


if __name__ == "__main__":
    main()
