"""`dyadlm score`: how surprising each line of some files is, and which are odd."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dyadlm.cli.shared import (
    Device,
    Dtype,
    Fields,
    Memory,
    MemoryEntries,
    Model,
    SlotEntries,
    StateIn,
    load_to_read,
    memory_for,
    standard_input,
)
from dyadlm.cli.stopping import Stopped, Stops, ending_well

if TYPE_CHECKING:
    from dyadlm.cli.units import Form
    from dyadlm.score import Calibration, Line, Reading, Scorer
    from dyadlm.score.follow import Place
    from dyadlm.score.units import ScoredLine

Alert = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Show only units whose conformal p-value is at most P: the rate of false alarms on normal text.",
    ),
]
Threshold = Annotated[float | None, typer.Option(metavar="BITS", help="Show only units with at least this score.")]
CalibrationIn = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="What is normal, as --calibrate wrote it.")
]
Judged = Annotated[
    Literal["excess", "mean"],
    typer.Option(
        "--score",
        help="excess: the bits of all bytes beyond 3, or beyond what is usual at the place where that is more. "
        "mean: bits per byte of the unit.",
    ),
]
Learn = Annotated[
    bool,
    typer.Option(
        "--learn",
        help="Learn while reading: small steps on a change of the output matrix, kept in the state, not in the model. "
        "It helps where the text is unlike the training text, and hides what keeps coming back.",
    ),
]


def score(
    model: Model,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE ...", help="Text, JSON lines, Parquet, plain or packed; - reads stdin.")
    ],
    per: Annotated[Literal["line", "document", "token"], typer.Option(help="What is scored.")] = "line",
    top: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Show only the N oddest units, the oddest first.")
    ] = None,
    threshold: Threshold = None,
    alert: Alert = None,
    calibration: CalibrationIn = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take all that is read for normal, and write its scores as a calibration."),
    ] = None,
    judged: Judged = "excess",
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each unit, and a summary.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    learn: Learn = False,
    memory: Memory = False,
    memory_entries: MemoryEntries = None,
    state_in: StateIn = None,
    state_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the state at the end, to read on from there.")
    ] = None,
    slot_entries: SlotEntries = None,
    text_field: Annotated[str, typer.Option(help="The field with the text in JSON and Parquet.")] = "text",
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Score lines, documents or tokens by how surprising they are.

    All files are read as one stream, whose state is carried from line to line at constant memory. Columns: score, bits
    per byte (all bits of the unit by its bytes, line ends included), p-value where there is a calibration, document and
    line, and the text with its oddest span highlighted. --json and --csv have bits, offset and span, too. A line longer
    than 4,096 bytes is scored in parts.
    """
    from dyadlm.cli.units import Printer, say_calibrated
    from dyadlm.errors import UserError
    from dyadlm.score import Oddest, Reading, units_of
    from dyadlm.score.calibration import require_place
    from dyadlm.score.judging import Rule

    if json and csv:
        raise UserError("The output is JSON or CSV; give --json or --csv, not both.")
    if calibrate is not None:
        if (top, threshold, alert, calibration) != (None, None, None, None) or csv:
            raise UserError(
                "--calibrate shows no units; leave out --top, --threshold, --alert, --calibration and --csv, and give "
                "the calibration to a second run."
            )
        require_place(calibrate)
    require_files(files)
    if calibrate is not None:
        from dyadlm.cli.evaluate import say_what_was_trained_on

        # Lines that it was trained on are less surprising than other normal lines.
        say_what_was_trained_on(model, dict.fromkeys(files, "whole"))
    reading = Reading(per, judged, learn, entries_of(memory, memory_entries), changed_fields(fields, slot_entries))
    scorer, normal, _ = open_scorer(
        model, device, dtype, fields, slot_entries, reading, calibration, state_in, state_out, calibrate is not None
    )
    rule = Rule(None if calibrate is not None else normal, alert, threshold)
    printer = Printer(form_of(json, csv), per, rule)
    oddest = None if top is None else Oddest(top)
    saving = None if state_out is None else lambda: scorer.save(state_out)
    with ending_well(saving, state_out) as stops:
        for unit in units_of(scored_lines(scorer, stops, chunks_of(files, text_field)), reading):
            if calibrate is not None and normal is not None:
                normal.add(unit.score)
            elif rule.passes(unit):
                (printer.unit if oddest is None else oddest.add)(unit)
        for unit in oddest.ordered() if oddest is not None else ():
            printer.unit(unit)
        if calibrate is not None and normal is not None:
            if not normal.units:
                raise UserError("There is nothing to calibrate on; give files with text in them.")
            normal.level = scorer.drift.all
            normal.save(calibrate)
            say_calibrated(normal, scorer, str(calibrate), json)
        else:
            printer.summary(scorer)


def stream_lines(
    model: str,
    follow: Path | None,
    reading: "Reading",
    wanted: tuple[Path | None, float | None, float | None],
    json: bool,
    state_in: Path | None,
    state_out: Path | None,
    device: str,
    dtype: str,
    fields: Iterable[str] | None,
    slot_entries: int | None,
) -> None:
    """`dyadlm stream --per line`: score the lines of standard input, or of a file that grows, without end.

    wanted: calibration, alert, threshold. Where a state is read that says up to where the file was followed, it is
    followed from there.
    """
    from dyadlm.cli.units import Printer
    from dyadlm.score import Follower, units_of, waiting_chunks
    from dyadlm.score.judging import Rule

    follower = None if follow is None else Follower(follow)
    calibration, alert, threshold = wanted
    scorer, normal, place = open_scorer(
        model, device, dtype, fields, slot_entries, reading, calibration, state_in, state_out
    )
    rule = Rule(normal, alert, threshold)
    printer = Printer(form_of(json, False), "line", rule)
    if follower is not None:
        follower.place = place
    chunks = waiting_chunks(standard_input(), "standard input") if follower is None else iter(follower)

    def save() -> None:
        assert state_out is not None
        scorer.save(state_out, None if follower is None else follower.place)

    with ending_well(None if state_out is None else save, state_out, interrupt_code=0) as stops:
        try:
            for unit in units_of(scored_lines(scorer, stops, chunks), reading):
                if rule.passes(unit):
                    printer.unit(unit)
        except Stopped:
            printer.summary(scorer)
            raise
        printer.summary(scorer)


def entries_of(memory: bool, entries: int | None) -> int:
    """How many contexts of each length the memory that was asked for keeps; 0 where none was."""
    asked = memory_for(memory, entries)
    return 0 if asked is None else asked.options.entries


def form_of(json: bool, csv: bool) -> "Form":
    return "json" if json else "csv" if csv else "rows"


def open_scorer(
    model: str,
    device: str,
    dtype: str,
    fields: Iterable[str] | None,
    slot_entries: int | None,
    reading: "Reading",
    calibration: Path | None,
    state_in: Path | None,
    state_out: Path | None,
    making: bool = False,
) -> "tuple[Scorer, Calibration | None, Place | None]":
    """What reads lines, what is normal, and up to where a file was followed when the state was saved.

    making: a new calibration is made, not read.
    """
    from dyadlm.errors import UserError
    from dyadlm.generate import EngineModel, open_session
    from dyadlm.generate.states import require_learnable, require_state_files
    from dyadlm.score import Calibration, Drift, Scorer
    from dyadlm.score.calibration import load_calibration
    from dyadlm.score.learning import Learner
    from dyadlm.score.scorer import identity_of_weights

    require_state_files(state_in, False, state_out)
    loaded, tokenizer = load_to_read(model, device, dtype, fields, slot_entries)
    remembers = memory_for(reading.memory > 0, reading.memory or None, len(tokenizer))
    if not isinstance(loaded, EngineModel):
        from dyadlm.causal_lm import require_causal

        require_causal(loaded, model)
    normal = None
    if making:
        normal = Calibration(identity_of_weights(loaded), reading)
    elif calibration is not None:
        normal = load_calibration(calibration, identity_of_weights(loaded), reading)
    learner = None
    if reading.learn:
        sizes = loaded.fields if isinstance(loaded, EngineModel) else vars(require_learnable(loaded))
        learner = Learner(sizes["vocab_size"], sizes["hidden_size"])
    session = open_session(loaded, tokenizer, state_in, state_out=state_out, memory=remembers)
    if session.memory is not None and session.memory.options.entries != reading.memory:
        kept = session.memory.options.entries
        raise UserError(
            f"The memory in {state_in} has {kept} entries, which cannot change; add --memory-entries {kept}."
        )
    known = normal is not None and not making and normal.level.blocks > 1
    scorer = Scorer(session, tokenizer, Drift(normal.level if normal is not None and known else None), learner)
    place = None if state_in is None else scorer.load(state_in)
    return scorer, normal, place


def changed_fields(fields: Iterable[str] | None, slot_entries: int | None) -> str:
    """What a command changes of the model's configuration, as NAME=VALUE in order."""
    size = [] if slot_entries is None else [f"slot_entries={slot_entries}"]
    return " ".join(sorted([*(fields or ()), *size]))


def scored_lines(scorer: "Scorer", stops: Stops, chunks: "Iterable[list[Line]]") -> "Iterator[ScoredLine]":
    """The lines of chunks; stops between two of them. What was printed is flushed before the next one is waited for."""
    for chunk in stops.while_waiting(chunks):
        yield from scorer.read(chunk)
        sys.stdout.flush()


def require_files(files: Iterable[str]) -> None:
    """Raise `UserError` unless all are files, or `-`."""
    from dyadlm.data.formats import require_text_name
    from dyadlm.errors import UserError

    for file in files:
        if file == "-":
            continue
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder; name its files ({file}/*).")
        if not Path(file).is_file():
            raise UserError(f"There is no file {file}; name files, or - for standard input.")
        require_text_name(Path(file).name)


def chunks_of(files: Iterable[str], text_field: str) -> "Iterator[list[Line]]":
    """The lines of all files, each read while it is scored."""
    from dyadlm.data.formats import read_file
    from dyadlm.files import printable
    from dyadlm.score import chunks, lines_of, waiting_chunks

    for file in files:
        if file == "-":
            yield from waiting_chunks(standard_input(), "standard input")
        else:
            yield from chunks(lines_of(read_file(Path(file), printable(Path(file).name), text_field)))
