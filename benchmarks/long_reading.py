"""The end of a training, with states that are carried from window to window or without.

    python benchmarks/long_reading.py FOLDER [--arm "16 lanes"]

FOLDER: that of `benchmarks/arena.py` on the medium corpus. Each trained model of `dyad` goes on for a tenth of its
steps, at an eighth of its learning rate, which ends at zero: in windows that begin anew (`fresh`), and with carried
states in one lane of text for each row (`one lane`) or in sixteen that take turns (`16 lanes`). All read as many
bytes. Scored as in the arena; differences are paired by seed.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common import Cells, arguments, require_green
from dyadlm.compare.kept import load_model, load_recipe, taken_cells
from dyadlm.data import byte_tokenizer, resolve_data
from dyadlm.data.encoding import prefix_token
from dyadlm.diagnose.pool import STUDENT
from dyadlm.evaluate.protocols import PROTOCOLS, three_protocols
from dyadlm.memory import MemoryOptions
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainSettings, train

CARRIED = ("train.carry_state=true",)
ARMS: dict[str, tuple[str, ...]] = {
    "fresh": (),
    "16 lanes": (*CARRIED, "train.carry_lanes=16"),
    "one lane": CARRIED,
}
STEPS, LEARNING_RATE = 586, 1e-3


def measure(folder: Path, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train on and score."""
    recipe = load_recipe(folder)
    data = resolve_data(list(recipe.data), byte_tokenizer())
    with tempfile.TemporaryDirectory() as scratch:
        begun = Path(scratch) / "begun"
        load_model(folder, "dyad", seed).save_pretrained(begun)
        byte_tokenizer().save_pretrained(begun)
        settings = TrainSettings.create(
            Path(scratch) / "run",
            model=str(begun),
            data=list(recipe.data),
            device="cpu",
            assignments=(
                f"max_steps={steps}",
                f"learning_rate={LEARNING_RATE}",
                f"per_device_train_batch_size={recipe.batch}",
                f"data.sequence_length={recipe.length}",
                f"seed={1000 + seed}",
                "train.optimizer=muon",
                "train.final_learning_rate=0",
                "eval_steps=0",
                "logging_steps=50",
                *ARMS[arm],
            ),
        )
        result = train(settings, None, Console(quiet=True))
        model = load_weights(result.output, torch.float32)
    memory = MemoryOptions.of_vocabulary(len(data.tokenizer))
    scores = three_protocols(
        model, data.validation, recipe.length, prefix_token(data.tokenizer), True, recipe.scale, memory
    )
    return {name: round(score.nats, 4) for name, score in scores.items()} | {"steps": steps}


def main() -> None:
    parser = arguments(__doc__ or "", "long_reading.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only, beside `fresh`")
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    require_green()
    arms = [arm for arm in ARMS if arm == "fresh" or arm in (asked.arm or ARMS)]
    seeds = sorted({cell.seed for cell in taken_cells(asked.folder, "dyad")})
    cells = Cells(asked.output)
    for name in cells.missing([f"{arm} / {seed}" for seed in seeds for arm in arms]):
        arm, seed = name.split(" / ")
        cells.store(name, measure(asked.folder, arm, int(seed), asked.steps))
    for protocol in PROTOCOLS:
        for arm in arms:
            own = [cells.results[f"{arm} / {seed}"][protocol] for seed in seeds]
            differences = [
                value - cells.results[f"fresh / {seed}"][protocol] for value, seed in zip(own, seeds, strict=True)
            ]
            spread = STUDENT[len(seeds) - 2] * statistics.stdev(differences) / len(seeds) ** 0.5
            print(
                f"{protocol:12s} {arm:10s} {statistics.fmean(own):.4f}, less fresh "
                f"{statistics.fmean(differences):+.4f} ± {spread:.4f}"
            )


if __name__ == "__main__":
    main()
