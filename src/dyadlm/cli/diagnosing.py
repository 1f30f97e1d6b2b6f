"""What `dyadlm diagnose` does with each model, in this process or in others."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from dyadlm.cli.shared import errors, silence_transformers

if TYPE_CHECKING:
    from dyadlm.cluster import Engine
    from dyadlm.diagnose import Budget, Diagnosis, Subject

Progressed = Callable[[str, int, int], None]  # called with a probe's id, and how much of how much is done
Bar = Callable[[str], AbstractContextManager[Progressed]]  # for a title
REFERENCES = "references"
# Logits of one batch, in numbers of four bytes; a few times as many stand in memory at the peak.
LOGITS_AT_ONCE = 2**25
# The share of a probe's text that --fast reads, and with more parameters than LARGE.
FAST, FAST_LARGE, LARGE = 1 / 4, 1 / 16, 30_000_000


def names(models: Sequence[str]) -> list[str]:
    """A name for each model's file, all different."""
    taken: list[str] = []
    for model in models:
        path = Path(model)
        parts = path.resolve().parts if path.exists() else path.parts
        wanted = parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(wanted)) or "model"
        number = 2
        while (name if number == 2 else f"{name}-{number - 1}") in taken:
            number += 1
        taken.append(name if number == 2 else f"{name}-{number - 1}")
    return taken


@dataclass(frozen=True)
class Request:
    """What is asked of all models. models: by the name of each one's file. probes: their ids."""

    models: Mapping[str, str]
    probes: Sequence[str]
    data: list[str]
    split: str
    fast: bool
    seed: int
    output: Path | None
    device: str
    dtype: str
    over_time: bool


def diagnose_one(request: Request, name: str, bar: Bar) -> "Diagnosis":
    from dyadlm.diagnose import chosen, diagnose
    from dyadlm.diagnose.candidates import load_material, load_subject, load_trajectory

    model, over_time = request.models[name], request.over_time
    with errors.status(Text(f"reading {model}")):
        trajectory = load_trajectory(model, request.device, request.dtype) if over_time else None
        subject = load_subject(model, request.device, request.dtype) if trajectory is None else trajectory.last
        material = load_material(model, subject, request.data, request.split)
    budget = budget_for(subject, request.fast, request.seed)
    asked = trajectory or subject
    path = None if request.output is None else request.output / f"{name}{'-over-time' * over_time}.json"
    if trajectory is not None:
        del subject  # of the checkpoints one at a time is in memory
    with bar(asked.name) as progress:
        return diagnose(asked, material, chosen(request.probes), budget, path, progress)


def diagnose_all(request: Request, jobs: int, engine: "Engine", address: str | None) -> "list[Diagnosis]":
    """Each model in a process of its own, a line when it is done. The files of --output are written there: all machines
    of a cluster have to see the same folder."""
    from dyadlm.workers import run_tasks

    found: dict[str, Diagnosis] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs) if engine == "local" else 1
    work = partial(_diagnose_alone, request, threads)
    for name, diagnosis in run_tasks(
        work, lambda: [one for one in request.models if one not in found], jobs, engine, address
    ):
        found[name] = diagnosis
        errors.print(f"[{len(found)}/{len(request.models)}] {name}")
    return [found[name] for name in request.models]


def _diagnose_alone(request: Request, threads: int, name: str) -> "Diagnosis":
    """In a process of its own. threads: of torch, so that several processes share the cores."""
    import torch

    torch.set_num_threads(threads)
    silence_transformers()
    return diagnose_one(request, name, lambda title: nullcontext(lambda probe, done, total: None))


def diagnose_references(request: Request, bar: Bar) -> "list[Diagnosis]":
    """What the first model has to be better than: itself with random weights, and counts of its training text."""
    from dyadlm.diagnose import chosen, diagnose
    from dyadlm.diagnose.candidates import load_material, load_subject
    from dyadlm.diagnose.ngram import NGram

    model = next(iter(request.models.values()))
    subject = load_subject(model, request.device, request.dtype)
    material = load_material(model, subject, request.data, request.split)
    others = [subject.untrained()]
    if material.train:
        others.append(NGram(material.train, subject.vocabulary, subject.tokenizer))
    found = []
    for other in others:
        if other is not None:
            path = None if request.output is None else request.output / REFERENCES / f"{names([other.name])[0]}.json"
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            with bar(other.name) as progress:
                budget = budget_for(subject, request.fast, request.seed)
                found.append(diagnose(other, material, chosen(request.probes), budget, path, progress))
    return found


def budget_for(subject: "Subject", fast: bool, seed: int) -> "Budget":
    from dyadlm.diagnose import Budget

    batch = max(1, min(8192, LOGITS_AT_ONCE // subject.vocabulary))
    large = subject.module is not None and sum(weight.numel() for weight in subject.module.parameters()) > LARGE
    share = (FAST_LARGE if large else FAST) if fast else 1.0
    return Budget(batch_tokens=batch, tokens=share, fast=fast, seed=seed)
