"""`dyadlm export`: the model alone."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
) -> None:
    """Copy weights, configuration, tokenizer and card, without anything that only training needs."""
    from dyadlm.train import export

    typer.echo(f"Wrote {export(run, output)}.")
