"""`dyadlm export`: copy a model without training files."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
) -> None:
    """Copy weights, configuration, tokenizer and model card. Files that only training needs are left out."""
    from dyadlm.train import export

    typer.echo(f"Wrote {export(run, output)}.")
