"""`dyadlm stream`: read standard input without end, at constant memory."""

import json as json_format
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dyadlm.cli.score import Alert, CalibrationIn, Judged, Learn, Threshold, changed_fields, entries_of, stream_lines
from dyadlm.cli.shared import (
    Device,
    Dtype,
    Fields,
    Memory,
    MemoryEntries,
    MemoryScope,
    Model,
    NewDocument,
    Raw,
    SlotEntries,
    StateIn,
    as_shown,
    errors,
    load_to_read,
    memory_for,
    require_entries,
    standard_input,
)
from dyadlm.cli.stopping import Stops, ending_well

if TYPE_CHECKING:
    from dyadlm.generate import Listener, Sampling, Session, Surprise

MARKER = "<|continue|>"


def stream(
    model: Model,
    continuation: Annotated[
        int,
        typer.Option(
            "--continue",
            metavar="N",
            min=0,
            help="Write N tokens at every marker line and at the end of the input, instead of surprisals. "
            "The model reads what it writes.",
        ),
    ] = 0,
    marker: Annotated[
        str, typer.Option(help="The line that asks for a continuation. The model does not read it.")
    ] = MARKER,
    per: Annotated[
        Literal["token", "line"], typer.Option(help="Print the surprisal of each token, or the score of each line.")
    ] = "token",
    follow: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --per line: read this file instead of standard input, and what is added to it, as tail -F does.",
        ),
    ] = None,
    threshold: Threshold = None,
    alert: Alert = None,
    calibration: CalibrationIn = None,
    judged: Judged = "excess",
    learn: Learn = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each token or line.")] = False,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature of continuations; 0 takes the most likely token.")
    ] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Seed of continuations.")] = None,
    state_in: StateIn = None,
    new_document: NewDocument = False,
    state_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the state at the end of the input.")
    ] = None,
    slot_entries: SlotEntries = None,
    memory: Memory = False,
    memory_entries: MemoryEntries = None,
    memory_scope: MemoryScope = None,
    raw: Raw = False,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Read standard input without end and print the surprisal of every token, or the score of every line.

    Columns: position, surprisal in bits, mean bits per byte so far, token; of lines those of `dyadlm score`. The state
    has constant size. After --state-in the first token has no surprisal. Ctrl-C ends.
    """
    from dyadlm.errors import UserError
    from dyadlm.score import Reading

    if per == "line":
        if continuation or new_document:
            raise UserError("Lines are only scored; leave out --continue and --new-document, or --per line.")
        if memory_scope is not None:
            raise UserError("The memory of lines lives on from document to document; leave out --memory-scope.")
        reading = Reading(
            "line", judged, learn, entries_of(memory, memory_entries), changed_fields(fields, slot_entries)
        )
        rule = (calibration, alert, threshold)
        stream_lines(model, follow, reading, rule, json, state_in, state_out, device, dtype, fields, slot_entries)
        return
    if learn or (follow, threshold, alert, calibration) != (None, None, None, None) or judged != "excess":
        raise UserError("Alerts, --follow, --score and --learn are of whole lines; add --per line.")
    from dyadlm.data.encoding import prefix_token
    from dyadlm.generate import EngineModel, Listener, Sampling, open_session
    from dyadlm.generate.states import require_state_files
    from dyadlm.generate.streaming import waiting_lines

    sampling = Sampling(temperature, seed=seed)
    require_state_files(state_in, new_document, state_out)
    source = waiting_lines(standard_input())
    memory_for(memory, memory_entries, scope=memory_scope)
    loaded, tokenizer = load_to_read(model, device, dtype, fields, slot_entries)
    if not isinstance(loaded, EngineModel):
        from dyadlm.causal_lm import require_causal

        require_causal(loaded, model)
    remembers = memory_for(memory, memory_entries, len(tokenizer), memory_scope)
    session = open_session(loaded, tokenizer, state_in, new_document, state_out, remembers)
    require_entries(session, memory_entries, memory_scope)
    listener = Listener(session, tokenizer, prefix_token(tokenizer) if session.begins else None)
    with ending_well(session.saving(state_out), state_out, interrupt_code=0) as stops:
        if continuation:
            write = partial(_write, session, stops, continuation, sampling, raw)
            _continue(session, listener, stops, source, write, marker)
        else:
            for found in stops.while_waiting(source):
                for surprise in listener.hear(*found):
                    row = json_format.dumps(surprise._asdict()) if json else _row(surprise)
                    sys.stdout.write(row + "\n")
                sys.stdout.flush()
    if listener.tokens and not json:
        errors.print(
            f"{listener.tokens:,} tokens read: {listener.mean_nats:.4f} nats per token, "
            f"{listener.bits_per_byte:.4f} bits per byte"
        )


def _row(surprise: "Surprise") -> str:
    bits = surprise.bits_per_byte
    return f"{surprise.position:>10} {surprise.bits:8.3f} {bits:8.3f}  {surprise.text!r}"


def _continue(
    session: "Session",
    listener: "Listener",
    stops: Stops,
    waiting: Iterable[list[bytes]],
    write: Callable[[], None],
    marker: str,
) -> None:
    """Read the input, and write at every marker line, and at the end where something was read since."""
    unanswered, line_begins = False, True
    for found in stops.while_waiting(waiting):
        read: list[bytes] = []
        for part in found:
            asks = line_begins and part.rstrip(b"\r\n").decode(errors="replace") == marker
            line_begins = part.endswith(b"\n")  # long lines come in parts
            if not asks:
                read.append(part)
                continue
            _hear(listener, read)
            write()
            read, unanswered = [], False
        unanswered = _hear(listener, read) or unanswered
    if unanswered:
        write()


def _hear(listener: "Listener", lines: list[bytes]) -> bool:
    """Read lines; whether there was anything to read."""
    return sum(1 for _ in listener.hear(*lines)) > 0


def _write(session: "Session", stops: Stops, tokens: int, sampling: "Sampling", raw: bool) -> None:
    with closing(session.write(tokens, sampling)) as pieces:
        for piece in stops.after_each(pieces):
            sys.stdout.write(as_shown(piece, raw))
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
