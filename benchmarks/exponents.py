"""How cost grows: exponents of time and memory in the length of a text, in the context, and in the parameters.

    python benchmarks/exponents.py

Training: forward and backward of one row of T tokens; levels reach as far as the text, so that a longer one has more of
them. Decoding: one token in the engine after contexts of some lengths, which take turns, and the bytes of its state.
Parameters: a training step of 512 tokens and one decoded token of the presets. Seconds are those of this thread. Each
exponent is the slope of a line through the logarithms of the three largest sizes; the interval holds 95 % of the ways
to take one repeat of each, in decoding it is that of the median over turns (bootstrap). How the time of preparing text
falls with workers: `benchmarks/preparation.py`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Cells, arguments, dyad, interval, require_green, size
from dyadlm.diagnose.probes.cost import Allocations, exponent
from dyadlm.engine import Engine

LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
CONTEXTS = (0, 1000, 10_000, 100_000)
PRESETS = ("tiny", "small", "base")
ROW, REPEATS = 512, 5
TOKENS, TURNS = 128, 21  # decoded at once, and how often


def repeated(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Seconds of this thread, after a first call."""
    call()
    taken = []
    for _ in range(repeats):
        begun = time.thread_time()
        call()
        taken.append(time.thread_time() - begun)
    return taken


def trained(preset: str, length: int, **fields: Any) -> dict[str, Any]:
    """Forward and backward of one row. fields: of the configuration."""
    model = dyad(preset, **fields)
    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    seconds = repeated(step)
    with Allocations() as seen:
        step()
    return {"parameters": size(model), "levels": model.config.num_levels, "seconds": seconds, "bytes": seen.peak}


def decoded(preset: str, contexts: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """One token after each context, the mean of `TOKENS`. They take turns: all meet the same disturbances."""
    states, taken = {}, {context: list[float]() for context in contexts}
    text = np.random.default_rng(0).integers(0, 256, max(contexts) + TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        dyad(preset).save_pretrained(folder)
        engine = Engine.from_folder(Path(folder))
        for context in contexts:
            state, at = engine.start(), 0
            while at < context:
                engine.read(state, text[at : min(at + 2048, context)])
                at += 2048
            states[context] = state
        for turn in range(TURNS + 1):
            for context, state in states.items():
                tokens, begun = text[context : context + TOKENS].tolist(), time.thread_time()
                for token in tokens:
                    engine.step(state, token)
                if turn:  # the first one warms up
                    taken[context].append((time.thread_time() - begun) / TOKENS)
    sizes = {context: sum(array.nbytes for array in state.arrays().values()) for context, state in states.items()}
    return {context: {"seconds": taken[context], "state_bytes": sizes[context]} for context in contexts}


def main() -> None:
    asked = arguments(__doc__ or "", "exponents.json").parse_args()
    torch.set_num_threads(asked.threads)
    require_green()
    cells = Cells(asked.output)
    lengths = {f"tiny, training, {length} tokens": length for length in LENGTHS}
    for name in cells.missing(list(lengths)):
        reach = {"max_position_embeddings": lengths[name], "num_levels": None}
        cells.store(name, trained("tiny", lengths[name], **reach))
    decoding = {f"tiny, decoding after {context} tokens": context for context in CONTEXTS}
    if list(cells.missing(list(decoding))):
        for context, found in decoded("tiny", CONTEXTS).items():
            cells.store(f"tiny, decoding after {context} tokens", found)
    for name in cells.missing([f"{preset}, {ROW} tokens" for preset in PRESETS]):
        preset = name.partition(",")[0]
        cells.store(name, trained(preset, ROW) | {"decoding": decoded(preset, (0,))[0]})
    report(cells.results, list(lengths), list(decoding))


def report(results: dict[str, dict[str, Any]], lengths: list[str], decoding: list[str]) -> None:
    """Print all exponents."""
    sizes = [results[f"{preset}, {ROW} tokens"] for preset in PRESETS]
    parameters = [one["parameters"] for one in sizes]
    contexts = list(CONTEXTS[1:])
    series: dict[str, tuple[list[int], list[list[float]]]] = {
        "training, time in T": (list(LENGTHS), [results[name]["seconds"] for name in lengths]),
        "training, memory in T": (list(LENGTHS), [[results[name]["bytes"]] for name in lengths]),
        "decoding, state in the context": (contexts, [[results[name]["state_bytes"]] for name in decoding[1:]]),
        "training, time in parameters": (parameters, [one["seconds"] for one in sizes]),
        "training, memory in parameters": (parameters, [[one["bytes"]] for one in sizes]),
        "decoding, time in parameters": (parameters, [one["decoding"]["seconds"] for one in sizes]),
    }
    for name, (places, measured) in series.items():
        slope, between = exponent(places, measured)
        shown = "" if between is None else f" ({between[0]:.3f} to {between[1]:.3f})"
        ends = f"{statistics.median(measured[0]):.3g} at {places[0]:,}, {statistics.median(measured[-1]):.3g}"
        print(f"{name}: {slope:.3f}{shown}; {ends} at {places[-1]:,}")
    # Contexts took turns: each turn has a slope of its own.
    turns = zip(*(results[name]["seconds"] for name in decoding[1:]), strict=True)
    found = interval([exponent(contexts, [[seconds] for seconds in turn])[0] for turn in turns])
    print(f"decoding, time in the context: {found['median']:.4f} ({found['low']:.4f} to {found['high']:.4f})")


if __name__ == "__main__":
    main()
