"""`dyadlm stream`: read standard input without end, at constant memory."""

import json as json_format
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dyadlm.cli.shared import Device, Dtype, Fields, Model, NewDocument, StateIn, errors, load_to_read, reader_may_leave

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
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each token.")] = False,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature of continuations; 0 takes the most likely token.")
    ] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Seed of continuations.")] = None,
    state_in: StateIn = None,
    new_document: NewDocument = False,
    state_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the state at the end of the input.")
    ] = None,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Read standard input without end and print the surprisal of every token.

    Columns: position, surprisal in bits, mean bits per byte so far, token. The state has constant size.
    After --state-in the first token has no surprisal. Ctrl-C ends.
    """
    from dyadlm.data.encoding import prefix_token
    from dyadlm.generate import EngineModel, Listener, Sampling, open_session
    from dyadlm.generate.streaming import waiting_lines

    sampling = Sampling(temperature, seed=seed)
    loaded, tokenizer = load_to_read(model, device, dtype, fields)
    if not isinstance(loaded, EngineModel):
        from dyadlm.causal_lm import require_causal

        require_causal(loaded, model)
    session = open_session(loaded, tokenizer, state_in, new_document, state_out)
    listener = Listener(session, tokenizer, prefix_token(tokenizer) if session.begins else None)
    with reader_may_leave():
        try:
            if continuation:
                _continue(session, listener, waiting_lines(sys.stdin.buffer), continuation, marker, sampling)
            else:
                for found in waiting_lines(sys.stdin.buffer):
                    for surprise in listener.hear(*found):
                        row = json_format.dumps(surprise._asdict()) if json else _row(surprise)
                        sys.stdout.write(row + "\n")
                    sys.stdout.flush()
        except KeyboardInterrupt:
            errors.print()
        if state_out is not None:
            session.save(state_out)
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
    waiting: Iterable[list[bytes]],
    tokens: int,
    marker: str,
    sampling: "Sampling",
) -> None:
    unanswered = False
    for found in waiting:
        ends = [number for number, line in enumerate(found) if _is_marker(line, marker)]
        for begin, end in pairwise([-1, *ends, len(found)]):
            for _ in listener.hear(*found[begin + 1 : end]):
                unanswered = True
            if end < len(found):
                _write(session, tokens, sampling)
                unanswered = False
    if unanswered:
        _write(session, tokens, sampling)


def _is_marker(line: bytes, marker: str) -> bool:
    return line.rstrip(b"\r\n").decode(errors="replace") == marker


def _write(session: "Session", tokens: int, sampling: "Sampling") -> None:
    for piece in session.write(tokens, sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
