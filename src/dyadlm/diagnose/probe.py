"""A probe: one question to a model, its answer in figures, and the models for which the right answer is known."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dyadlm.diagnose.contract import NotApplicable as NotApplicable
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.result import ProbeResult
from dyadlm.diagnose.trajectory import Trajectory

if TYPE_CHECKING:
    from dyadlm.diagnose.material import Material


class TooLittle(NotApplicable):
    """There is not enough text, or context, to answer; says of what."""


def in_words(error: Exception) -> str:
    """The kind of an error and its first line, which says more than no report would."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no message'}"


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
    """A model made so that the right answer is known without training. make: the model, or its checkpoints, and what
    they read.

    shows: whether it has the property that the probe looks for (+) or lacks it (-). derivation: where the expected
    values come from.
    """

    name: str
    shows: bool
    make: Callable[[], "tuple[Subject | Trajectory, Material]"]
    expected: Mapping[str, Expected]
    derivation: str


@dataclass(frozen=True)
class Published:
    """A value that the literature, or a measurement made elsewhere, gives of a model. command: that would show it."""

    value: str
    model: str
    source: str
    command: str


class Probe(ABC):
    """Subclasses say in their docstring: definition, formula, units, direction, paper, pitfalls; and
    "Evidence", what others found of the claim that it is made to check, where there is any: printed beside the results.

    id: its name. failure_mode: the row of the paper's table (F1 to F12). question: in plain words. meaning: one
    sentence that says what the headline measures and how to read it. tokens: that it reads with a budget of 1.
    published: values of models of others that it should find.
    """

    id: ClassVar[str]
    failure_mode: ClassVar[str]
    question: ClassVar[str]
    meaning: ClassVar[str]
    tokens: ClassVar[int]
    published: ClassVar[Sequence[Published]] = ()

    @abstractmethod
    def run(self, subject: Subject, material: "Material", budget: Budget) -> ProbeResult:
        """Ask. Raises `NotApplicable` with the reason, in words that end a sentence begun with the probe's name."""

    @abstractmethod
    def controls(self) -> Sequence[Control]:
        """At least one that shows the property and one that lacks it, of under two seconds each."""

    def texts(self, budget: Budget, length: int, least: int = 8) -> tuple[int, str]:
        """How many texts to read, of which each costs `length` tokens, and what that leaves out, in words."""
        whole = max(least, self.tokens // length)
        count = max(least, int(budget.tokens * self.tokens) // length)
        return count, f"{count} texts instead of {whole}" if count < whole else ""


class OverTime(Probe):
    """A probe that looks at the checkpoints of a training, one at a time, and reads them together.

    One that also has something to say of a single model overrides `run`.
    """

    def run(self, subject: Subject, material: "Material", budget: Budget) -> ProbeResult:
        raise NotApplicable("one model tells nothing of its training; give a run with checkpoints: --over-time")

    def run_over(self, trajectory: Trajectory, material: "Material", budget: Budget) -> ProbeResult:
        """Ask all checkpoints. Raises `NotApplicable` with the reason, too few of them being one."""
        if len(trajectory.steps) < 2:
            raise NotApplicable(f"{trajectory.name} has fewer than two checkpoints; train with a smaller save_steps")
        quiet = replace(budget, progress=lambda done, total: None)
        seen = []
        for step in trajectory.steps:
            seen.append(self.observe(trajectory.load(step), material, quiet))  # dropped before the next is loaded
            budget.progress(len(seen), len(trajectory.steps))
        return self.conclude(trajectory.steps, seen, budget)

    @abstractmethod
    def observe(self, subject: Subject, material: "Material", budget: Budget) -> Any:
        """What is kept of one checkpoint: small, and nothing of the model itself."""

    @abstractmethod
    def conclude(self, steps: Sequence[int], seen: Sequence[Any], budget: Budget) -> ProbeResult:
        """What is to be said of checkpoints at these steps, ascending, by what was observed of each; two at least."""
