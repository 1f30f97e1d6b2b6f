"""Probes on a model, one after the other: resumable, in bounded memory, and none stops the others."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.probe import Budget, NotApplicable, OverTime, Probe, in_words
from dyadlm.diagnose.result import ProbeResult
from dyadlm.diagnose.trajectory import Trajectory
from dyadlm.errors import UserError
from dyadlm.files import write_atomically
from dyadlm.version import __version__

FORMAT = "dyadlm-diagnosis"


@dataclass(frozen=True)
class Diagnosis:
    """All results on one model, and what is needed to repeat them. results: by the probe's id, in the order asked."""

    subject: str
    results: Mapping[str, ProbeResult]
    circumstances: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        results = {name: result.to_dict() for name, result in self.results.items()}
        return {
            "format": FORMAT,
            "subject": self.subject,
            "circumstances": dict(self.circumstances),
            "results": results,
        }

    @classmethod
    def load(cls, path: Path) -> "Diagnosis":
        """Read what `diagnose` wrote. Raises `UserError` if it is no such file."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise ValueError(stored["format"])
            results = {name: ProbeResult.from_dict(entry) for name, entry in stored["results"].items()}
            return cls(stored["subject"], results, stored["circumstances"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no diagnosis; write one with `dyadlm diagnose --output DIR`.") from error


def diagnose(
    subject: Subject | Trajectory,
    material: Material,
    probes: Sequence[Probe],
    budget: Budget | None = None,
    output: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda probe, done, total: None,
) -> Diagnosis:
    """Ask every probe, `leak` first; what is wrong with one is its result, and the others still run.

    subject: a model, or the checkpoints of a training.
    output: a JSON file, rewritten after each probe; results that stand there for the same model, text and budget are
    not measured again. progress: called with (the probe's id, done, total).

    Raises:
        UserError: `output` holds something else than a diagnosis, or that of another model, text, budget or version.
    """
    budget = budget or Budget()
    circumstances = {
        "subject": dict(subject.identity),
        "material": {
            "name": material.name,
            "split": material.split,
            "tokens": sum(len(stream) for stream in material.text),
        },
        "size": {"parameters": _parameters(subject)},
        "budget": {"tokens": budget.tokens, "fast": budget.fast, "seed": budget.seed},
        "versions": {"dyadlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    circumstances = json.loads(json.dumps(circumstances))  # as they will be read back
    known: dict[str, ProbeResult] = {}
    if output is not None and output.exists():
        before = Diagnosis.load(output)
        if differing := _differing(before, circumstances):
            raise UserError(f"{output} is a diagnosis of another {differing}; choose another --output.")
        known = dict(before.results)
    results = dict(known)
    for probe in leak_first(probes):
        if probe.id not in known or known[probe.id].failed:
            results[probe.id] = ask(probe, subject, material, budget, progress)
        if output is not None:
            write_atomically(output, json.dumps(Diagnosis(subject.name, results, circumstances).to_dict()) + "\n")
    asked = {probe.id: results[probe.id] for probe in probes}
    return Diagnosis(subject.name, asked, circumstances)


def leak_first(probes: Sequence[Probe]) -> list[Probe]:
    """Short texts turn the sparse attention of some models (BigBird) off for good, and with it what leaks."""
    return sorted(probes, key=lambda probe: probe.id != "leak")


def _parameters(subject: Subject | Trajectory) -> int | None:
    """Of a model, or of the last checkpoint; None where there is no module to count."""
    module = (subject.last if isinstance(subject, Trajectory) else subject).module
    return None if module is None else sum(weight.numel() for weight in module.parameters())


def _differing(before: Diagnosis, circumstances: Mapping[str, Any]) -> str:
    """What of the circumstances is not alike, in words."""
    named = {"subject": "model", "material": "text", "budget": "budget", "versions": "version"}
    return " and ".join(word for what, word in named.items() if before.circumstances.get(what) != circumstances[what])


def ask(
    probe: Probe,
    subject: Subject | Trajectory,
    material: Material,
    budget: Budget,
    progress: Callable[[str, int, int], None] = lambda probe, done, total: None,
) -> ProbeResult:
    """One probe's result, also where it does not apply or fails."""
    begin = time.perf_counter()
    progress(probe.id, 0, 1)  # what a probe does before its first step may take a while
    told = replace(budget, progress=lambda done, total: progress(probe.id, done, total))

    def run() -> ProbeResult:
        if not isinstance(subject, Trajectory):
            return probe.run(subject, material, told)
        if isinstance(probe, OverTime):
            return probe.run_over(subject, material, told)
        raise NotApplicable("it looks at one model, not at its training; leave --over-time out")

    return replace(settled(probe, run), seconds=round(time.perf_counter() - begin, 2))


def settled(probe: Probe, run: Callable[[], ProbeResult]) -> ProbeResult:
    """What `run` returns, or why the probe does not apply or failed. A headline that is not a number is no answer."""
    try:
        result = run()
        headline = next(iter(result.readings), None)
        if headline is not None and math.isnan(result.readings[headline].value):
            raise NotApplicable(f"what it found ({headline}) is not a number")
        return result
    except NotApplicable as reason:
        return ProbeResult(probe.id, not_applicable=str(reason))
    except Exception as error:  # a model of someone else may raise anything
        return ProbeResult(probe.id, failed=str(error) if isinstance(error, UserError) else in_words(error))
