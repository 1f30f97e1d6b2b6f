"""How a stream is cut for scoring: each cut scores every token exactly once.

A window of N predicts N tokens: its inputs are the token before the first target (or the prefix token,
`<|begin|>`, at a beginning) and all targets but the last. So a model with a state and a transformer with a
context of N are asked the same questions.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Inputs are the tokens start..stop-2 of the stream; first..stop-1 are scored (start < first < stop).

    opening: the input at `start` is the prefix token, not the stream's token (which may not exist, at -1).
    """

    start: int
    first: int
    stop: int
    opening: bool

    def __len__(self) -> int:
        """Number of inputs."""
        return self.stop - self.start - 1


def disjoint_windows(begin: int, end: int, length: int) -> Iterator[Window]:
    """Windows of `length` targets side by side; the last is shorter when `length` does not divide."""
    for first in range(begin, end, length):
        yield Window(first - 1, first, min(first + length, end), opening=first == begin)


def rolling_windows(begin: int, end: int, length: int) -> Iterator[Window]:
    """As lm-eval's `loglikelihood_rolling`: disjoint, but the last begins earlier, for full context."""
    for window in disjoint_windows(begin, end, length):
        start = max(window.stop - length, begin) - 1
        yield Window(start, window.first, window.stop, opening=start < begin)


def one_window(begin: int, end: int) -> Iterator[Window]:
    """The whole stream as one window: the state is carried from its beginning to its end."""
    if end > begin:
        yield Window(begin - 1, begin, end, opening=True)
