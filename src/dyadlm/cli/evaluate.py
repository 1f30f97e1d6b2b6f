"""`dyadlm evaluate`: nats per token and bits per byte on real text."""

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dyadlm.cli.early import require_sources, require_split
from dyadlm.cli.shared import (
    Device,
    Dtype,
    Fields,
    Memory,
    MemoryEntries,
    MemoryScope,
    Model,
    SlotEntries,
    load,
    memory_for,
    token_progress,
)
from dyadlm.console import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dyadlm.evaluate.streams import Stream
    from dyadlm.memory import MemoryOptions

NOT_CARRIED = (
    "The model carries no state of constant size, so that the stream was read in overlapping windows of 1,024 tokens."
)


def evaluate(
    model: Model,
    data: Annotated[
        list[str], typer.Option(metavar="DIR|CORPUS|FILE ...", help="The text to score. Several sources are joined.")
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help="Which part of the data: train, validation or test. Default: validation where the data has it by "
            "name (corpora, prepared folders), else all."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="N", help="Roll windows of N tokens over each document, as lm-eval does."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Carry the state through the whole text instead of cutting it.")
    ] = False,
    protocols: Annotated[
        bool,
        typer.Option(
            "--protocols",
            help="Score samples of the text in fresh windows, in the same after 1,024 tokens, and as one stream.",
        ),
    ] = False,
    slot_entries: SlotEntries = None,
    memory: Memory = False,
    memory_entries: MemoryEntries = None,
    memory_scope: MemoryScope = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of windows in a batch.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    text_field: Annotated[str, typer.Option(help="The field with the text in JSON and Parquet.")] = "text",
) -> None:
    """Measure the loss on text: nats per token and bits per byte. Every token is scored once.

    Default: disjoint windows of the trained length, each from a fresh state.
    """
    from dyadlm.causal_lm import require_causal
    from dyadlm.data import resolve_data, resolve_text
    from dyadlm.errors import UserError
    from dyadlm.evaluate import evaluate

    if stream and window is not None:
        raise UserError("A stream has no windows; give --window or --stream, not both.")
    if protocols and stream:
        raise UserError("--protocols has a carried stream among its three; leave --stream out.")
    if window is not None and window < 1:
        raise UserError(f"A window has at least 1 token; --window cannot be {window}.")
    require_split(split)
    require_sources(data, text_field)
    memory_for(memory, memory_entries, scope=memory_scope)
    loaded, tokenizer = load(model, device, dtype, fields, slot_entries)
    require_causal(loaded, model)
    remembers = memory_for(memory, memory_entries, len(tokenizer), memory_scope)
    if split is None:
        streams, parts = resolve_text(data, tokenizer, text_field)
    else:
        streams, parts = resolve_data(data, tokenizer, text_field).split(split), dict.fromkeys(data, split)
    if protocols:
        options = None if remembers is None else remembers.options
        _by_protocol(loaded, tokenizer, streams, window, options, json, {"model": model, "data": data, "parts": parts})
        return
    mode: Literal["disjoint", "rolling", "stream"] = "stream" if stream else "disjoint" if window is None else "rolling"
    with token_progress("scoring") as progress:
        result = evaluate(loaded, streams, tokenizer, window, mode, batch_size, progress=progress, memory=remembers)
    say_what_was_trained_on(model, parts)
    if json:
        typer.echo(json_format.dumps({"model": model, "data": data, "parts": parts} | result.to_dict(), indent=2))
        return
    how = {
        "disjoint": f"disjoint windows of {result.window} tokens, each from a fresh state",
        "rolling": f"rolling windows of {result.window} tokens in each document",
        "stream": "one stream, its state carried from beginning to end",
    }[mode]
    interval = ""
    if result.interval is not None:
        low, high = result.interval
        interval = f"  (95% interval {low:.4f} to {high:.4f}, over {result.interval_over})"
    typer.echo(f"{result.bits_per_byte:.4f} bits per byte{interval}")
    typer.echo(f"{result.nats_per_token:.4f} nats per token")
    typer.echo(f"{result.tokens:,} tokens, {result.bytes:,} bytes, documents: {result.documents:,}; {how}")
    if result.targets != "all tokens":
        typer.echo(f"Of conversations only {result.targets} was scored.")
    if remembers is not None:
        typer.echo(f"With a memory of {remembers.state_bytes / 2**20:.1f} MiB, which reads the text in its order.")
    left_out = [f"{source} ({part} alone)" for source, part in parts.items() if part != "whole"]
    if left_out:
        typer.echo(f"Only a part was scored: {', '.join(left_out)}; --split names another.")


def _by_protocol(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    streams: "Sequence[Stream]",
    window: int | None,
    memory: "MemoryOptions | None",
    json: bool,
    asked: dict[str, Any],
) -> None:
    """Print the loss in each protocol of `dyadlm.evaluate.protocols`."""
    from dyadlm.causal_lm import context_of, continues
    from dyadlm.data.encoding import prefix_token
    from dyadlm.evaluate.evaluation import require_vocabulary, window_length
    from dyadlm.evaluate.protocols import PROTOCOLS, three_protocols

    require_vocabulary(model, tokenizer)
    carry = context_of(model) is None and continues(model) == "in pieces"
    length = window_length(model, window)
    scores = three_protocols(model, streams, length, prefix_token(tokenizer), carry, memory=memory)
    if json:
        found = {name: score._asdict() for name, score in scores.items()}
        typer.echo(json_format.dumps(asked | {"window": length, "carried": carry, "protocols": found}, indent=2))
        return
    rows = [
        (PROTOCOLS[name], f"{score.nats:.4f}", f"{score.bits:.4f}", f"{score.tokens:,}")
        for name, score in scores.items()
    ]
    print_table(("protocol", "nats per token", "bits per byte", "tokens"), rows, right=("tokens",))
    typer.echo(f"Windows of {length} tokens. " + ("The state was carried." if carry else NOT_CARRIED))


def say_what_was_trained_on(model: str, parts: Mapping[str, str]) -> None:
    """A loss on the text of the training says little of other text. parts: what was scored of each source."""
    from dyadlm.data.resolve import parse_weight
    from dyadlm.errors import UserError
    from dyadlm.train.settings import RECORD_NAME, read_record

    if not Path(model, RECORD_NAME).is_file():
        return
    try:
        settings = read_record(Path(model))["settings"]
    except UserError:  # a damaged record is no reason to lose a figure
        return
    trained = settings.get("data", ())
    trained = [trained] if isinstance(trained, str) else trained
    streamed = settings.get("data.stream")
    known = {Path(parse_weight(source)[0]).resolve() for source in trained}
    for source, part in parts.items():
        if Path(parse_weight(source)[0]).resolve() not in known:
            continue
        if streamed:
            typer.echo(f"{model} was trained on {source}, but for its beginning (data.stream).", err=True)
        elif part == "whole":
            typer.echo(
                f"{model} was trained on {source}; --split validation scores the part that was held out.", err=True
            )
