"""The reverse-predicting twin: what each conditioning does to the loss and to what the levels hold.

    python benchmarks/twin.py [--conditioning joint ...] [--tokens 1536000]

Shakespeare's plays (Hamlet for validation), windows of 256 bytes, four a step, three paired seeds: the same first
weights and the same text in the same order. Beside the loss: milliseconds a step, and for each level of each block how
well word and sentence identity can be read off it (`dyadlm.evaluate.level_probe`), from the validation text.
"""

import statistics
from typing import Any

import torch

from common import Cells, arguments, dyad, require_green, train, validation_nats
from dyadlm import DyadForCausalLM
from dyadlm.data import TokenStream, byte_tokenizer, resolve_data
from dyadlm.data.tokenizer import decode_bytes
from dyadlm.evaluate.level_probe import probe_levels
from dyadlm.train.companions import published_parameters
from dyadlm.train.settings import TwinOptions
from dyadlm.train.twin import Twin

CONDITIONINGS = ("off", "joint", "reverse", "detached")
SEEDS = (0, 1, 2)
BATCH = {"batch_size": 4, "sequence_length": 256}
PROBED_TOKENS = 2**17


def probed(model: DyadForCausalLM, stream: TokenStream) -> dict[str, Any]:
    """Means over all levels, and every level, of words and of sentences; from the beginning of the stream."""
    content = decode_bytes(stream.tokens(0, min(len(stream), PROBED_TOKENS)))
    result = probe_levels(model, byte_tokenizer(), content)
    return {
        name: {
            "mean": round(scores.mean(), 4),
            "chance": round(scores.chance, 4),
            "shuffled": round(statistics.fmean(score.shuffled for score in scores.levels), 4),
            "tested": scores.tested,
            "levels": {
                f"{score.block}/{score.level}": [round(value, 4) for value in (score.accuracy, *(score.interval or ()))]
                for score in scores.levels
            },
        }
        for name, scores in (("word", result.word), ("sentence", result.sentence))
    }


def main() -> None:
    parser = arguments(__doc__ or "", "twin.json")
    parser.add_argument("--conditioning", action="append", choices=CONDITIONINGS, help="measure these alone")
    parser.add_argument("--tokens", type=int, default=1_536_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=1.0, help="of the twin's loss")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    data = resolve_data(["shakespeare"])
    cells = Cells(options.output)
    conditionings = options.conditioning or list(CONDITIONINGS)

    def name(conditioning: str, seed: int) -> str:
        twin = conditioning if conditioning == "off" else f"{conditioning}, weight {options.weight:g}"
        return f"{twin} / {options.tokens} / {options.learning_rate:g} / {seed}"

    todo = {name(conditioning, seed): (conditioning, seed) for seed in SEEDS for conditioning in conditionings}
    for cell in cells.missing(list(todo)):
        conditioning, seed = todo[cell]
        torch.manual_seed(seed)
        model = dyad("tiny")
        if conditioning != "off":
            model.accompany("twin", Twin(model, TwinOptions(conditioning, options.weight)))
        cost = train(
            model,
            data.train[0][0],
            tokens=options.tokens,
            learning_rate=options.learning_rate,
            seed=seed,
            **BATCH,
        )
        del cost["training_nats"]  # the twin's loss is in it
        loss = validation_nats(model, data.validation[0], 256)
        probe = probed(model, data.validation[0])
        cells.store(cell, {"parameters": published_parameters(model), **loss, **cost, "probe": probe})
    for conditioning in conditionings:
        for what, value in (
            ("nats", lambda cell: cell["nats"]),
            ("word", lambda cell: cell["probe"]["word"]["mean"]),
            ("sentence", lambda cell: cell["probe"]["sentence"]["mean"]),
        ):
            differences = [
                value(cells.results[name(conditioning, seed)]) - value(cells.results[name("off", seed)])
                for seed in SEEDS
                if name("off", seed) in cells.results
            ]
            if differences:
                print(
                    f"{conditioning:9} {what:9} {statistics.fmean(differences):+.4f} ({len(differences)} paired seeds)"
                )


if __name__ == "__main__":
    main()
