"""What makes greedy text run in a circle, and which decoding keeps it from that.

    python benchmarks/loops.py tiny-en [FOLDER=shakespeare ...]

Each model continues 120 prompts from held-out text by 256 bytes, as it is, with parts of it switched off while it
writes (nothing is trained again), and with other decoding. Figures are those of the probe `loop`. Models are over
bytes, and such as the engine runs; after `=` stand the corpora (joined by `+`) whose held-out parts the prompts are
from, all three without it.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TypicalLogitsWarper,
)

from carried import CORPORA, part
from common import Cells, arguments, require_green
from dyadlm.diagnose.probes.loop import LONGEST_PERIOD, REPEATS, loop_onset, repeated_fours
from dyadlm.diagnose.statistics import mean_interval
from dyadlm.engine import Engine
from dyadlm.generate.reader import nats_of
from dyadlm.generate.sampling import Sampler, Sampling
from dyadlm.shipped import place_of_model

PROMPTS, PROMPT, WRITTEN = 120, 64, 256
FURTHEST = 4096  # bytes of context before what is written
WITHIN = (16, 32, 64, 128)  # bytes within which a cycle has begun
PASSAGE = 16  # bytes that are repeated, as the probe does
WINDOWS, WINDOW = 32, 1024  # of the loss
TURNS = 6
TABLES = ("prompt alone", "written alone", "off in a cycle")
# How the next token is chosen, of the tokens before it and of the logits (V,).
Choice: TypeAlias = Callable[[list[int], np.ndarray], int]


class Material:
    """Prompts, what really followed them, and windows for the loss, equally far apart in held-out text."""

    def __init__(self, corpora: tuple[str, ...]):
        self.corpora = corpora
        texts = [np.frombuffer(part(corpus, "validation"), np.uint8).astype(np.int64) for corpus in corpora]
        self.prompts = [text[at - FURTHEST : at] for text in texts for at in _places(text, PROMPTS // len(texts))]
        self.followed = [text[at : at + WRITTEN] for text in texts for at in _places(text, PROMPTS // len(texts))]
        self.windows = [text[at - WINDOW : at] for text in texts for at in _places(text, WINDOWS // len(texts))]

    @cached_property
    def words(self) -> set[str]:
        """All words of the training parts."""
        return {word for corpus in self.corpora for word in _words(part(corpus, "train"))}

    def known(self, written: np.ndarray) -> float:
        """The share of whole words of a text that stand in the training parts."""
        words = _words(written[written < 256].astype(np.uint8).tobytes())[1:-1]
        return float(np.mean([word in self.words for word in words])) if words else float("nan")


def _places(text: np.ndarray, count: int) -> list[int]:
    return np.linspace(FURTHEST, len(text) - WRITTEN, count).astype(int).tolist()


def _words(text: bytes) -> list[str]:
    return re.findall(r"[a-z]+", text.decode(errors="replace").lower())


# ---- Parts of the model


@contextmanager
def weakened(engine: Engine, part: str, to: float = 0.0) -> Iterator[None]:
    """An engine in which what one part adds is multiplied: slots, n-grams, or a level by its name."""
    weights, shape = engine.weights, engine.shape
    if part == "slots":
        numbers = weights.recall.numbers
    elif part == "n-grams":
        numbers = weights.ngram_project.numbers
    else:
        level, columns = levels(engine).index(part), 3 * shape.rank
        numbers = weights.up.numbers[:, :, level * columns : (level + 1) * columns]
    kept = numbers.copy()
    numbers *= np.float32(to)
    try:
        yield
    finally:
        numbers[:] = kept


def levels(engine: Engine) -> list[str]:
    """Names of the levels that change at every token, in the order of the engine."""
    return [*(f"level {2**k}" for k in range(engine.shape.sliding)), *engine.shape.rules[: engine.shape.semantic]]


# ---- Decoding


def greedy(tokens: list[int], logits: np.ndarray) -> int:
    """The likeliest token."""
    return int(logits.argmax())


def sampled(seed: int, **options: Any) -> Choice:
    """As `dyadlm generate` does."""
    sampler = Sampler(Sampling(seed=seed, **options))
    return lambda tokens, logits: sampler(logits)


def processed(processor: LogitsProcessor, choose: Choice) -> Choice:
    """With one of the means of transformers before it."""

    def choice(tokens: list[int], logits: np.ndarray) -> int:
        scores = processor(torch.tensor([tokens]), torch.from_numpy(logits[None]))
        return choose(tokens, scores.numpy()[0])

    return choice


def continued(
    engine: Engine, prompt: np.ndarray, choose: Choice = greedy, tables: str = "as they are", count: int = WRITTEN
) -> np.ndarray:
    """The continuation int64 (count,) of a prompt.

    tables: of slots: `as they are`; `prompt alone`: not written to after the prompt; `written alone`: emptied after
    the prompt; `off in a cycle`: silent as soon as the text has gone three times round.
    """
    state = engine.start()
    logits = engine.read(state, prompt)[-1]
    if tables == "written alone":
        state.tags[:] = -1
    tokens, off = prompt.tolist(), False
    for _ in range(count):
        tokens.append(choose(tokens, logits))
        if tables == "prompt alone":
            state.pending[:] = -1
        off = off or (tables == "off in a cycle" and _goes_round(tokens[len(prompt) :]))
        if off:
            with weakened(engine, "slots"):
                logits = engine.step(state, tokens[-1])
        else:
            logits = engine.step(state, tokens[-1])
    return np.array(tokens[len(prompt) :])


def _goes_round(written: list[int]) -> bool:
    """Whether the last tokens are three equal turns."""
    return any(
        written[-period:] == written[-2 * period : -period] == written[-3 * period : -2 * period]
        for period in range(1, min(LONGEST_PERIOD, len(written) // 3) + 1)
    )


# ---- Figures


def figures(written: list[np.ndarray], material: Material) -> dict[str, Any]:
    """What the probe `loop` says of continuations, and the share of their words that are words."""
    onsets = [loop_onset(row) for row in written]
    looping = np.array([onset is not None for onset in onsets], float)
    fours = np.array([repeated_fours(row) for row in written])
    begun = sorted(float("inf") if onset is None else onset for onset in onsets)
    return {
        "cycles": round(float(looping.mean()), 4),
        "cycles_interval": _rounded(mean_interval(looping, np.arange(len(looping)))),
        "seq_rep_4": round(float(fours.mean()), 4),
        "seq_rep_4_interval": _rounded(mean_interval(fours, np.arange(len(fours)))),
        "begun_within": {str(place): float(np.mean([onset <= place for onset in begun])) for place in WITHIN},
        "median_onset_of_cycles": float(np.median([onset for onset in begun if onset < np.inf] or [len(written[0])])),
        "known_words": round(float(np.nanmean([material.known(row) for row in written])), 4),
    }


def _rounded(interval: tuple[float, float] | None) -> list[float]:
    assert interval is not None
    return [round(end, 4) for end in interval]


def bits_per_byte(engine: Engine, material: Material) -> float:
    """Of held-out text, in windows that begin with an empty state."""
    nats = [nats_of(None, engine.read(engine.start(), window), window)[1:] for window in material.windows]
    return round(float(np.concatenate(nats).mean() / np.log(2)), 4)


def self_reinforcement(engine: Engine, material: Material) -> float:
    """As the probe has it: how much likelier (bits a byte) a passage is at its 16th repetition than at its 1st."""
    gains = []
    for prompt in material.prompts:
        repeated = np.tile(prompt[-PROMPT:][:PASSAGE], REPEATS + 1)
        nats = nats_of(None, engine.read(engine.start(), repeated), repeated)
        gains.append(nats[PASSAGE : 2 * PASSAGE].mean() - nats[-PASSAGE:].mean())
    return round(float(np.mean(gains) / np.log(2)), 4)


def written_with(engine: Engine, material: Material, length: int = PROMPT, **options: Any) -> dict[str, Any]:
    """Figures of the greedy continuations of all prompts."""
    return figures([continued(engine, prompt[-length:], **options) for prompt in material.prompts], material)


def part_changed(engine: Engine, material: Material, part: str, to: float) -> dict[str, Any]:
    """Figures while one part is changed, with what that costs."""
    with weakened(engine, part, to):
        return {
            **written_with(engine, material),
            "self_reinforcement": self_reinforcement(engine, material),
            "bits_per_byte": bits_per_byte(engine, material),
        }


def chosen_by(
    engine: Engine, material: Material, choice: Callable[[int], Choice], tables: str = "as they are"
) -> dict[str, Any]:
    """Figures of another decoding. choice: of the number of the prompt, which is its seed."""
    written = [continued(engine, prompt[-PROMPT:], choice(n), tables) for n, prompt in enumerate(material.prompts)]
    return figures(written, material)


def long_texts(engine: Engine, material: Material, tables: str) -> dict[str, Any]:
    """Figures of greedy continuations of four times the length, of every fourth prompt."""
    prompts = [prompt[-PROMPT:] for prompt in material.prompts[::4]]
    return figures([continued(engine, prompt, tables=tables, count=4 * WRITTEN) for prompt in prompts], material)


def along_cycles(engine: Engine, material: Material) -> dict[str, Any]:
    """What slots add to the log-probability (bits a byte) of each turn of the cycles that greedy text falls into, and
    the share of cycles in which the model without slots would have written something else by the end of a turn."""
    added: list[list[float]] = [[] for _ in range(TURNS)]
    left: list[list[bool]] = [[] for _ in range(TURNS)]
    for prompt in (prompt[-PROMPT:] for prompt in material.prompts):
        written = continued(engine, prompt)
        if (onset := loop_onset(written)) is None:
            continue
        cycle = written[onset:]
        period = next(p for p in range(1, len(cycle)) if np.array_equal(cycle[p:], cycle[:-p]))
        text = np.concatenate([prompt, written])
        nats, _ = read_again(engine, text, len(cycle))
        with weakened(engine, "slots"):
            nats_without, likeliest = read_again(engine, text, len(cycle))
        for turn in range(min(TURNS, len(cycle) // period)):
            end = (turn + 1) * period
            added[turn].append(float((nats_without - nats)[end - period : end].mean() / np.log(2)))
            left[turn].append(bool((likeliest != cycle)[:end].any()))
    return {
        "cycles": len(added[0]),
        "slots_add_by_turn": [round(float(np.mean(turn)), 4) for turn in added],
        "left_by_turn": [round(float(np.mean(turn)), 4) for turn in left],
    }


def read_again(engine: Engine, text: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats of the last tokens of a text, and what would have been likeliest in place of each."""
    logits = engine.read(engine.start(), text)
    return nats_of(None, logits, text)[-last:], logits[-last - 1 : -1].argmax(1)


# ---- The study


def tasks_of(engine: Engine, material: Material) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured of a model, by name."""
    changed = partial(part_changed, engine, material)
    chosen, long = partial(chosen_by, engine, material), partial(long_texts, engine, material)
    default = partial(sampled, temperature=0.8, top_p=0.95)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "the text itself": lambda: figures(material.followed, material),
        "as it is": lambda: changed("slots", 1.0),
        "slots off": lambda: changed("slots", 0.0),
        **{f"slots x {share}": partial(changed, "slots", share) for share in (0.25, 0.5, 0.75)},
        **{f"slots: {tables}": partial(written_with, engine, material, tables=tables) for tables in TABLES},
        "along the cycles": lambda: along_cycles(engine, material),
        **{f"{level} off": partial(changed, level, 0.0) for level in levels(engine)},
        **{f"context of {length}": partial(written_with, engine, material, length) for length in (16, 256, 1024, 4096)},
        **{
            f"temperature {degree}": partial(chosen, partial(sampled, temperature=degree)) for degree in (0.3, 0.7, 1.0)
        },
        "temperature 0.8, top-p 0.95": partial(chosen, default),
        "temperature 0.8, top-p 0.95, slots: prompt alone": partial(chosen, default, tables="prompt alone"),
        **{f"1,024 bytes, slots: {tables}": partial(long, tables=tables) for tables in ("as they are", "prompt alone")},
    }
    if engine.shape.ngrams:
        found["n-grams off"] = lambda: changed("n-grams", 0.0)
    for name, processor in {"min_p=0.1": MinPLogitsWarper(0.1), "typical_p=0.9": TypicalLogitsWarper(0.9)}.items():
        found[f"temperature 1.0, {name}"] = partial(chosen, partial(_sampled_after, processor))
    for name, processor in {
        "repetition_penalty=1.2": RepetitionPenaltyLogitsProcessor(1.2),
        "no_repeat_ngram_size=16": NoRepeatNGramLogitsProcessor(16),
    }.items():
        choice = processed(processor, greedy)
        found[name] = partial(chosen, lambda seed, choice=choice: choice)
    return found


def _sampled_after(processor: LogitsProcessor, seed: int) -> Choice:
    return processed(processor, sampled(seed, temperature=1.0))


def main() -> None:
    parser = arguments(__doc__ or "", "loops.json")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", help="a folder or the name of a model that comes with the package")
    parser.add_argument("--only", default="", metavar="BEGINNING", help="measure what is named so")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    cells = Cells(options.output)
    for model, _, corpora in (each.partition("=") for each in options.models):
        engine = Engine.from_folder(place_of_model(model))
        tasks = tasks_of(engine, Material(tuple(corpora.split("+")) if corpora else CORPORA))
        chosen = {f"{Path(model).name} | {name}": task for name, task in tasks.items() if name.startswith(options.only)}
        for name in cells.missing(list(chosen)):
            cells.store(name, chosen[name]())
    print(table(cells.results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The continuations of all models, in the order in which they were measured."""
    lines = ["| | in a cycle | within 32 bytes | seq-rep-4 | words known | self-reinforcement | bits a byte |"]
    lines.append(f"| --- |{' --- |' * 6}")
    for name, cell in results.items():
        if "seq_rep_4" in cell:
            low, high = cell["cycles_interval"]
            own = [f"{cell['cycles']:.2f} ({low:.2f} to {high:.2f})", f"{cell['begun_within']['32']:.2f}"]
            own += [f"{cell['seq_rep_4']:.3f}", f"{cell['known_words']:.3f}"]
            own += [f"{cell[key]:.2f}" if key in cell else "" for key in ("self_reinforcement", "bits_per_byte")]
            lines.append(f"| {name} | {' | '.join(own)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
