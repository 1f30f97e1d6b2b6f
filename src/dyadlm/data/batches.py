"""Training windows: which tokens the model sees at which moment, as a pure function of a seed and a number."""

import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import Dataset

from dyadlm.data.streams import TokenStream
from dyadlm.errors import UserError

IGNORED_LABEL = -100
WEIGHT_STEPS = 1 << 32  # mixing weights are whole multiples of 1 / WEIGHT_STEPS: counting stays exact
MIXED_RUN = 64  # windows that a lane reads of one of several streams before it may turn to another


class ChangedWindows(Dataset[dict[str, torch.Tensor]]):
    """As many windows as `base` has; a subclass says in `__getitem__` what becomes of each."""

    def __init__(self, base: Dataset[dict[str, torch.Tensor]]):
        self.base = base

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]  # torch declares no length


class TrainingWindows(Dataset[dict[str, torch.Tensor]]):
    """`length` windows of `sequence_length` tokens from weighted streams; item i depends on (seed, i) alone.

    Of the first n items, each of two streams holds its share of n to within one window (of more streams, to
    within one for each that comes before it), so resuming means skipping items and a longer run begins with the
    same items. A stream is a ring that an epoch enters at a random place and cuts into disjoint windows, seen in
    random order; only the remainder that fills no window is left out, another one in each epoch.

    With `lanes`, to carry a state from window to window: of each `lanes` windows, number b goes on where number b of
    those before it stood, for `run_windows` windows on end, and then enters the text elsewhere. All the above holds
    of these runs instead of single windows: a stream's share is kept to within one run (plus two windows), the runs of
    an epoch are disjoint and seen in random order, and the remainder that fills no run is left out. One stream feeds
    every lane an equal part of it in each epoch; several streams take turns, of at most `MIXED_RUN` windows.

    Items are dictionaries of int64 tensors (sequence_length,); `transformers.default_data_collator` batches them.
        input_ids, labels   equal (Hugging Face models shift the labels themselves); of a conversation only what the
                            assistant says is a target, all else has the label -100
        position_ids        with `document_reset`: restart at 0 with every document, as Hugging Face models
                            expect of packed documents; a document's first token is then no target (label -100).
                            With `lanes`: tokens of the lane's run (of its open document, if they reset) before each
                            token; 0 is where a lane entered the text, so that the state must start anew
        index               with `with_index`: the global index of each token
        segments            with `with_segments`: the number of each token's segment; see `segment`
        tags                with `with_tags`: (sequence_length, 3), the `tag_code` of each token's document, section and
                            kind
    """

    def __init__(
        self,
        streams: Sequence[tuple[TokenStream, float]],
        sequence_length: int,
        length: int,
        seed: int = 0,
        document_reset: bool = False,
        with_index: bool = False,
        with_segments: bool = False,
        with_tags: bool = False,
        lanes: int = 0,
    ):
        """Raises `UserError` if there is no stream, a weight is not positive, or a stream is below one window.

        lanes: places of the text that are read in turn, or 0 for windows in random order; with lanes a stream holds two
        windows for each lane that it feeds.
        """
        if not streams:
            raise UserError("There is nothing to train on; give at least one source of text.")
        if sequence_length < 2:
            raise UserError(f"A training window needs at least 2 tokens, not {sequence_length}.")
        for stream, weight in streams:
            if not 0 < weight < float("inf"):
                raise UserError(f"The weight of {stream.name} is {weight}; give a positive number.")
            if len(stream) < sequence_length:
                raise UserError(
                    f"{stream.name} has {len(stream)} tokens, less than one window of {sequence_length}; "
                    "give more text or a smaller data.sequence_length."
                )
        self.streams = [stream for stream, _ in streams]
        self.sequence_length = sequence_length
        self.seed = seed
        self.document_reset = document_reset
        self.with_index = with_index
        self.with_segments = with_segments
        self.with_tags = with_tags
        self.lanes = lanes
        self.run_windows = self._longest_run([weight for _, weight in streams]) if lanes else 1
        self._length = length
        self._shares = _shares([weight for _, weight in streams])
        self._epochs: dict[int, tuple[int, int, np.ndarray]] = {}  # the latest of each stream

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not 0 <= number < self._length:
            raise IndexError(f"Window {number} of {self._length}.")
        source, start = self.place(number)
        stream = self.streams[source]
        stop = start + self.sequence_length
        pieces = [(start, min(stop, len(stream)))]
        if stop > len(stream):  # around the ring
            pieces.append((0, stop - len(stream)))
        tokens = _tensor([stream.tokens(*piece) for piece in pieces])
        item = {"input_ids": tokens, "labels": tokens.clone()}
        if stream.targets(*pieces[0]) is not None:
            learned = np.concatenate([stream.targets(*piece) for piece in pieces])
            item["labels"][~torch.from_numpy(learned)] = IGNORED_LABEL
        if self.document_reset or self.lanes:
            _, before = self._run(number)
            positions = torch.arange(before, before + self.sequence_length)
            if self.document_reset:
                positions = torch.minimum(positions, _document_positions(stream, pieces))
                item["labels"][positions == 0] = IGNORED_LABEL
            item["position_ids"] = positions
        if self.with_index:
            item["index"] = _tensor([stream.index(*piece) for piece in pieces])
        if self.with_segments:
            before = sum(len(other.segments) for other in self.streams[:source])
            item["segments"] = before + _tensor([stream.segment_numbers(*piece) for piece in pieces])
        if self.with_tags:
            item["tags"] = _tensor([_tags(stream, *piece) for piece in pieces])
        return item

    def place(self, number: int) -> tuple[int, int]:
        """Which stream window `number` is taken from, and the position of its first token there."""
        run, before = self._run(number)
        source, rank = _choose(self._shares, run)
        size, length = len(self.streams[source]), self.run_windows * self.sequence_length
        epoch, position = divmod(rank, size // length)
        if source not in self._epochs or self._epochs[source][0] != epoch:
            random = np.random.default_rng([self.seed, source, epoch])
            self._epochs[source] = (epoch, int(random.integers(size)), random.permutation(size // length))
        _, phase, order = self._epochs[source]
        return source, (phase + int(order[position]) * length + before) % size

    def _run(self, number: int) -> tuple[int, int]:
        """Which run window `number` belongs to, and how many tokens of the run come before it."""
        if not self.lanes:
            return number, 0
        batch, lane = divmod(number, self.lanes)
        turn, window = divmod(batch, self.run_windows)
        return turn * self.lanes + lane, window * self.sequence_length

    def _longest_run(self, weights: Sequence[float]) -> int:
        """Windows of a run, so that each stream holds one for every lane that it feeds at a time."""
        longest = []
        for stream, weight in zip(self.streams, weights, strict=True):
            fed = math.ceil(self.lanes * Fraction(weight) / sum(map(Fraction, weights)))
            longest.append(len(stream) // (self.sequence_length * fed))
            if longest[-1] < 2:
                raise UserError(
                    f"{stream.name} has {len(stream)} tokens, less than two windows of {self.sequence_length} for each "
                    f"of the {fed} lanes that read it; give more text, smaller batches, fewer train.carry_lanes or "
                    "train.carry_state=false."
                )
        return min(longest) if len(longest) == 1 else min(*longest, MIXED_RUN)

    def segment(self, number: int) -> tuple[str, str, str]:
        """Document, section and kind behind a number in an item's `segments`."""
        for stream in self.streams:
            if number < len(stream.segments):
                _, document, section, kind = stream.segments[number]
                return document, section, kind
            number -= len(stream.segments)
        raise IndexError("There are fewer segments than that.")


def _shares(weights: Sequence[float]) -> list[int]:
    """For each stream its share of what the streams before it leave, in units of 1 / WEIGHT_STEPS."""
    exact = [Fraction(weight) for weight in weights]
    return [max(1, round(weight / sum(exact[position:]) * WEIGHT_STEPS)) for position, weight in enumerate(exact)]


def _choose(shares: Sequence[int], number: int) -> tuple[int, int]:
    """The stream of item `number`, and how many items before it came from that stream.

    Bresenham's line: among the first n items that reach a stream, it takes floor(n · share).
    """
    for source, share in enumerate(shares):
        taken = number * share // WEIGHT_STEPS
        if (number + 1) * share // WEIGHT_STEPS > taken:
            return source, taken
        number -= taken
    raise AssertionError("the last stream takes everything that is left")


def _document_positions(stream: TokenStream, pieces: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Positions within the document."""
    positions = []
    for start, stop in pieces:
        at = np.arange(start, stop)
        positions.append(at - stream.document_starts[np.searchsorted(stream.document_starts, at, side="right") - 1])
    return _tensor(positions)


@functools.lru_cache(maxsize=4096)
def tag_code(name: str) -> int:
    """A signed 64-bit number for the name of a document, section or kind: a hash, the same in every stream and run."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _tags(stream: TokenStream, start: int, stop: int) -> np.ndarray:
    """Codes of document, section and kind of the tokens start..stop-1, int64 (stop - start, 3)."""
    numbers, within = np.unique(stream.segment_numbers(start, stop), return_inverse=True)
    codes = [[tag_code(name) for name in stream.segments[number][1:]] for number in numbers]
    return np.array(codes, dtype=np.int64)[within]


def _tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
