"""`dyadlm verify`: whether what is on disk is whole."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from dyadlm.errors import RunFailed
from dyadlm.files import printable


def verify(
    path: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, prepared data, a model folder, tiny-en, or a saved state.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check files against their checksums and formats, and name what is damaged.

    Exit code 1 if anything is. Checksums show damage; they do not prove who wrote a file.
    """
    from dyadlm.train.verification import verify

    found = verify(path)
    if json:
        rows = [{"place": str(entry.place), "whole": entry.whole, "what": entry.what} for entry in found]
        typer.echo(json_format.dumps(rows, indent=2))
    else:
        for entry in found:
            state = "whole  " if entry.whole else "DAMAGED"
            typer.echo(f"{state}  {printable(str(entry.place))}: {printable(entry.what)}")
    damaged = sum(not entry.whole for entry in found)
    if damaged:
        raise RunFailed(f"{damaged} of {len(found)} parts of {path} are damaged.")
