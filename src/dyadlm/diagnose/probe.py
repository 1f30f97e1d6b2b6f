"""A probe: one question to a model, its answer in figures, and the models for which the right answer is known."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.result import ProbeResult

if TYPE_CHECKING:
    from dyadlm.diagnose.material import Material


class NotApplicable(Exception):
    """The question makes no sense for this model; says why."""


class TooLittle(NotApplicable):
    """There is not enough text, or context, to answer; says of what."""


@dataclass(frozen=True)
class Budget:
    """How much a probe may spend.

    tokens: as a factor of the probe's own number. batch_tokens: tokens read at once, for memory. fast: leave out what
    is not needed for the headline, and say so in `left_out`. progress: to be called with (done, total).
    """

    tokens: float = 1.0
    batch_tokens: int = 8192
    fast: bool = False
    seed: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens are read at once."""
        return max(1, self.batch_tokens // length)


@dataclass(frozen=True)
class Expected:
    """A value that a control must show: |value - expected| <= tolerance."""

    value: float
    tolerance: float


@dataclass(frozen=True)
class Control:
    """A model made so that the right answer is known without training. make: the model, and what it reads.

    shows: whether it has the property that the probe looks for (+) or lacks it (-). derivation: where the expected
    values come from.
    """

    name: str
    shows: bool
    make: Callable[[], "tuple[Subject, Material]"]
    expected: Mapping[str, Expected]
    derivation: str


class Probe(ABC):
    """Subclasses say in their docstring: definition, formula, units, direction, paper, pitfalls.

    id: its name. failure_mode: the row of the paper's table (F1 to F12). question: in plain words. tokens: that it
    reads with a budget of 1.
    """

    id: ClassVar[str]
    failure_mode: ClassVar[str]
    question: ClassVar[str]
    tokens: ClassVar[int]

    @abstractmethod
    def run(self, subject: Subject, material: "Material", budget: Budget) -> ProbeResult:
        """Ask. Raises `NotApplicable` with the reason, in words that end a sentence begun with the probe's name."""

    @abstractmethod
    def controls(self) -> Sequence[Control]:
        """At least one that shows the property and one that lacks it, of under two seconds each."""
