"""Loss of a causal language model on a stream of text: nats per token, bits per byte, with an interval."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.causal_lm import context_of, vocabulary_size
from dyadlm.data.encoding import prefix_token, tokenizer_identity
from dyadlm.data.streams import TokenStream
from dyadlm.errors import RunFailed, UserError
from dyadlm.evaluate.bootstrap import ratio_interval
from dyadlm.evaluate.scoring import LONGEST_CHUNK, remembered, score
from dyadlm.evaluate.streams import Stream, target_bytes, targets_of
from dyadlm.evaluate.windows import Window, disjoint_windows, one_window, rolling_windows
from dyadlm.memory import ContextMemory
from dyadlm.model import DyadConfig
from dyadlm.version import __version__

Mode = Literal["disjoint", "rolling", "stream"]

# With fewer documents than this the interval is taken over blocks of tokens.
FEWEST_DOCUMENTS = 20
BLOCK = 2048


@dataclass(frozen=True)
class EvaluationResult:
    """The figures and all that is needed to read them; `interval` is that of `bits_per_byte`.

    memory: the options of the memory that was mixed in. targets: what was scored of the text; of conversations that is
    what the assistant says.
    """

    mode: Mode
    window: int | None
    nats_per_token: float
    bits_per_byte: float
    interval: tuple[float, float] | None
    interval_over: str
    tokens: int
    bytes: int
    documents: int
    targets: str
    memory: dict[str, Any] | None
    batch_size: int
    seed: int
    dtype: str
    device: str
    seconds: float
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "dyadlm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON can hold it."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    data: Stream | Sequence[Stream] | str,
    tokenizer: PreTrainedTokenizerBase,
    window: int | None = None,
    mode: Mode = "disjoint",
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    memory: ContextMemory | None = None,
) -> EvaluationResult:
    """Score every token of `data` exactly once, in evaluation mode on the model's own device.

    data: a stream, several (no window crosses from one to the next), or a text (one document).
    window: targets per window; by default the length the model was trained at.
    mode:
        disjoint: windows side by side over the whole stream, each from a fresh state with one token of
            context before its first target; the ends of documents are scored too (they stand for 0 bytes).
        rolling: each document alone, without its end, as lm-eval's `loglikelihood_rolling` scores it: the
            last window begins earlier, so that its targets have the full context.
        stream: one window from beginning to end, the state carried on; `window` must be None.
    seed: of the bootstrap. progress: called with (tokens scored, tokens in all).
    memory: of what followed each context, mixed into the predictions. It reads all text in its order, in every mode.

    Raises `UserError` for a window below 1, for data without text, and for tokens the model does not know.
    """
    if isinstance(data, str):
        data = TokenStream.from_text(data, tokenizer)
    streams: list[Stream] = list(data) if isinstance(data, list | tuple) else [cast(Stream, data)]
    require_vocabulary(model, tokenizer)
    prefix = prefix_token(tokenizer)
    length = None if mode == "stream" else window_length(model, window)
    if memory is not None and length is not None and length > LONGEST_CHUNK:
        batch_size = 1  # the pieces of several long windows come in turns
    if mode == "stream" and window is not None:
        raise UserError("A stream has no windows; give a window or the stream, not both.")

    documents = sum(len(stream.documents) for stream in streams)
    total = sum(len(stream) for stream in streams)
    nats: list[np.ndarray] = []  # per unit of the bootstrap
    sizes: list[np.ndarray] = []
    tokens = read = 0
    scored = "all tokens"
    started = time.perf_counter()
    was_training = model.training
    model.train(False)
    try:
        for stream in streams:
            edges = _unit_edges(stream, by_document=documents >= FEWEST_DOCUMENTS)
            sums = np.zeros(len(edges) - 1)
            windows = _windows(stream, mode, length, tokenizer.eos_token_id)
            pieces = score(model, stream, windows, prefix, batch_size)
            if memory is not None:
                memory.start_document()
                pieces = remembered(pieces, stream, memory)
            for first, piece in pieces:
                positions = np.arange(first, first + len(piece))
                targets = targets_of(stream, first, first + len(piece))
                read += len(piece)
                if targets is not None:
                    positions, piece = positions[targets], piece[targets]
                    scored = "what the assistant says"
                np.add.at(sums, np.searchsorted(edges, positions, side="right") - 1, piece.astype(np.float64))
                tokens += len(piece)
                if progress:
                    progress(read, total)
            nats.append(sums)
            sizes.append(np.array([target_bytes(stream, a, b) for a, b in pairwise(edges)], dtype=np.float64))
    finally:
        model.train(was_training)

    unit_nats, unit_bytes = np.concatenate(nats), np.concatenate(sizes)
    if tokens == 0 or unit_bytes.sum() == 0:
        raise UserError("There is no text to evaluate; give data with at least one character.")
    if math.isnan(unit_nats.sum()):
        raise RunFailed("The model's likelihoods are not numbers; its weights are damaged or diverged.")
    return EvaluationResult(
        mode=mode,
        window=length,
        nats_per_token=float(unit_nats.sum() / tokens),
        bits_per_byte=float(unit_nats.sum() / unit_bytes.sum() / math.log(2)),
        interval=ratio_interval(unit_nats / math.log(2), unit_bytes, seed=seed),
        interval_over="documents" if documents >= FEWEST_DOCUMENTS else f"blocks of {BLOCK} tokens",
        tokens=tokens,
        bytes=int(unit_bytes.sum()),
        documents=documents,
        targets=scored,
        memory=None if memory is None else memory.to_dict(),
        batch_size=batch_size,
        seed=seed,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        seconds=time.perf_counter() - started,
    )


def window_length(model: PreTrainedModel, window: int | None) -> int:
    """`window`, or the length the model was trained at. Raises `UserError` if neither is positive."""
    if window is not None:
        length: int | None = window
    elif isinstance(model.config, DyadConfig):  # no limit, but the length it was trained at
        length = model.config.max_position_embeddings
    else:
        length = context_of(model)
    if length is None:
        raise UserError("The model does not say which length it was trained at; give the window yourself.")
    if length < 1:
        raise UserError(f"A window holds at least 1 token, not {length}.")
    return length


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` if the tokenizer makes tokens that the model has no embedding for."""
    known = vocabulary_size(model)
    if len(tokenizer) > known:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens but the model knows {known}; use the model's own tokenizer."
        )


def require_same_vocabulary(model_tokenizer: PreTrainedTokenizerBase, data_tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` if token ids of the data would mean something else to the model."""
    if tokenizer_identity(model_tokenizer) != tokenizer_identity(data_tokenizer):
        raise UserError(
            f"The data was prepared with another vocabulary ({len(data_tokenizer)} tokens) than the model's "
            f"({len(model_tokenizer)}); prepare it again with --tokenizer set to the model's folder."
        )


def _windows(stream: Stream, mode: Mode, length: int | None, end_token: int | None) -> Iterator[Window]:
    if length is None:
        yield from one_window(0, len(stream))
    elif mode == "disjoint":
        yield from disjoint_windows(0, len(stream), length)
    else:
        for begin, end, _ in stream.documents:
            ended = end > begin and int(stream.tokens(end - 1, end)[0]) == end_token
            yield from rolling_windows(begin, end - ended, length)


def _unit_edges(stream: Stream, by_document: bool) -> np.ndarray:
    """Where the units of the bootstrap begin and end, int64 (units + 1,)."""
    starts = [start for start, _, _ in stream.documents] if by_document else range(0, len(stream), BLOCK)
    return np.array([*starts, len(stream)], dtype=np.int64)
