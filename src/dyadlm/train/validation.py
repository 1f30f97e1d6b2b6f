"""The validation figure shown during training: an even sample of the windows `dyadlm evaluate` scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel

from dyadlm.evaluate.scoring import score
from dyadlm.evaluate.streams import Stream, target_bytes, targets_of
from dyadlm.evaluate.windows import Window, disjoint_windows


@dataclass(frozen=True)
class ValidationSample:
    """Disjoint windows of the trained length, each scored with a fresh state.

    names: of the sources that the parts come from, each another.
    prefix_token: the input before the first token of a stream (`<|begin|>`).
    """

    parts: list[tuple[Stream, list[Window]]]
    prefix_token: int
    names: list[str]

    @classmethod
    def draw(cls, streams: Sequence[Stream], length: int, tokens: int, prefix_token: int) -> "ValidationSample":
        """Take every n-th window of `length` targets, so that about `tokens` are scored."""
        total = sum(len(stream) for stream in streams)
        every = max(1, math.ceil(total / tokens))
        parts = [(stream, list(islice(disjoint_windows(0, len(stream), length), 0, None, every))) for stream in streams]
        parts = [(stream, windows) for stream, windows in parts if windows]
        names: list[str] = []
        for stream, _ in parts:
            name = str(getattr(stream, "name", "text")).removesuffix(" (validation)")
            names.append(name if name not in names else f"{name}#{len(names) + 1}")
        return cls(parts, prefix_token, names)

    @property
    def has_targets(self) -> bool:
        """Whether anything is scored; not where a sample of conversations holds nothing that the assistant says."""
        for stream, windows in self.parts:
            for window in windows:
                targets = targets_of(stream, window.first, window.stop)
                if targets is None or targets.any():
                    return True
        return False

    def __len__(self) -> int:
        return sum(len(windows) for _, windows in self.parts)

    def inputs(self, count: int) -> torch.Tensor:
        """The inputs of `count` windows, or as many as there are, int64 (B, T): of the longest, evenly spread."""
        windows = [(stream, window) for stream, part in self.parts for window in part]
        longest = max(len(window) for _, window in windows)
        whole = [(stream, window) for stream, window in windows if len(window) == longest]
        rows = []
        for stream, window in whole[:: math.ceil(len(whole) / count)]:
            tokens = stream.tokens(window.start + window.opening, window.stop - 1).tolist()
            rows.append([self.prefix_token] * window.opening + tokens)
        return torch.tensor(rows, dtype=torch.int64)

    def measure(self, model: PreTrainedModel, rank: int, processes: int, batch_size: int) -> torch.Tensor:
        """This process's share of each source as float64 (S, 3): nats, tokens, bytes. The shares of processes add up.

        Every process runs equally many windows (one may count nothing), as sharded models require.
        """
        totals = torch.zeros(len(self.parts), 3, dtype=torch.float64)
        for source, (stream, windows) in enumerate(self.parts):
            mine, last = windows[rank::processes], windows[-1]
            filled = len(mine) < math.ceil(len(windows) / processes)
            for position, nats in score(model, stream, mine + [last] * filled, self.prefix_token, batch_size):
                if filled and position >= last.first:
                    continue
                size = target_bytes(stream, position, position + len(nats))
                targets = targets_of(stream, position, position + len(nats))
                nats = nats if targets is None else nats[targets]
                totals[source] += torch.tensor([nats.sum(dtype="float64"), len(nats), size], dtype=torch.float64)
        return totals
