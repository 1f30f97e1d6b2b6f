"""What several verbs share: options, loading a model quietly, progress, and ending in good order."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dyadlm.console import standard_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dyadlm.data.encoding import AnyTokenizer
    from dyadlm.generate import EngineModel, Session
    from dyadlm.memory import ContextMemory

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="tiny-en (comes with dyadlm), a run, an adapter, an exported folder, or a Hugging Face name.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE ...",
        help="Change fields of the model's configuration, where the weights do not depend on them.",
    ),
]
WorkEngine = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="Where the work is done: processes here, or a Ray cluster.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: the cluster, as HOST:PORT, or auto for the one that runs here. Default: a new one is "
        "started on this machine, and ended afterwards."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="How many at once. Default: one. A Ray cluster decides by itself."),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum number of new tokens.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Sample from the N most likely tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens whose probabilities sum to this.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling. The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop after this text. May be repeated.")]
StateIn = Annotated[Path | None, typer.Option(metavar="FILE", help="Continue from this saved state.")]
NewDocument = Annotated[
    bool,
    typer.Option("--new-document", help="Begin a new document. Only the slots of the saved state are kept."),
]

SlotEntries = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Entries of each table of slots, a power of two times slot_ways (8). Default: as the model was trained.",
    ),
]
Slots = Annotated[
    Literal["all", "prompt"],
    typer.Option(
        help="What slots take in: all, or the prompt alone, not what the model writes. It then copies itself less, and "
        "seldom runs in a circle.",
    ),
]
Memory = Annotated[
    bool,
    typer.Option(
        "--memory",
        help="Remember what followed each short context of the text so far, and mix that into the prediction.",
    ),
]
MemoryEntries = Annotated[
    int | None, typer.Option(metavar="N", help="Contexts that --memory keeps of each length, a power of two.")
]

MemoryScope = Annotated[
    Literal["stream", "document"] | None,
    typer.Option(help="What --memory keeps where a document starts: stream (all, the default) or document (nothing)."),
]

Raw = Annotated[
    bool, typer.Option("--raw", help="Write control characters to a terminal as they are. Default: escaped.")
]

errors = standard_error()


def at_once(engine: str, jobs: int | None) -> int:
    """How many tasks run at once; where nothing is said, one here, and on all cores of a Ray that is started here."""
    return jobs or ((os.cpu_count() or 1) if engine == "ray" else 1)


def require_ray(engine: str, address: str | None) -> None:
    """Raise `UserError` for an address of a cluster that is not asked for."""
    from dyadlm.errors import UserError

    if address is not None and engine != "ray":
        raise UserError("--address is that of a Ray cluster; give --engine ray with it.")


def silence_transformers() -> None:
    """Its warnings, which speak of what a study or a probe does on purpose."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def load(
    model: str, device: str, dtype: str, fields: Iterable[str] | None = None, slot_entries: int | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, without the bars that transformers shows while loading. fields: `FIELD=VALUE`s.

    Raises `UserError` if there is no such model or field, or for entries of slots that it does not have.
    """
    from transformers.utils import logging

    from dyadlm.generate import load_model

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded = load_model(model, device, dtype, _fields(fields, slot_entries))
    if slot_entries is not None:
        _require_slots(model, getattr(loaded[0].config, "slot_contexts", None))
    return loaded


# Tokens of a short answer, for which nothing is compiled.
SHORT_ANSWER = 512


def load_to_read(
    model: str,
    device: str,
    dtype: str,
    fields: Iterable[str] | None = None,
    slot_entries: int | None = None,
    compile_after: int = 0,
) -> "tuple[PreTrainedModel | EngineModel, AnyTokenizer]":
    """As `load`, but by the engine where it serves, which starts without torch. compile_after: tokens, see `Engine`."""
    from dyadlm.generate import engine_model

    light = engine_model(model, device, dtype, _fields(fields, slot_entries), compile_after)
    if light is None:
        return load(model, device, dtype, fields, slot_entries)
    if slot_entries is not None:
        _require_slots(model, light.fields.get("slot_contexts"))
    return light, light.tokenizer


def _fields(given: Iterable[str] | None, slot_entries: int | None) -> dict[str, Any]:
    """The fields of a configuration that are changed when a model is loaded."""
    from dyadlm.values import parse_assignment

    fields = dict(parse_assignment(text) for text in given or ())
    return fields if slot_entries is None else {**fields, "slot_entries": slot_entries}


def _require_slots(model: str, contexts: object) -> None:
    from dyadlm.errors import UserError

    if not contexts:
        raise UserError(f"{model} has no slots; leave out --slot-entries.")


def memory_for(
    asked: bool, entries: int | None, vocabulary: int = 1, scope: str | None = None
) -> "ContextMemory | None":
    """The memory that was asked for, for a model with so many tokens. Raises `UserError` for options without it, or
    another number of entries than a power of two."""
    from dyadlm.errors import UserError

    if not asked:
        if entries is not None:
            raise UserError("--memory-entries does nothing without --memory; add it, or leave the entries out.")
        if scope is not None:
            raise UserError("--memory-scope does nothing without --memory; add it, or leave the scope out.")
        return None
    from dyadlm.memory import ContextMemory, MemoryOptions  # which imports numba

    return ContextMemory(MemoryOptions.of_vocabulary(vocabulary, entries, scope))


def require_entries(session: "Session", entries: int | None, scope: str | None = None) -> None:
    """Raise `UserError` if the memory of a loaded state has other options than were asked for."""
    from dyadlm.errors import UserError

    if session.memory is None:
        return
    options = session.memory.options
    if entries is not None and options.entries != entries:
        raise UserError(
            f"The memory in this state has {options.entries} entries, which cannot change; leave --memory-entries out."
        )
    if scope is not None and options.scope != scope:
        raise UserError(
            f"The memory in this state has the scope {options.scope}, which cannot change; leave --memory-scope out."
        )


class RateColumn(ProgressColumn):
    """Tokens per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0.0:,.0f} tokens/s")


@contextmanager
def token_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal's standard error; call what it yields with (done, total)."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for `-`. Raises `UserError` if it is no text."""
    from dyadlm.errors import UserError

    try:
        return standard_input().read().decode() if prompt == "-" else prompt.encode().decode()
    except UnicodeError as error:
        place = " on standard input" if prompt == "-" else ""
        raise UserError(f"The prompt{place} is not UTF-8 text; convert it first.") from error


def standard_input() -> BinaryIO:
    """The bytes of standard input. Raises `UserError` if it is closed."""
    from dyadlm.errors import UserError

    if sys.stdin is None:
        raise UserError("Standard input is closed; give it a file or a pipe.")
    return sys.stdin.buffer


def as_shown(text: str, raw: bool) -> str:
    """Text that a model wrote, for standard output: on a terminal, what would steer it is escaped, unless raw."""
    if raw or not sys.stdout.isatty():
        return text
    return "".join(letter if letter in "\n\t" or letter.isprintable() else repr(letter)[1:-1] for letter in text)


def require_png(path: Path) -> None:
    """Raise `UserError` unless the path ends in .png, so that it is what it says."""
    from dyadlm.errors import UserError

    if path.suffix.lower() != ".png":
        raise UserError(f"The picture is a PNG; let its name end in .png, not {path.name!r}.")
