"""Synthetic tasks whose every answer follows from what was read: recall, copying, state tracking, planning.

An item is one row: tokens, and at each position the answer asked for there, or -100. The answer is asked of the logits
at that position, as of any next token. An item is a function of (task, parameters, split, seed, number) and of nothing
else, so that any of them can be drawn again, alone.

`chance` is the accuracy of a guesser who knows the rules and which answers the row admits, but not which is asked for.

Dimension letters: T length, V vocabulary, N items.
"""

import functools
import hashlib
import itertools
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal

import numpy as np

from dyadlm.errors import UserError
from dyadlm.values import coerce

UNSCORED = -100
Item = tuple[np.ndarray, np.ndarray]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task(ABC):
    """A task with its parameters. Raises `UserError` for parameters that leave no room for the question.

    length: T, tokens of an item.
    """

    name: ClassVar[str]
    length: int = 64

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            _require(not isinstance(value, int) or value >= 1, f"{entry.name} is {value}; it must be at least 1")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise `UserError` where the parameters do not fit together."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """V: tokens and answers are below it."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing among the answers that the row admits."""

    @property
    @abstractmethod
    def questions(self) -> int:
        """How many positions of an item are scored (on average, where that varies)."""

    @abstractmethod
    def draw(self, random: np.random.Generator) -> Item:
        """One item: tokens (T,) int64 and answers (T,) int64, -100 where nothing is asked."""

    def item(self, split: Split, seed: int, number: int) -> Item:
        """Item `number` (from 0) of a split; the splits are independent streams."""
        sequence = np.random.SeedSequence(self._entropy(split, seed), spawn_key=(number,))
        return self.draw(np.random.Generator(np.random.PCG64(sequence)))

    def items(self, split: Split, seed: int, numbers: Iterable[int]) -> Item:
        """Several items: tokens (N, T) and answers (N, T)."""
        rows = [self.item(split, seed, number) for number in numbers]
        return np.stack([tokens for tokens, _ in rows]), np.stack([answers for _, answers in rows])

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a task is a small frozen value
    def _entropy(self, split: Split, seed: int) -> int:
        name = json.dumps([self.name, asdict(self), split, seed], sort_keys=True)
        return int.from_bytes(hashlib.sha256(name.encode()).digest())

    def __str__(self) -> str:
        """The parameters as they are written: `length=64,pairs=4`, other defaults than these left out."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        shown = {entry.name for entry in fields(self) if given[entry.name] != entry.default} | {"length", "pairs"}
        return ",".join(f"{name}={value}" for name, value in given.items() if name in shown)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"{what}.")


def _blank_row(length: int, token: int = 0) -> Item:
    return np.full(length, token, np.int64), np.full(length, UNSCORED, np.int64)


def _other_than(random: np.random.Generator, excluded: np.ndarray, vocabulary: int, count: int) -> np.ndarray:
    """`count` tokens below `vocabulary`, uniform over those that are not in `excluded` (distinct)."""
    ordered = np.sort(excluded)
    drawn = random.integers(vocabulary - len(ordered), size=count)
    return drawn + np.searchsorted(ordered - np.arange(len(ordered)), drawn, side="right")


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

    `pairs` keys and values alternate at the beginning; then each key comes once more, and its value is asked for there.
    Keys are of the first half of the vocabulary (token 0 apart, the blank), values of the second half, each at most
    once in a row. A question comes 2n tokens after the pairs, n < (T - 2 pairs) / 2 drawn without replacement with
    weights (n + 1)^(power - 1). The answer itself is not part of the input: other tokens follow. Those are, by
    `filler`, `random`: uniform over the vocabulary without the keys of the row (in the original with them, which leaves
    a few questions without a determined answer), or `blank`: token 0.

    Chance: naming one of the row's values.
    """

    name = "mqar"
    pairs: int = 4
    vocabulary: int = 8192
    filler: Literal["random", "blank"] = "random"
    power: float = 0.01

    def check(self) -> None:
        _require(
            4 * self.pairs <= self.length,
            f"{self.pairs} pairs and their questions need length={4 * self.pairs} or more",
        )
        _require(
            self.vocabulary // 2 > self.pairs,
            f"{self.pairs} pairs need a vocabulary of at least {2 * self.pairs + 2}",
        )
        _require(self.power > 0, f"power is {self.power}; it must be above 0")

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    @property
    def questions(self) -> int:
        return self.pairs

    def draw(self, random: np.random.Generator) -> Item:
        half, start = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + random.choice(half - 1, self.pairs, replace=False)
        values = half + random.choice(self.vocabulary - half, self.pairs, replace=False)
        tokens, answers = _blank_row(self.length)
        if self.filler == "random":
            tokens[start:] = _other_than(random, keys, self.vocabulary, self.length - start)
        tokens[0:start:2], tokens[1:start:2] = keys, values
        # The least of exponential times with these rates: a weighted draw without replacement, in its order.
        rates = np.arange(1, (self.length - start) // 2 + 1) ** (self.power - 1.0)
        gaps = np.argsort(random.exponential(size=len(rates)) / rates, kind="stable")[: self.pairs]
        tokens[start + 2 * gaps] = keys
        answers[start + 2 * gaps] = values
        return tokens, answers


@dataclass(frozen=True)
class Induction(Task):
    """Induction heads (Olsson et al. 2022, arXiv 2209.11895; as in Gu & Dao 2023, arXiv 2312.00752).

    Random symbols, among them one special token; the special token again at the end: what followed it the first time?
    Symbols are 0 … `symbols` - 1, the special token is `symbols`.
    """

    name = "induction"
    length: int = 256
    symbols: int = 16

    def check(self) -> None:
        _require(self.length >= 3, f"length is {self.length}; a question takes at least 3 tokens")

    @property
    def vocabulary(self) -> int:
        return self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def questions(self) -> int:
        return 1

    def draw(self, random: np.random.Generator) -> Item:
        tokens, answers = _blank_row(self.length)
        tokens[:] = random.integers(self.symbols, size=self.length)
        place = int(random.integers(self.length - 2))
        tokens[[place, -1]] = self.symbols
        answers[-1] = tokens[place + 1]
        return tokens, answers


@dataclass(frozen=True)
class Copying(Task):
    """Selective copying (Gu & Dao 2023, arXiv 2312.00752).

    `tokens` symbols stand at random places among noise; at each of the last `tokens` positions, all of them the same
    mark, the next symbol is asked for, in order. Symbols are 0 … `symbols` - 1, then noise, then the mark.
    """

    name = "copying"
    length: int = 256
    tokens: int = 16
    symbols: int = 16

    def check(self) -> None:
        _require(
            2 * self.tokens <= self.length,
            f"{self.tokens} tokens and their copies need length={2 * self.tokens} or more",
        )

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def questions(self) -> int:
        return self.tokens

    def draw(self, random: np.random.Generator) -> Item:
        tokens, answers = _blank_row(self.length, self.symbols)
        data = random.integers(self.symbols, size=self.tokens)
        tokens[np.sort(random.choice(self.length - self.tokens, self.tokens, replace=False))] = data
        tokens[-self.tokens :] = self.symbols + 1
        answers[-self.tokens :] = data
        return tokens, answers


@dataclass(frozen=True)
class Parity(Task):
    """Random bits; at each, whether the ones so far are odd in number."""

    name = "parity"

    def check(self) -> None:
        pass

    @property
    def vocabulary(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / 2

    @property
    def questions(self) -> int:
        return self.length

    def draw(self, random: np.random.Generator) -> Item:
        bits = random.integers(2, size=self.length)
        return bits, np.cumsum(bits) % 2


@dataclass(frozen=True)
class FlipFlop(Task):
    """Flip-flop language modelling (Liu et al. 2023, arXiv 2306.00946).

    Instructions write (2), ignore (3) and read (4), each followed by a bit; a read by the bit last written, which is
    asked for at the instruction. The first writes, the last reads, the others ignore with probability `ignore` and else
    write or read alike.
    """

    name = "flipflop"
    length: int = 256
    ignore: float = 0.8

    def check(self) -> None:
        _require(
            self.length % 2 == 0 and self.length >= 4,
            f"length is {self.length}; instructions and bits alternate, so it must be even and at least 4",
        )
        _require(0 <= self.ignore <= 1, f"ignore is {self.ignore}; it is a probability, from 0 to 1")

    @property
    def vocabulary(self) -> int:
        return 5

    @property
    def chance(self) -> float:
        return 1 / 2

    @property
    def questions(self) -> int:
        return max(1, round(1 + (self.length / 2 - 2) * (1 - self.ignore) / 2))

    def draw(self, random: np.random.Generator) -> Item:
        count = self.length // 2
        rest = (1 - self.ignore) / 2
        instructions = random.choice([2, 3, 4], size=count, p=[rest, self.ignore, rest])
        instructions[0], instructions[-1] = 2, 4
        bits = random.integers(2, size=count)
        written = np.maximum.accumulate(np.where(instructions == 2, np.arange(count), 0))
        reads = instructions == 4
        bits[reads] = bits[written][reads]
        tokens, answers = _blank_row(self.length)
        tokens[0::2], tokens[1::2] = instructions, bits
        answers[0::2][reads] = bits[reads]
        return tokens, answers


@functools.cache
def permutation_table(elements: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """All permutations in lexical order, and the number of "first a, then b" at [a, b]."""
    every = list(itertools.permutations(range(elements)))
    numbers = {permutation: number for number, permutation in enumerate(every)}
    table = [[numbers[tuple(b[a[i]] for i in range(elements))] for b in every] for a in every]
    return every, np.array(table)


@dataclass(frozen=True)
class Permutations(Task):
    """Words of the symmetric group (Merrill et al. 2024, arXiv 2404.08819).

    Each token is a permutation of `elements` things, in lexical order (0 moves nothing); asked for at each token is
    what all of them so far come to, one applied after the other.
    """

    name = "permutations"
    length: int = 32
    elements: int = 5

    def check(self) -> None:
        _require(2 <= self.elements <= 6, f"elements is {self.elements}; it must be from 2 to 6")

    @property
    def vocabulary(self) -> int:
        return len(permutation_table(self.elements)[0])

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    @property
    def questions(self) -> int:
        return self.length

    def draw(self, random: np.random.Generator) -> Item:
        _, then = permutation_table(self.elements)
        word = random.integers(len(then), size=self.length)
        answers = itertools.accumulate(word.tolist(), lambda so_far, next_one: int(then[so_far, next_one]))
        return word, np.fromiter(answers, np.int64, self.length)


@dataclass(frozen=True)
class Needle(Task):
    """Pairs of key and value in a long stream, and much later the keys again.

    The first quarter of the vocabulary are keys, which appear nowhere else in the stream; the rest are values and
    distractors alike, so that a value says nothing of itself. The stream: distractors, `pairs` pairs in a row,
    `distance` distractors, and the keys in a random order, each asking for its value. distance None: another one for
    each item, every one that fits into `length` alike.

    Chance: naming one of all values.
    """

    name = "needle"
    length: int = 256
    distance: int | None = None
    pairs: int = 1
    vocabulary: int = 256

    def check(self) -> None:
        least = 3 * self.pairs + (self.distance or 0)
        _require(
            least <= self.length,
            f"{self.pairs} pairs at distance {self.distance} need length={least} or more",
        )
        _require(self.vocabulary // 4 >= self.pairs, f"{self.pairs} keys need vocabulary={4 * self.pairs} or more")

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 4)

    @property
    def questions(self) -> int:
        return self.pairs

    def draw(self, random: np.random.Generator) -> Item:
        keys_below = self.vocabulary // 4
        tokens, answers = _blank_row(self.length)
        tokens[:] = random.integers(keys_below, self.vocabulary, size=self.length)
        keys = random.choice(keys_below, self.pairs, replace=False)
        distance = self.distance
        if distance is None:
            distance = int(random.integers(self.length - 3 * self.pairs + 1))
        end = self.length - self.pairs - distance
        tokens[end - 2 * self.pairs : end : 2] = keys
        values = tokens[end - 2 * self.pairs + 1 : end : 2]
        order = random.permutation(self.pairs)
        tokens[-self.pairs :], answers[-self.pairs :] = keys[order], values[order]
        return tokens, answers


@dataclass(frozen=True)
class PathStar(Task):
    """The path-star graph (Bachmann & Nagarajan 2024, arXiv 2403.06963): which way leads to the goal?

    `degree` arms leave one start, each of `path` nodes, the start counted; nodes are 0 … `nodes` - 1, drawn without
    replacement. A row: blanks; all edges, two nodes each, away from the start, shuffled; then a mark (`nodes`), the
    start and the end of one arm, the goal; then a second mark (`nodes` + 1) and the nodes of that arm after the start,
    the goal left out. Asked for at the second mark and at each node behind it is the next node, or with `ask=first` at
    the mark alone. Blank is `nodes` + 2.

    The first step can only be found by looking ahead to the goal; each later one is simply the end of the edge that
    begins at the node just read. Chance takes any arm and then follows the edges: 1 / degree at the first step, 1 at
    the others.
    """

    name = "path-star"
    degree: int = 2
    path: int = 5
    nodes: int = 50
    ask: Literal["all", "first"] = "all"

    def check(self) -> None:
        _require(self.path >= 2, f"path is {self.path}; it must be at least 2")
        _require(self.degree >= 2, f"degree is {self.degree}; it must be at least 2")
        edges = self.degree * (self.path - 1)
        _require(edges < self.nodes, f"{self.degree} arms of {self.path} need nodes={edges + 1} or more")
        least = 2 * edges + self.path + 2
        _require(least <= self.length, f"{self.degree} arms of {self.path} need length={least} or more")

    @property
    def vocabulary(self) -> int:
        return self.nodes + 3

    @property
    def chance(self) -> float:
        return (1 + (self.questions - 1) * self.degree) / (self.questions * self.degree)

    @property
    def questions(self) -> int:
        return 1 if self.ask == "first" else self.path - 1

    def draw(self, random: np.random.Generator) -> Item:
        tokens, answers = _blank_row(self.length, self.nodes + 2)
        drawn = random.choice(self.nodes, self.degree * (self.path - 1) + 1, replace=False)
        start, arms = drawn[0], drawn[1:].reshape(self.degree, self.path - 1)
        whole = np.insert(arms, 0, start, axis=1)
        edges = np.stack([whole[:, :-1], whole[:, 1:]], axis=-1).reshape(-1, 2)
        way = arms[0]  # its nodes were drawn as those of the others, and its edges are among theirs
        question = [self.nodes, start, way[-1], self.nodes + 1, *way[:-1]]
        row = np.concatenate([random.permutation(edges).ravel(), question])
        tokens[-len(row) :] = row
        answers[len(tokens) - len(way) :][: self.questions] = way[: self.questions]
        return tokens, answers


@dataclass(frozen=True)
class Lookahead(Task):
    """Copying with lookahead: which string is to be copied is known by its end alone.

    A row: blanks; `strings` strings of `tokens` symbols, a bar behind each; the last symbol of one of them; a mark, and
    that string without its last symbol. Asked for at the mark and at each symbol behind it is the next symbol of the
    string, the last included, or with `ask=first` at the mark alone. First symbols of the strings differ, and so do
    last ones; all else is uniform. Symbols are 0 … `symbols` - 1, then the bar, the mark and blank.

    Chance copies any of the strings, and the right one once its first symbol is known: 1 / strings at the first step,
    1 at the others.
    """

    name = "lookahead"
    strings: int = 4
    tokens: int = 8
    symbols: int = 32
    ask: Literal["all", "first"] = "all"

    def check(self) -> None:
        _require(self.tokens >= 2, f"tokens is {self.tokens}; it must be at least 2")
        _require(self.strings >= 2, f"strings is {self.strings}; it must be at least 2")
        _require(self.strings <= self.symbols, f"{self.strings} strings need symbols={self.strings} or more")
        least = self.strings * (self.tokens + 1) + self.tokens + 1
        _require(least <= self.length, f"{self.strings} strings of {self.tokens} need length={least} or more")

    @property
    def vocabulary(self) -> int:
        return self.symbols + 3

    @property
    def chance(self) -> float:
        return (1 + (self.questions - 1) * self.strings) / (self.questions * self.strings)

    @property
    def questions(self) -> int:
        return 1 if self.ask == "first" else self.tokens

    def draw(self, random: np.random.Generator) -> Item:
        bar, mark, blank = range(self.symbols, self.symbols + 3)
        tokens, answers = _blank_row(self.length, blank)
        strings = random.integers(self.symbols, size=(self.strings, self.tokens))
        for end in (0, -1):
            strings[:, end] = random.choice(self.symbols, self.strings, replace=False)
        asked = strings[random.integers(self.strings)]
        row = np.concatenate([np.insert(strings, self.tokens, bar, axis=1).ravel(), [asked[-1], mark], asked[:-1]])
        tokens[-len(row) :] = row
        answers[len(tokens) - len(asked) :][: self.questions] = asked[: self.questions]
        return tokens, answers


TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (AssociativeRecall, Induction, Copying, Parity, FlipFlop, Permutations, Needle, PathStar, Lookahead)
}  # fmt: skip
"""All tasks by their name."""
# What is trained on, and what the same weights are asked beside it, where nothing else is said.
TRAINED: dict[str, tuple[str, ...]] = {
    "mqar": ("length=64,pairs=4", "length=128,pairs=8", "length=256,pairs=16", "length=512,pairs=64"),
    "induction": ("length=64", "length=256"),
    "copying": ("length=256",),
    "parity": ("length=64",),
    "flipflop": ("length=256",),
    "permutations": ("length=32",),
    "needle": ("length=64,pairs=8", "length=256,pairs=8"),
    "path-star": ("length=23",),
    "lookahead": ("length=45",),
}
TESTED: dict[str, tuple[str, ...]] = {
    "mqar": ("length=4096,pairs=64", "length=65536,pairs=64"),
    "induction": ("length=4096",),
    "copying": ("length=4096",),
    "parity": ("length=256",),
    "flipflop": ("length=256,ignore=0.98", "length=256,ignore=0.1"),
    "permutations": ("length=128",),
    "needle": tuple(f"length={d + 1024},distance={d},pairs=8" for d in (1_000, 10_000, 100_000, 1_000_000)),
    "path-star": ("length=23,ask=first",),
    "lookahead": ("length=45,ask=first",),
}


def parse_task(name: str, text: str = "") -> Task:
    """A task from its name and its parameters, `length=64,pairs=4`; those left out have their default.

    Raises `UserError` for an unknown task, parameter or value.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
    hints = typing.get_type_hints(TASKS[name])
    known = [entry.name for entry in fields(TASKS[name])]
    given = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise UserError(f"The task {name} has no parameter {key!r}; it has {', '.join(known)}.")
        given[key] = coerce(value, hints[key], f"{name} {key}")
    return TASKS[name](**given)
