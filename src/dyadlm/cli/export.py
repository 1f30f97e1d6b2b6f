"""`dyadlm export`: copy a model without training files."""

from pathlib import Path
from typing import Annotated

import typer

from dyadlm.files import printable


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, one of its checkpoints, or tiny-en.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
    auto_map: Annotated[
        bool,
        typer.Option(
            "--auto-map",
            help="For programs that do not import dyadlm: they load the folder with trust_remote_code=True. dyadlm has "
            "to be installed there.",
        ),
    ] = False,
) -> None:
    """Copy weights, configuration, tokenizer and model card. Files that only training needs are left out.

    An adapter (`dyadlm train --lora`) is merged into its base model.
    """
    from dyadlm.train import export

    typer.echo(f"Wrote {printable(str(export(run, output, auto_map)))}.")
