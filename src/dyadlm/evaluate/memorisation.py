"""What a model has by heart: exposure and extraction of planted canaries, the gap to unseen text, and whiteout.

Each measure has a known answer for models that know nothing or everything; `tests/evaluate/test_memorisation.py`.

Dimension letters: N rows, T tokens, C checkpoints, U units that are drawn anew for an interval, V vocabulary.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.causal_lm import vocabulary_size
from dyadlm.data.canaries import CANARIES_NAME, Canary, CanaryPlan, draw_references
from dyadlm.data.encoding import NUM_BYTES, prefix_token
from dyadlm.data.tokenizer import load_tokenizer
from dyadlm.errors import UserError
from dyadlm.evaluate.bootstrap import RESAMPLES, ratio_interval
from dyadlm.evaluate.scoring import LOGITS_AT_ONCE
from dyadlm.evaluate.streams import Stream
from dyadlm.model.loading import load_weights

REFERENCES = 1023
"""Strings that a canary is ranked among: with itself 2^10, so that exposure ends at 10 bits."""

PREFIX = 12
"""Tokens of a canary that are given before the model must go on by itself: half of one, in bytes."""

ROWS_AT_ONCE = 64
WORD = re.compile(rb"[A-Za-z\x80-\xff]+")

Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Rows (N, T) → nats and whether it is the likeliest, as `read` says of a model."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `units`, with its 95 % bootstrap interval (None for a single one)."""

    mean: float
    interval: tuple[float, float] | None
    units: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """values (U,), at least one."""
        values = np.asarray(values, dtype=np.float64)
        return cls(float(values.mean()), ratio_interval(values, np.ones(len(values))), len(values))


@dataclass(frozen=True)
class Recall:
    """What is known of some canaries and, as the control, of their twins, which were never shown.

    repetitions: how often each was planted; None: all canaries together.
    exposure: bits; log2(e) = 1.44 of strings that the model knows nothing of, the highest possible of one that it finds
        likelier than every reference.
    extracted: the share that greedy decoding completes to the last token.
    nats: per token.
    """

    repetitions: int | None
    exposure: Estimate
    twin_exposure: Estimate
    extracted: Estimate
    twin_extracted: Estimate
    nats: Estimate
    twin_nats: Estimate


@dataclass(frozen=True)
class Memorisation:
    """references: strings that were ranked. most: the highest possible exposure, in bits. prefix: tokens given before
    extraction. groups: by repetitions."""

    references: int
    most: float
    prefix: int
    together: Recall
    groups: list[Recall]


def memorisation(
    model: PreTrainedModel,
    plan: CanaryPlan,
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int] = (),
    references: int = REFERENCES,
    prefix: int = PREFIX,
) -> Memorisation:
    """Ask a model for the canaries of a plan; see `recalled`."""
    return recalled(partial(read, model), plan, tokenizer, context, references, prefix)


def recalled(
    reader: Reader,
    plan: CanaryPlan,
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int] = (),
    references: int = REFERENCES,
    prefix: int = PREFIX,
) -> Memorisation:
    """Ask whatever reads for the canaries of a plan.

    context: tokens that stand before each string, as text stood before those planted; none: the token for a beginning.
    references: how many strings, drawn like canaries, exposure ranks them among.
    prefix: tokens that are given before the model must complete a canary; fewer than a canary has.

    Exposure (Carlini et al. 2019, arXiv 1802.08232) = log2(references + 1) - log2(rank), where the rank of a string
    among all references and itself, by its nats, is 1 + those that are likelier + half of those that are as likely.
    """
    context = list(context) or [prefix_token(tokenizer)]
    canaries = [*plan.members, *plan.twins]
    strings = [canary.tokens for canary in canaries]
    assert prefix < min(map(len, strings)), "a canary must have something left to complete"
    nats, completed = recite(reader, [*strings, *draw_references(references, plan.seed, tokenizer)], context, prefix)
    bits = exposures(nats[: len(strings)], nats[len(strings) :])
    per_token = nats[: len(strings)] / [len(tokens) for tokens in strings]
    split = len(plan.members)

    def recall(repetitions: int | None) -> Recall:
        def among(part: Sequence[Canary]) -> np.ndarray:
            return np.array([repetitions in (None, canary.repetitions) for canary in part])

        mine, others = among(plan.members), among(plan.twins)
        measured = [
            Estimate.of(values[:split][mine] if part == 0 else values[split : len(strings)][others])
            for values in (bits, completed, per_token)
            for part in (0, 1)
        ]
        return Recall(repetitions, *measured)

    groups = sorted({canary.repetitions for canary in plan.members})
    return Memorisation(
        references, math.log2(references + 1), prefix, recall(None), [recall(repetitions) for repetitions in groups]
    )


def memorisation_of_run(run: Path, weights: Path | None = None, context: Sequence[int] = ()) -> Memorisation:
    """The same of a finished run, or of one of its checkpoints (`weights`), on the CPU.

    Raises `UserError` if the run has planted none.
    """
    plan = canaries_of_run(run)
    folder = weights or run
    return memorisation(load_weights(folder, torch.float32), plan, load_tokenizer(str(folder)), context)


def canaries_of_run(run: Path) -> CanaryPlan:
    """What a run has planted. Raises `UserError` if it is nothing."""
    try:
        return CanaryPlan.from_dict(json.loads((run / CANARIES_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{run} has no {CANARIES_NAME}; train with data.canaries=1 or more.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run / CANARIES_NAME} is no record of canaries ({error}); give the folder of a run."
        ) from error


def recite(
    reader: Reader, strings: Sequence[Sequence[int]], context: Sequence[int], prefix: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each string after `context`: its nats, float64 (N,), and whether greedy decoding from its first `prefix`
    tokens gives the rest, bool (N,).

    Greedy decoding does so iff, shown the string itself, the model finds each token of the rest the likeliest.
    """
    rows = np.zeros((len(strings), len(context) + max(map(len, strings))), dtype=np.int64)
    inside = np.zeros_like(rows, dtype=bool)
    for row, within, tokens in zip(rows, inside, strings, strict=True):
        stop = len(context) + len(tokens)
        row[:stop] = [*context, *tokens]
        within[len(context) : stop] = True
    nats, likeliest = reader(rows)
    given = np.arange(rows.shape[1])[1:] < len(context) + prefix
    return (nats * inside[:, 1:]).sum(1), (likeliest | ~inside[:, 1:] | given).all(1)


def exposures(nats: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Bits of exposure of strings by their nats (N,) among those of references; see `memorisation`."""
    ordered = np.sort(references)
    likelier, not_less = (np.searchsorted(ordered, nats, side=side) for side in ("left", "right"))
    return math.log2(len(references) + 1) - np.log2(1 + (likelier + not_less) / 2)


def read(model: PreTrainedModel, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of rows (N, T) but the first, given those before it in its row: nats, float64 (N, T - 1), and
    whether it is the likeliest, bool (N, T - 1). In evaluation mode, on the model's own device."""
    at_once = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (rows.shape[1] * vocabulary_size(model))))
    nats, likeliest = np.empty((len(rows), rows.shape[1] - 1)), np.empty((len(rows), rows.shape[1] - 1), dtype=bool)
    with _resting(model):
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            ids = torch.from_numpy(rows[part]).to(model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            nats[part] = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu().numpy()
            likeliest[part] = (logits.argmax(-1) == ids[:, 1:]).cpu().numpy()
    return nats, likeliest


@contextmanager
def _resting(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        yield
    model.train(training)


# ---- Text that was trained on against text that was not


@dataclass(frozen=True)
class Gap:
    """Nats per token of the text trained on and of other text; `gap`: the second less the first, with an interval."""

    training: Estimate
    validation: Estimate
    gap: float
    interval: tuple[float, float] | None


def generalisation_gap(
    model: PreTrainedModel, training: Stream, validation: Stream, window: int, tokens: int = 65_536
) -> Gap:
    """How much better a model does on its training text: both read in windows of `window` targets, each from a fresh
    state after one token of context, evenly spread over the stream, about `tokens` of each, or all there are."""
    seen, unseen = (
        read(model, even_windows(stream, window, tokens)[0])[0].mean(1) for stream in (training, validation)
    )
    interval = None
    if min(len(seen), len(unseen)) > 1:
        random = np.random.default_rng(0)
        drawn = [part[random.integers(len(part), size=(RESAMPLES, len(part)))].mean(1) for part in (seen, unseen)]
        low, high = np.percentile(drawn[1] - drawn[0], [2.5, 97.5])
        interval = float(low), float(high)
    ours, theirs = Estimate.of(seen), Estimate.of(unseen)
    return Gap(ours, theirs, theirs.mean - ours.mean, interval)


def even_windows(stream: Stream, window: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint rows of `window` targets after a token of context, int64 (N, window + 1), evenly spread over a stream,
    N at most tokens / window, rounded up; and where they begin, int64 (N,). The stream holds one at least."""
    count = (len(stream) - 1) // window
    assert count >= 1, "the stream is shorter than a window"
    chosen = np.arange(0, count, max(1, math.ceil(count * window / max(tokens, window))))
    starts = chosen * window
    return np.stack([stream.tokens(start, start + window + 1).astype(np.int64) for start in starts.tolist()]), starts


# ---- Whiteout


@dataclass(frozen=True)
class Whiteout:
    """Local skill that was learned and lost again, over checkpoints in the order of training.

    regained: W = loss of the last checkpoint - the least of all, in bits per character, at forced positions.
    interval: of W, over windows; the least is found anew in each, and being the least of several it draws W upwards.
    forgotten: the best accuracy of all - that of the last.
    bits, accuracy: of each checkpoint. characters: forced positions measured.
    """

    regained: float
    interval: tuple[float, float] | None
    forgotten: float
    bits: list[float]
    accuracy: list[float]
    characters: int


def lexicon(text: bytes) -> set[bytes]:
    """Its words: runs of letters, as they are written."""
    return set(WORD.findall(text))


def forced_positions(text: bytes, words: set[bytes]) -> np.ndarray:
    """int64 (bytes,): where the beginning of a word leaves one completion in a lexicon, where that word began; else -1.

    A letter is forced if its word is in the lexicon and no other word there begins with the letters before it, at least
    one.
    """
    begin_so = Counter(word[:length] for word in words for length in range(1, len(word) + 1))
    starts = np.full(len(text), -1, dtype=np.int64)
    for found in WORD.finditer(text):
        if (word := found.group()) in words:
            for length in range(1, len(word)):
                if begin_so[word[:length]] == 1:
                    starts[found.start() + length : found.end()] = found.start()
                    break
    return starts


def forced_tokens(stream: Stream, words: set[bytes], table: Sequence[bytes]) -> np.ndarray:
    """int64 (tokens,): the token in which its word began, of tokens all of whose bytes are at `forced_positions`; else
    -1. table: the bytes that each token stands for; what stands for none ends a word."""
    pieces = [table[token] or b"\0" for token in stream.tokens(0, len(stream)).tolist()]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    begins = ends - [len(piece) for piece in pieces]
    starts = forced_positions(b"".join(pieces), words)
    unforced = np.concatenate([[0], np.cumsum(starts < 0)])
    inside = unforced[ends] == unforced[begins]
    first = np.searchsorted(ends, starts[begins], side="right")
    found: np.ndarray = np.where(inside, first, -1)
    return found


def forced_scores(
    model: PreTrainedModel, stream: Stream, words: set[bytes], window: int, tokens: int = 65_536
) -> np.ndarray:
    """float64 (3, U): bits, right guesses and number of the forced positions in each of the `even_windows` of a stream
    of bytes. A word that began before its window counts for nothing there."""
    rows, begin = even_windows(stream, window, tokens)
    table = [bytes([token]) if token < NUM_BYTES else b"" for token in range(vocabulary_size(model))]
    starts = forced_tokens(stream, words, table)
    forced = np.stack([starts[start + 1 : start + window + 1] >= start for start in begin.tolist()])
    nats, likeliest = read(model, rows)
    return np.stack([(nats / math.log(2) * forced).sum(1), (likeliest & forced).sum(1), forced.sum(1)])


def whiteout(scores: np.ndarray) -> Whiteout:
    """scores (C, 3, U): `forced_scores` of each checkpoint, on the same windows, or their sums over documents."""
    bits, right, counts = scores[:, 0], scores[:, 1], scores[0, 2]
    assert counts.sum() > 0, "no position of the text is forced"
    losses, accuracy = bits.sum(1) / counts.sum(), right.sum(1) / counts.sum()
    interval = None
    if len(counts) > 1:
        random = np.random.default_rng(0)
        times = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES)
        totals = times @ counts
        drawn = (times @ bits.T)[totals > 0] / totals[totals > 0, None]
        low, high = np.percentile(drawn[:, -1] - drawn.min(1), [2.5, 97.5])
        interval = float(low), float(high)
    return Whiteout(
        regained=float(losses[-1] - losses.min()),
        interval=interval,
        forgotten=float(accuracy.max() - accuracy[-1]),
        bits=losses.tolist(),
        accuracy=accuracy.tolist(),
        characters=int(counts.sum()),
    )
