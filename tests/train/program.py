"""Small runs: a text made from a seed, a model of a few thousand weights.

It is what tests kill (`run`, in a process of its own) or distribute (as a program:
`python program.py OUTPUT [--resume] key=value … [-- OUTPUT …]`).
"""

import os
import random
import resource
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.errors import RunFailed
from dyadlm.train import TrainingData, TrainSettings, train

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "watch"]
SMALL = [
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.dropout=0.1",
    "data.sequence_length=32",
    "data.validation_tokens=512",
    "per_device_train_batch_size=4",
    "learning_rate=1e-2",
    "max_steps=6",
    "logging_steps=2",
    "save_steps=2",
    "eval_steps=2",
]


def words(seed: int = 0) -> TrainingData:
    """About 10 kB to train on and 1 kB to validate on."""
    draw = random.Random(seed)
    tokenizer = byte_tokenizer()
    train, validation = (
        TokenStream.from_text(" ".join(draw.choices(WORDS, k=number)), tokenizer) for number in (2000, 200)
    )
    return TrainingData(tokenizer, [(train, 1.0)], [validation], id=f"words {seed}", licences=["CC0-1.0"])


def small(output: Path, *assignments: str, **options: Any) -> TrainSettings:
    if "model" not in options:
        options = {"preset": "tiny"} | options
        assignments = (*SMALL, *assignments)
    else:
        assignments = (*[text for text in SMALL if not text.startswith("model.")], *assignments)
    return TrainSettings.create(
        output, assignments=assignments, **{"data": ["words"], "device": "cpu", "dtype": "float32"} | options
    )


def main(console: Console, target: str, *rest: str) -> None:
    assignments = [text for text in rest if text != "--resume"]
    settings = small(Path(os.path.expandvars(target)), *assignments, resume="--resume" in rest)
    try:
        train(settings, words(), console)
    except RunFailed as error:
        console.print(error, soft_wrap=True)
        sys.exit(getattr(error, "exit_code", 1))


def run(shown: Path, arguments: list[str], largest_file: int | None) -> None:
    """Leave what is shown in a file. largest_file: bytes, beyond which the system refuses to write."""
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with shown.open("w") as file:
        main(Console(file=file, width=200), *arguments)


def main_of_runs(runs: str) -> None:
    """One run after another; ` -- ` stands between their arguments."""
    for arguments in runs.split(" -- "):
        main(Console(file=sys.stdout, width=200), *arguments.split())


if __name__ == "__main__":
    main_of_runs(" ".join(sys.argv[1:]))
