"""Negative log-likelihood of the targets of windows, in bounded memory, for any Hugging Face causal LM.

Dimensions: B windows in a batch, C inputs in a chunk, V vocabulary.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dyadlm.causal_lm import Continuation, continues, vocabulary_size
from dyadlm.errors import UserError
from dyadlm.evaluate.streams import Stream
from dyadlm.evaluate.windows import Window
from dyadlm.memory import ContextMemory

# Float32 logits held at once (B·C·V): 128 MiB, a few times that at the peak.
LOGITS_AT_ONCE = 2**25
# No chunk is longer than this, however small the vocabulary: activations count too.
LONGEST_CHUNK = 4096
# Of models that hand on no state, so that all must be read at once.
LONGEST_FORGETFUL = 16_384

NO_TARGET = -100


def score(
    model: PreTrainedModel, stream: Stream, windows: Iterable[Window], prefix_token: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position of the first token, nats float32 (tokens,)) until every target is scored.

    Windows are batched (at most `batch_size`, fewer where the logits would not fit) and padded on the right,
    which a causal model cannot see. A window too long for the memory goes through in chunks, its state passed
    on. Raises `UserError` on a token that the model has no embedding for, and for a window longer than its positions.
    """
    vocabulary = vocabulary_size(model)
    at_once = LOGITS_AT_ONCE // (vocabulary * _tensors_of_logits(model))
    for batch in _batches(windows, batch_size, at_once):
        longest = max(len(window) for window in batch)
        forgets = longest > LONGEST_CHUNK and continues(model) == "from the beginning"
        chunk = max(1, min(longest, LONGEST_FORGETFUL if forgets else LONGEST_CHUNK, at_once // len(batch)))
        reader = Continuation(model)
        reader.require_room(longest)
        if chunk < longest and forgets:
            raise UserError(
                f"A {model.config.model_type} model hands on no state, and {longest} tokens are too many to be read at "
                f"once (the most are {chunk}); score them in shorter windows."
            )
        for offset in range(0, longest, chunk):
            ids, targets = _chunk(stream, batch, offset, min(offset + chunk, longest), prefix_token)
            if (largest := int(max(ids.max(), targets.max()))) >= vocabulary:
                raise UserError(
                    f"The data holds token {largest} but the model knows only {vocabulary} tokens; "
                    "prepare the data with the model's own tokenizer."
                )
            with torch.no_grad():
                tokens = torch.from_numpy(ids).to(model.device)
                logits = reader.read(tokens) if chunk < longest else reader.read_all(tokens)
                nats = cross_entropy(
                    logits.float().flatten(0, 1),
                    torch.from_numpy(targets).to(model.device).flatten(),
                    ignore_index=NO_TARGET,
                    reduction="none",
                ).view(targets.shape)
            for window, row, scored in zip(batch, nats.cpu().numpy(), targets != NO_TARGET, strict=True):
                if scored.any():
                    yield window.start + 1 + offset + int(scored.argmax()), row[scored]


def remembered(
    pieces: Iterable[tuple[int, np.ndarray]], stream: Stream, memory: ContextMemory
) -> Iterator[tuple[int, np.ndarray]]:
    """What `score` yields, in the order of the text, with a memory mixed in. What is not scored is read as well.

    A memory whose scope is a document begins anew with each document of the stream.
    """
    starts = [start for start, _, _ in stream.documents] if memory.options.scope == "document" else []

    def read(first: int, nats: np.ndarray) -> np.ndarray:
        stop = first + len(nats)
        inside = starts[bisect_right(starts, first) : bisect_left(starts, stop)]
        mixed = []
        for begin, end in pairwise([first, *inside, stop]):
            if starts and starts[bisect_right(starts, begin) - 1] == begin:
                memory.start_document()
            mixed.append(memory.read(stream.tokens(begin, end), nats[begin - first : end - first]))
        return np.concatenate(mixed)

    at = 0
    for first, nats in pieces:
        if first > at:
            read(at, np.full(first - at, np.nan))
        at = first + len(nats)
        yield first, read(first, nats)


def _tensors_of_logits(model: PreTrainedModel) -> int:
    """How many tensors of logits a pass holds: with consensus those of engineer, proposal and each future's artist."""
    return 2 + int(model.config.planner_futures) if getattr(model.config, "consensus", 0) else 1


def _batches(windows: Iterable[Window], most: int, inputs_at_once: int) -> Iterator[list[Window]]:
    """Group neighbouring windows while their number and their padded inputs stay within bounds."""
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window))
        if batch and (len(batch) == most or (len(batch) + 1) * longest > inputs_at_once):
            yield batch
            batch, longest = [], len(window)
        batch.append(window)
    if batch:
        yield batch


def _chunk(
    stream: Stream, batch: list[Window], offset: int, end: int, prefix_token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int64 (B, C) each, of the inputs offset..end-1 of each window."""
    ids = np.zeros((len(batch), end - offset), dtype=np.int64)
    targets = np.full_like(ids, NO_TARGET)
    for row, window in enumerate(batch):
        start, stop = window.start + offset, min(window.start + end, window.stop - 1)
        if stop <= start:
            continue
        opens = window.opening and offset == 0
        tokens = stream.tokens(start + opens, stop + 1)  # from the first input to the last target
        ids[row, : stop - start] = np.append(prefix_token, tokens[:-1]) if opens else tokens[:-1]
        unscored = max(window.first - start - 1, 0)
        targets[row, unscored : stop - start] = (tokens if opens else tokens[1:])[unscored:]
    return ids, targets
