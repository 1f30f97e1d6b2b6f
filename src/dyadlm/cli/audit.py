"""`dyadlm audit`: checks that a causal language model does not see the future. For use in CI."""

import json as json_format
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from dyadlm.cli.shared import Device, errors, silence_transformers
from dyadlm.console import print_table

if TYPE_CHECKING:
    from dyadlm.diagnose.audit import Audit


def audit(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="tiny-en, a folder, a run, a Hugging Face name, or a GGUF file."),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Audit a small new model of this transformers model type instead."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE ...", help="Fields of the configuration, with --architecture."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of each test text. Default: as many as the model's windows and blocks need."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the test texts, and of the weights of a new model.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as saved).")] = "float32",
) -> None:
    """Check that no later token changes an earlier logit.

    Also: logits are the same with and without a cache, left padding, other rows in the batch, and a saved file.

    Exit code 1 if a check failed.
    """
    from dyadlm.diagnose.audit import audit, small_model
    from dyadlm.diagnose.candidates import load_subject
    from dyadlm.errors import RunFailed, UserError
    from dyadlm.generate.pretrained import resolve_device
    from dyadlm.recall import parse_fields

    silence_transformers()
    if (model is None) == (architecture is None):
        raise UserError("Give one model: MODEL, or --architecture TYPE for a small new one.")
    fields = parse_fields(assignments or ())
    if architecture is not None:
        made = small_model(architecture, fields, seed)
        loaded, name = made.to(resolve_device(device)), f"a small {architecture}"  # type: ignore[arg-type]
    else:
        assert model is not None
        if fields:
            raise UserError("Fields are set on new models; give --set with --architecture.")
        subject = load_subject(model, device, dtype)
        loaded, name = subject.model, subject.name
    with errors.status("auditing") as status:
        found = audit(loaded, name, length, seed, lambda check, done, total: status.update(f"{check} {done}/{total}"))
    if json:
        typer.echo(json_format.dumps(found.to_dict(), indent=2))
    else:
        _show(found)
    if not found.passed:
        failed = ", ".join(check.name for check in found.checks if check.status == "failed")
        raise RunFailed(f"{name} fails: {failed}.")


def _show(found: "Audit") -> None:
    colours = {"passed": "green", "failed": "red", "not applicable": "dim"}
    rows = [
        (
            check.name,
            Text(check.status, colours[check.status]),
            "" if check.figure is None else f"{check.figure:.1e}",
            "" if check.tolerance is None else f"{check.tolerance:.0e}",
            check.sentence,
        )
        for check in found.checks
    ]
    print_table(("check", "result", "figure", "tolerance", "what was seen"), rows, right=("figure", "tolerance"))
    typer.echo(f"{found.model}, texts of {found.length} random tokens; figures in standard deviations of the logits.")
    if found.left_out:
        typer.echo(f"Not seen: {found.left_out}.")
