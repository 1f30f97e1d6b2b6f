"""What probes read: the documents of a text under the model's own tokenizer.

Dimension letters: B windows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyadlm.data.canaries import CanaryPlan
from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.probe import TooLittle


@dataclass(frozen=True)
class Material:
    """Text as tokens. train: what the model may have been trained on, None if nobody knows. name: for the report.

    canaries: what was planted in the training text, None if nothing is known of any. split: of the data, if it is one.
    """

    text: Sequence[TokenStream]
    train: Sequence[TokenStream] | None = None
    name: str = "text"
    canaries: CanaryPlan | None = None
    split: str = ""

    def windows(self, count: int, length: int, seed: int = 0) -> tuple[Tensor, np.ndarray]:
        """`count` windows of `length` tokens that do not overlap, spread evenly over the text, none across documents.

        Returns (B, T) int64 and the number of each one's document, int64 (B,), to resample by. Fewer, if the text does
        not hold so many. Raises `TooLittle` if it holds none.
        """
        found = self.places(count, length, seed)
        rows = [stream.tokens(first, first + length).astype(np.int64) for stream, first, _ in found]
        return torch.from_numpy(np.stack(rows)), np.array([document for *_, document in found])

    def places(self, count: int, length: int, seed: int = 0) -> list[tuple[TokenStream, int, int]]:
        """Where these windows are: the stream, their first token in it, the number of the document."""
        places = []
        number = 0
        for stream in self.text:
            for start, stop, _ in stream.documents:
                places += [(stream, first, number) for first in range(start, stop - length + 1, length)]
                number += 1
        if not places:
            raise TooLittle(f"no document of {self.name} has {length} tokens")
        if len(places) > count:
            every = len(places) / count
            offset = np.random.default_rng(seed).random() * every
            places = [places[int(offset + i * every) % len(places)] for i in range(count)]
        return places
