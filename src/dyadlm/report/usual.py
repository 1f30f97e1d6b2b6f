"""What was measured on other models of about a model's size, to stand beside its figures.

usual.json is written by benchmarks/usual.py from the answers in benchmarks/results/diagnosis (docs/failures.md).
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dyadlm.diagnose import Diagnosis

NEAR = 2.0  # models whose numbers of parameters differ by no more than this factor are of one size
BYTES = 259  # the vocabulary of the measured models; figures per token of others do not compare
TEXTS = "trained on 1.02M bytes of Shakespeare’s plays and asked about Hamlet (docs/failures.md)"


class Kind(NamedTuple):
    """One measured kind of model. ranges: by probe and reading, the lowest and the highest seed."""

    name: str
    parameters: int
    over_time: bool
    seeds: int
    ranges: Mapping[str, Mapping[str, Sequence[float]]]


def usual(diagnosis: Diagnosis) -> list[Kind]:
    """The measured kinds of about the size of this model, asked in the same way. None: there is no measured range."""
    subject, parameters = _mapping(diagnosis.circumstances.get("subject")), parameters_of(diagnosis)
    over_time = "last" in subject
    if not parameters or _mapping(subject.get("last", subject)).get("vocabulary") != BYTES:
        return []
    return [
        kind for kind in measured() if kind.over_time == over_time and 1 / NEAR <= kind.parameters / parameters <= NEAR
    ]


def usual_of_all(diagnoses: Sequence[Diagnosis]) -> list[Kind]:
    """As `usual`, of models that stand beside each other: None where they are not of one size."""
    first, *others = [usual(each) for each in diagnoses]
    return first if all(kinds == first for kinds in others) else []


def parameters_of(diagnosis: Diagnosis) -> int:
    """The number of a model's parameters, 0 if it is not known: what is stored is not believed to be a number."""
    parameters = _mapping(diagnosis.circumstances.get("size")).get("parameters")
    return parameters if isinstance(parameters, int) and parameters > 0 else 0


def ground() -> str:
    """What the ranges rest on, as the end of a sentence."""
    kinds = measured()
    seeds = sorted({kind.seeds for kind in kinds})
    return f"{' or '.join(map(str, seeds))} seeds each, {TEXTS}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@cache
def measured() -> list[Kind]:
    """All that was measured."""
    stored: list[dict[str, Any]] = json.loads((Path(__file__).parent / "usual.json").read_text(encoding="utf-8"))
    return [Kind(**entry) for entry in stored]
