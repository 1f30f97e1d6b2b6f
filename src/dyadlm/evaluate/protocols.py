"""Three ways to score a model on text: fresh windows, the same targets with a long context, and a carried stream.

Fresh windows hide what a model makes of a long past, and a carried stream shows nothing else; a comparison needs all.

    fresh      <|begin|> or one token  [t0 … tL]                     each window alone
    context    C tokens                [t0 … tL]                     the same targets
    carried    [t0 … tN]                                             one text, from its beginning, read once
    remembered the same, with a memory of what followed each context (`dyadlm.memory`), which any model can have
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from dyadlm.errors import Diverged, UserError
from dyadlm.evaluate.scoring import remembered, score
from dyadlm.evaluate.streams import Stream, target_bytes
from dyadlm.evaluate.windows import Window, disjoint_windows, one_window
from dyadlm.memory import ContextMemory, MemoryOptions

PROTOCOLS = {
    "fresh": "fresh windows",
    "context": "after 1,024 tokens",
    "carried": "carried stream",
    "remembered": "carried stream, with a memory",
}
LONG = 1024  # tokens of context, and of the windows of models that carry no state
TARGETS, CARRIED = 65_536, 65_536
BATCH = 16


class Score(NamedTuple):
    """Loss on the targets of one protocol. nats: per token; bits: per byte."""

    nats: float
    bits: float
    tokens: int


def fresh(streams: Sequence[Stream], length: int, tokens: int = TARGETS) -> list[tuple[Stream, list[Window]]]:
    """Every n-th window of `length` targets, so that about `tokens` are scored."""
    every = max(1, math.ceil(sum(map(len, streams)) / max(1, tokens)))
    parts = [(stream, list(islice(disjoint_windows(0, len(stream), length), 0, None, every))) for stream in streams]
    return [(stream, windows) for stream, windows in parts if windows]


def after_context(parts: list[tuple[Stream, list[Window]]], tokens: int = LONG) -> list[tuple[Stream, list[Window]]]:
    """The same targets, each window with so many tokens before it, or as many as there are."""
    return [
        (stream, [replace(one, start=max(one.start - tokens, -1), opening=one.start < tokens) for one in windows])
        for stream, windows in parts
    ]


def overlapping(end: int, length: int) -> Iterator[Window]:
    """Windows of `length` targets, half of which are scored: all of the first, then the later half of each."""
    half = max(1, length // 2)
    yield Window(-1, 0, min(length, end), opening=True)
    for first in range(length, end, half):
        stop = min(first + half, end)
        yield Window(stop - length - 1, first, stop, opening=False)


def carried(
    streams: Sequence[Stream], carry: bool, tokens: int = CARRIED, length: int = LONG
) -> list[tuple[Stream, list[Window]]]:
    """The beginning of each stream, read once. carry: the state is handed on from beginning to end. Otherwise windows
    of `length` tokens are read, half a window further each time, so that each target has half a window of context."""
    share = max(1, tokens // len(streams))
    parts = []
    for stream in streams:
        end = min(len(stream), share)
        parts.append((stream, list(one_window(0, end) if carry else overlapping(end, length))))
    return parts


def measure(
    model: PreTrainedModel, parts: Sequence[tuple[Stream, list[Window]]], prefix: int, batch: int = BATCH
) -> Score:
    """Score all windows. prefix: the input before the first token of a stream."""
    model.train(False)
    return _sum((stream, score(model, stream, windows, prefix, batch)) for stream, windows in parts)


def three_protocols(
    model: PreTrainedModel,
    streams: Sequence[Stream],
    length: int,
    prefix: int,
    carry: bool,
    scale: float = 1.0,
    memory: MemoryOptions | None = None,
) -> dict[str, Score]:
    """All three, and `remembered` where a memory is given. scale: of the numbers of targets, for quick looks. The
    others as for `carried_scores`."""
    windows = fresh(streams, length, int(TARGETS * scale))
    return {
        "fresh": measure(model, windows, prefix),
        "context": measure(model, after_context(windows), prefix),
        **carried_scores(model, streams, length, prefix, carry, int(CARRIED * scale), memory),
    }


def carried_scores(
    model: PreTrainedModel,
    streams: Sequence[Stream],
    length: int,
    prefix: int,
    carry: bool,
    tokens: int = CARRIED,
    memory: MemoryOptions | None = None,
) -> dict[str, Score]:
    """The protocol `carried`, and `remembered` where a memory is given; each stream begins with an empty one.

    length: of the training text. prefix: the input before the first token of a stream. carry: whether the model hands
    on a state of constant size; otherwise the stream is read in overlapping windows of `length` or of 1,024 tokens,
    whichever gives the smaller loss. tokens: to score, of all streams together.
    """
    ways = [{}] if carry else [{"length": size} for size in sorted({length, LONG})]
    every = [
        [
            (stream, list(score(model, stream, own, prefix, BATCH)))
            for stream, own in carried(streams, carry, tokens, **way)
        ]
        for way in ways
    ]
    read = min(every, key=lambda one: _sum(one).nats)
    scores = {"carried": _sum(read)}
    if memory is not None:
        mixed = ((stream, remembered(found, stream, ContextMemory(memory))) for stream, found in read)
        scores["remembered"] = _sum(mixed)
    return scores


def _sum(parts: Iterable[tuple[Stream, Iterable[tuple[int, np.ndarray]]]]) -> Score:
    """Of what `score` yields for each stream. Raises `UserError` without text, `Diverged` for what is no number."""
    nats = tokens = size = 0.0
    for stream, pieces in parts:
        for position, found in pieces:
            nats += float(np.sum(found, dtype="float64"))
            tokens += len(found)
            size += target_bytes(stream, position, position + len(found))
    if not tokens or not size:
        raise UserError("There is no text to score; give data with at least one character.")
    if not math.isfinite(nats):
        raise Diverged("The model's likelihoods are not numbers; its weights are damaged or diverged.")
    return Score(nats / tokens, nats / size / math.log(2), int(tokens))
