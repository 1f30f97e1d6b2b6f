"""`dyadlm inspect`: what the levels and mechanisms of a model do, as a picture and as figures."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from dyadlm.cli.shared import Device, Fields, Model, load, read_prompt, require_png
from dyadlm.console import print_table


def inspect(
    model: Model,
    text: Annotated[str, typer.Option(metavar="TEXT|-", help="The text that the model reads; `-`: standard input.")],
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture.")],
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")] = None,
    fields: Fields = None,
    device: Device = "auto",
) -> None:
    """Draw what each level contributes at each token, and what segments, slots and a selector do."""
    from dyadlm.errors import UserError
    from dyadlm.evaluate.inspection import read_tower
    from dyadlm.files import require_new, require_writable, write_atomically
    from dyadlm.report import draw_tower

    require_png(output)
    for file, what in ((output, "the picture"), (json, "the figures")):
        if file is not None:
            require_new(file, what)
            require_writable(file, what)
    text = read_prompt(text)
    if not text:
        raise UserError("The text is empty; give at least one character.")
    loaded, tokenizer = load(model, device, "float32", fields)
    reading = read_tower(loaded, tokenizer, text)
    draw_tower(reading, output)
    figures = {"tokens": len(reading.pieces)} | reading.figures()
    if json is not None:
        write_atomically(json, json_format.dumps({"model": model, "text": text} | figures, indent=2) + "\n")
    _show(figures)
    for note in reading.notes:
        typer.echo(note)
    typer.echo(f"Wrote {output}.")


def _show(figures: dict[str, Any]) -> None:
    """A row for each measure, over all layers and for each of them."""
    overall, layers = figures["all"], figures["layers"]
    if not overall:
        return
    head = ["all", *(f"layer {number + 1}" for number in range(len(layers)))]
    rows = [
        [name, *("" if cell is None else f"{cell:.3f}" for cell in (value, *(layer.get(name) for layer in layers)))]
        for name, value in overall.items()
    ]
    print_table(["measure", *head], rows, right=head)
