"""A study: models × learning rates × seeds on one task, each cell trained on fresh items and scored on others.

Dimension letters: B rows, T length, N questions, V vocabulary.
"""

import itertools
import json
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dyadlm.cluster import Engine
from dyadlm.errors import UserError
from dyadlm.files import write_atomically
from dyadlm.model import DyadForCausalLM
from dyadlm.recall.models import Reader, build_model
from dyadlm.recall.tasks import TESTED, TRAINED, Split, Task, parse_task
from dyadlm.train.optimizer import decayed_parameters, learning_rate_factor
from dyadlm.train.options import PlannerOptions, TrainOptions
from dyadlm.train.planner import PlannerLessons
from dyadlm.version import __version__
from dyadlm.workers import run_tasks

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""What is tried where nothing else is said, the same for every model."""
SOLVED = 0.999
RECENT_STEPS = 20  # of each part: what the running accuracy looks back on
CHUNK = 1024  # longer rows are read in chunks of so many tokens
TOKENS_AT_ONCE = 8192
FEWEST_ROWS = 4
FORMAT = "dyadlm-recall"
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Recipe:
    """What all models of a study have in common.

    task: its name. parts: the parameters trained on, in turn, a step each, and scored; tests: parameters that the same
        weights are only asked. Empty: those of `TRAINED` and `TESTED`.
    batch_size: rows of a step, fewer where they would have more than `batch_tokens` tokens.
    steps: optimizer steps; None: as many as fit into `minutes`, the schedule following the clock, which no one can
        repeat to the letter. minutes: of training, at most, in either case: of the training thread's own time, so that
        what else runs on the machine costs no model a step.
    weight_decay: of matrices, embeddings apart. warmup: fraction of the training.
    questions: to score each part with, at least, unless that takes more than `test_tokens` tokens or `test_minutes`.
    """

    task: str
    parts: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    batch_size: int = 32
    batch_tokens: int = 8192
    steps: int | None = None
    minutes: float = 10.0
    weight_decay: float = 0.1
    warmup: float = 0.05
    questions: int = 4000
    test_tokens: int = 2**19
    test_minutes: float = 5.0

    def __post_init__(self) -> None:
        parse_task(self.task)
        given = bool(self.parts)
        for name, texts in (
            ("parts", self.parts or TRAINED[self.task]),
            ("tests", self.tests if self.tests or given else TESTED[self.task]),
        ):
            object.__setattr__(self, name, tuple(str(parse_task(self.task, text)) for text in texts))
        for name in ("batch_size", "batch_tokens", "minutes", "questions", "test_tokens", "test_minutes"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}; it must be at least 1.")

    @property
    def trained(self) -> list[Task]:
        return [parse_task(self.task, text) for text in self.parts]

    @property
    def asked(self) -> list[Task]:
        return [parse_task(self.task, text) for text in dict.fromkeys(self.parts + self.tests)]

    def rows(self, task: Task) -> int:
        """Rows of a training step."""
        return max(1, min(self.batch_size, self.batch_tokens // task.length))


@dataclass(frozen=True)
class Cell:
    """One model, one learning rate, one seed. model: as in `build_model`; given: fields of its configuration."""

    model: str
    rate: float
    seed: int
    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UserError(f"A learning rate is {self.rate:g}; it must be above 0.")

    @property
    def label(self) -> str:
        return " ".join([self.model, *(f"{key}={json.dumps(value)}" for key, value in sorted(self.given.items()))])

    @property
    def name(self) -> str:
        return f"{self.label} rate={self.rate:g} seed={self.seed}"


class Study:
    """Cells by name in one JSON file, together with the recipe; a cell that is there is not measured again."""

    def __init__(self, path: Path | None, recipe: Recipe, circumstances: Mapping[str, Any] | None = None):
        """Raises `UserError` if the file holds something else, or cells of another recipe."""
        self.path, self.recipe = path, recipe
        self.circumstances = dict(circumstances or {})
        self.results: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known = content["format"] == FORMAT and isinstance(content["cells"], dict)
            recipe = dict(content["recipe"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no recall study; choose another file for this one.") from error
        ours = json.loads(json.dumps(asdict(self.recipe)))
        if not known or recipe != ours:
            other = [key for key in ours if recipe.get(key) != ours[key]]
            raise UserError(
                f"{self.path} holds a study with another {', '.join(other) or 'format'}; choose another file."
            )
        self.results |= content["cells"]

    def run(self, cell: Cell, device: str = "cpu", progress: Progress | None = None) -> dict[str, Any]:
        """The result of a cell: from the file, or measured now and written to it."""
        if cell.name not in self.results:
            self._keep(cell.name, measure(cell, self.recipe, device, progress), circumstances(device))
        return self.results[cell.name]

    def run_all(
        self,
        cells: Sequence[Cell],
        jobs: int,
        engine: Engine = "local",
        address: str | None = None,
        device: str = "cpu",
    ) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Measure the cells that are missing, each in a process of its own (`dyadlm.workers.run_tasks`), and yield each
        when it is done and written."""
        by_name = {cell.name: cell for cell in cells}
        threads = max(1, (os.cpu_count() or 1) // jobs) if engine == "local" else 1
        work = partial(_measure_alone, by_name, self.recipe, device, threads)

        def wanted() -> list[str]:
            return [name for name in by_name if name not in self.results]

        for name, result in run_tasks(work, wanted, jobs, engine, address):
            self._keep(name, *result)
            yield by_name[name], self.results[name]

    def _keep(self, name: str, result: dict[str, Any], circumstances: dict[str, Any]) -> None:
        self._read()  # what another process has put there meanwhile
        self.results[name] = result | {"circumstances": circumstances | self.circumstances}
        if self.path is not None:
            content = {"format": FORMAT, "recipe": asdict(self.recipe), "cells": self.results}
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")


def _measure_alone(
    cells: Mapping[str, Cell], recipe: Recipe, device: str, threads: int, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result and its circumstances, in a process of its own. threads: of torch, so that processes share the cores."""
    torch.set_num_threads(threads)
    return measure(cells[name], recipe, device), circumstances(device)


def circumstances(device: str) -> dict[str, Any]:
    """What a figure needs beside it."""
    return {
        "device": device,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {"dyadlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def measure(cell: Cell, recipe: Recipe, device: str = "cpu", progress: Progress | None = None) -> dict[str, Any]:
    """Build the model of a cell, train it and ask it everything."""
    parts = recipe.asked
    longest = max(task.length for task in recipe.trained)
    vocabulary = max(task.vocabulary for task in parts)
    model = build_model(cell.model, vocabulary, longest, cell.given, cell.seed)
    model.to(torch.device(device))  # type: ignore[arg-type]
    if isinstance(model, DyadForCausalLM) and model.planner is not None:
        model.accompany("planner", PlannerLessons(model, PlannerOptions()))
    reader = Reader(model)
    report = {
        "label": cell.label,
        "rate": cell.rate,
        "seed": cell.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_numbers": {str(length): reader.state_numbers(length) for length in (max(1, longest // 2), longest)},
    }
    cost = train(reader, recipe, cell.rate, cell.seed, progress)
    scores = {}
    for task in parts:
        if progress is not None:
            progress(1.0, f"asking {task}")
        scores[str(task)] = score(reader, task, recipe)
    return report | cost | {"parts": scores}


def train(reader: Reader, recipe: Recipe, rate: float, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """AdamW, warm-up, cosine, clipping at 1, on items that never come twice, the parts in turn.

    Ends early when the recent accuracy on each part is at least `SOLVED`, or the loss is not finite. Milliseconds per
    step are the training thread's (on a GPU the clock's), seconds those of the clock on the wall.
    """
    model, tasks = reader.model, recipe.trained
    names = set(decayed_parameters(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in names], "weight_decay": recipe.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
    recent: list[deque[tuple[int, int]]] = [deque(maxlen=RECENT_STEPS) for _ in tasks]
    torch.manual_seed(seed)
    model.train()
    # What a GPU does is no time of the thread.
    clock = time.thread_time if model.device.type == "cpu" else time.perf_counter
    started, worked, limit = time.perf_counter(), clock(), 60 * recipe.minutes
    steps, spent, stopped = 0, 0.0, "steps"
    for step in itertools.count():
        done = spent / limit if recipe.steps is None else step / recipe.steps
        if spent >= limit or done >= 1:
            stopped = "minutes" if spent >= limit else "steps"
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * _factor(done, recipe.warmup)
        turn, part = divmod(step, len(tasks))
        rows = recipe.rows(tasks[part])
        tokens, answers = batch(tasks[part], "train", seed, turn * rows, rows, model.device)
        if isinstance(model, DyadForCausalLM):
            model.set_progress(done)
        logits, loss = reader.learn(tokens, answers)
        if not math.isfinite(loss.item()):
            stopped = "diverged"
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = logits.argmax(-1) == answers[answers >= 0]
        recent[part].append((int(right.sum()), right.numel()))
        steps, spent = step + 1, clock() - worked
        running = [sum(c for c, _ in counts) / max(1, sum(n for _, n in counts)) for counts in recent]
        if progress is not None:
            rates = f"{steps / (time.perf_counter() - started):.1f} steps/s"
            progress(done, f"{rates}, loss {loss.item():.3f}, right {' '.join(f'{value:.3f}' for value in running)}")
        if all(len(counts) == RECENT_STEPS for counts in recent) and min(running) >= SOLVED:
            stopped = "solved"
            break
    if isinstance(model, DyadForCausalLM):
        model.set_progress(1.0)
    return {
        "stopped": stopped,
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "milliseconds_per_step": round(1000 * spent / steps, 1) if steps else None,
        "running_accuracy": {
            str(task): round(sum(c for c, _ in counts) / max(1, sum(n for _, n in counts)), 4)
            for task, counts in zip(tasks, recent, strict=True)
        },
    }


def _factor(done: float, warmup: float) -> float:
    """The learning rate's factor after a fraction of the training."""
    fine = 1_000_000
    return learning_rate_factor(
        round(done * fine), warmup_steps=max(1, round(warmup * fine)), max_steps=fine, options=TrainOptions()
    )


def batch(task: Task, split: Split, seed: int, first: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Items first … first + rows - 1: tokens and answers, (B, T) each."""
    tokens, answers = task.items(split, seed, range(first, first + rows))
    return torch.from_numpy(tokens).to(device), torch.from_numpy(answers).to(device)


def score(reader: Reader, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Right answers of all that were asked, on items of the test split, with a 95 % interval.

    Rows longer than `CHUNK` are read in chunks, with the model's state, where the model can go on from one.
    """
    rows = min(math.ceil(recipe.questions / task.questions), max(FEWEST_ROWS, recipe.test_tokens // task.length))
    chunk = CHUNK if task.length > CHUNK and reader.continues() else task.length
    at_once = max(1, TOKENS_AT_ONCE // chunk)
    started = time.perf_counter()
    deadline = started + 60 * recipe.test_minutes
    correct = total = 0
    ended = "all"
    with reader.resting():
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            tokens, answers = batch(task, "test", 0, first, count, reader.model.device)
            try:
                right = _right(reader, tokens, answers, chunk, deadline)
            except IndexError:  # learned positions end somewhere
                ended = "positions"
                break
            if right is None:
                ended = "minutes"
                break
            correct, total = correct + right, total + int((answers >= 0).sum())
    low, high = wilson(correct, total)
    return {
        "correct": correct,
        "total": total,
        "accuracy": round(correct / total, 4) if total else None,
        "interval": [round(low, 4), round(high, 4)],
        "chance": task.chance,
        "ended": ended,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _right(reader: Reader, tokens: Tensor, answers: Tensor, chunk: int, deadline: float) -> int | None:
    """How many answers are right; None if the time is up before the rows end."""
    state, right, length = None, 0, tokens.shape[1]
    for start in range(0, length, chunk):
        if time.perf_counter() > deadline:
            return None
        part = slice(start, start + chunk)
        asked = answers[:, part] >= 0
        logits, state = reader.ask(tokens[:, part], asked, state, keep=chunk < length)
        right += int((logits.argmax(-1) == answers[:, part][asked]).sum())
    return right


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson (1927) of a proportion, 95 % by default; (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    share = correct / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
