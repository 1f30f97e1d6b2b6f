"""What is scored: lines, documents or tokens, each with its bits, its score and its oddest span."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from dyadlm.score.lines import Line

UnitName = Literal["line", "document", "token"]
ScoreName = Literal["excess", "mean"]


class Reading(NamedTuple):
    """How scores come about: of which units, which score, and whether the model learns while it reads.

    memory: entries of each table of the memory that is mixed in; 0 without one. changed: fields of the model that the
    command changed, as NAME=VALUE.
    """

    unit: UnitName = "line"
    score: ScoreName = "excess"
    learn: bool = False
    memory: int = 0
    changed: str = ""


class ScoredLine(NamedTuple):
    """A line, and the surprise at each of its bytes.

    bits: float64, one for each byte of the line; the bits of a token are spread evenly over its bytes.
    starts: int64, the first byte of each token that has bytes of its own.
    expected: float64, what each byte may cost (`dyadlm.score.usual`).
    """

    line: Line
    bits: np.ndarray
    starts: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True, slots=True)
class Unit:
    """A line, a document or a token, and how odd it is.

    document, number, offset: where it begins: the line's number from 1, and the byte from 0. Of a document number,
    offset and content are those of its oddest line. content: its bytes. bits: of surprise, in total. size: bytes that
    these stand for, line ends included. score: what it is judged by; higher is odder. span: the first byte of its
    oddest span in `content`, and the byte behind the last.
    """

    document: str
    number: int
    offset: int
    content: bytes
    bits: float
    size: int
    score: float
    span: tuple[int, int]

    @property
    def bits_per_byte(self) -> float:
        return self.bits / max(self.size, 1)


def oddest_span(excess: np.ndarray) -> tuple[float, int, int]:
    """The span of bytes whose bits exceed what is expected by the largest sum: (that sum, start, stop).

    excess: (n,), n > 0, the bits of each byte less those that are expected. The span holds at least one byte; of
    equal sums the first one is taken, and the longest that begins with no loss. The sum is the maximum-sum segment,
    the statistic of a scan for a span of unknown length.
    """
    sums = np.concatenate([[0.0], np.cumsum(excess)])
    lowest = np.minimum.accumulate(sums[:-1])
    gains = sums[1:] - lowest
    stop = int(gains.argmax()) + 1
    start = int(sums[:stop].argmin())
    return float(gains[stop - 1]), start, stop


def units_of(lines: Iterable[ScoredLine], reading: Reading) -> Iterator[Unit]:
    """The units of lines in their order; a document is given when the next one begins, or the lines end."""
    if reading.unit == "document":
        yield from _documents(lines, reading.score)
        return
    for scored in lines:
        if reading.unit == "line":
            yield _line(scored, reading.score)
        else:
            yield from _tokens(scored, reading.score)


def _line(scored: ScoredLine, score: ScoreName) -> Unit:
    line, bits, _, expected = scored
    excess = bits - expected
    _, start, stop = oddest_span(excess)
    total, size = float(bits.sum()), len(line.content)
    value = float(np.maximum(excess, 0).sum()) if score == "excess" else total / size
    return Unit(*line, total, size, value, whole_characters(line.content, start, stop))


def _tokens(scored: ScoredLine, score: ScoreName) -> Iterator[Unit]:
    line, bits, starts, expected = scored
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(line.content)], strict=True):
        size, total = stop - start, float(bits[start:stop].sum())
        value = total - float(expected[start:stop].sum()) if score == "excess" else total / size
        content = line.content[start:stop]
        yield Unit(line.document, line.number, line.offset + start, content, total, size, value, (0, size))


def _documents(lines: Iterable[ScoredLine], score: ScoreName) -> Iterator[Unit]:
    open_: Unit | None = None  # with the oddest line so far, and the sums of all
    for scored in lines:
        unit = _line(scored, "excess")
        if open_ is not None and scored.line.starts_document:
            yield _judged(open_, score)
            open_ = None
        if open_ is None:
            open_ = unit
            continue
        oddest = unit if unit.score > open_.score else open_
        open_ = replace(oddest, bits=open_.bits + unit.bits, size=open_.size + unit.size)
    if open_ is not None:
        yield _judged(open_, score)


def _judged(document: Unit, score: ScoreName) -> Unit:
    return document if score == "excess" else replace(document, score=document.bits_per_byte)


def whole_characters(content: bytes, start: int, stop: int) -> tuple[int, int]:
    """A span widened so that it cuts through no character of UTF-8."""
    for _ in range(3):
        if start > 0 and content[start] & 0xC0 == 0x80:
            start -= 1
        if stop < len(content) and content[stop] & 0xC0 == 0x80:
            stop += 1
    return start, stop


class Oddest:
    """The `most` oddest of all units that were added, at constant memory; of equal ones the first."""

    def __init__(self, most: int):
        self._most, self._added = most, 0
        self._heap: list[tuple[float, int, Unit]] = []

    def add(self, unit: Unit) -> None:
        self._added += 1
        entry = (unit.score, -self._added, unit)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def ordered(self) -> list[Unit]:
        """The oddest first."""
        return [unit for _, _, unit in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
