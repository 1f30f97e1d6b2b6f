"""`dyadlm inspect`: the tower as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from dyadlm.cli.shared import Device, Model, load, require_png


def inspect(
    model: Model,
    text: Annotated[str, typer.Option(help="The text that the model reads.")],
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture.")],
    device: Device = "auto",
) -> None:
    """Draw which levels of the tower speak at which token: how much each adds to the hidden state."""
    from dyadlm.files import require_new
    from dyadlm.report import draw_tower

    require_png(output)
    require_new(output, "the picture")
    loaded, tokenizer = load(model, device, "float32")
    draw_tower(loaded, tokenizer, text, output)
    typer.echo(f"Wrote {output}.")
