"""`dyadlm report`: a run on one page."""

from pathlib import Path
from typing import Annotated

import typer

from dyadlm.cli.early import require_sources
from dyadlm.cli.shared import Device, load, token_progress
from dyadlm.errors import UserError


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
    prompt: Annotated[str, typer.Option(help="The prompt of the sample.")] = "The ",
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    device: Device = "auto",
) -> None:
    """Evaluate a run on its own validation text, and write a Markdown summary with pictures and a sample."""
    from dyadlm.files import require_new, require_writable
    from dyadlm.report import write_report
    from dyadlm.report.summary import require_finished

    require_new(output, "the report")
    require_writable(output.parent / "report", "the report")
    if not prompt:
        raise UserError("The prompt of the sample is empty; give at least one character.")
    sources = require_finished(run)["settings"]["data"]
    require_sources([sources] if isinstance(sources, str) else sources)
    loaded, tokenizer = load(str(run), device, "float32")
    with token_progress("scoring") as progress:
        summary = write_report(run, loaded, tokenizer, output, prompt=prompt, seed=seed, progress=progress)
    typer.echo(f"Wrote {summary}.")
