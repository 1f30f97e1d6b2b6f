"""`dyadlm zoo`: the families of models that can be compared, and whether each is sound."""

import json as json_format
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from dyadlm.cli.shared import silence_transformers
from dyadlm.errors import RunFailed

Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE.py|MODULE", help="Your own code that registers families."),
]

app = typer.Typer(help="Families of causal language models for `compare`.", no_args_is_help=True)


@app.command("list")
def list_families(
    plugin: Plugins = None, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List all families: what they are, what they need, and why some are not compared."""
    from dyadlm.console import print_table
    from dyadlm.zoo import FAMILIES
    from dyadlm.zoo.plugins import load_plugins

    load_plugins(plugin or ())
    if json:
        rows = [
            {
                "name": one.name, "title": one.title, "item": one.item, "paper": one.paper, "decodes": one.decodes,
                "packages": list(one.packages), "missing": one.missing, "excluded": one.excluded or None,
            }
            for one in FAMILIES.values()
        ]  # fmt: skip
        typer.echo(json_format.dumps(rows, indent=2, ensure_ascii=False))
        return
    print_table(
        ["family", "item", "what it is", "state"],
        [(one.name, one.item, one.title, _state(one.excluded, one.missing)) for one in FAMILIES.values()],
    )


def _state(excluded: str, missing: list[str]) -> str:
    if excluded:
        return f"not compared: {excluded}"
    return "ready" if not missing else f"needs {', '.join(missing)}: pip install 'dyadlm[zoo]'"


@app.command()
def check(
    names: Annotated[
        list[str], typer.Argument(metavar="FAMILY ...", help="Families, as `dyadlm zoo list` shows them.")
    ],
    parameters: Annotated[
        int, typer.Option(help="Build one model with so many parameters, to within 2 %.", min=1)
    ] = 1_000_000,
    plugin: Plugins = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that no later token changes an earlier logit, that a text read in pieces gives equal logits, that a saved
    model loads, and that the number of parameters can be reached.

    Exit code 1 if a family is not sound.
    """
    from dyadlm.zoo.check import check as check_family
    from dyadlm.zoo.plugins import blaming, load_plugins

    load_plugins(plugin or ())
    silence_transformers()
    found = []
    for name in names:
        with blaming(name), redirect_stdout(sys.stderr):  # standard output is for the verdicts
            one = check_family(name, parameters)
        found.append(one)
        if not json:
            typer.echo(
                f"{name}: {'sound' if not one.faults else '; '.join(one.faults)} ({one.parameters:,} parameters)"
            )
    if json:
        rows = [
            {"family": one.family, "parameters": one.parameters, "faults": one.faults, "audit": one.audit.to_dict()}
            for one in found
        ]
        typer.echo(json_format.dumps(rows, indent=2, ensure_ascii=False))
    if faulty := [one.family for one in found if one.faults]:
        raise RunFailed(f"Not sound: {', '.join(faulty)}.")
