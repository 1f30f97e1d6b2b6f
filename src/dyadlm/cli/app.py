"""The verbs put together, and what every one of them promises: exit codes, and errors in one sentence."""

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dyadlm.cli import (
    audit,
    compare,
    data,
    diagnose,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    recall,
    repl,
    report,
    score,
    serve,
    stream,
    train,
    verify,
    zoo,
)
from dyadlm.errors import RunFailed, UserError, memory_missing
from dyadlm.files import FULL, printable
from dyadlm.version import __version__

app = typer.Typer(
    name="dyadlm",
    help="Train, evaluate and stream language models without attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(zoo.app, name="zoo")
app.command()(train.train)
app.command()(plan.plan)
app.command()(evaluate.evaluate)
app.command()(generate.generate)
app.command()(repl.repl)
app.command()(repl.chat)
app.command()(stream.stream)
app.command()(score.score)
app.command()(serve.serve)
app.command()(inspect.inspect)
app.command()(recall.recall)
app.command()(diagnose.diagnose)
app.command()(audit.audit)
app.command()(compare.compare)
app.command()(export.export)
app.command()(report.report)
app.command()(verify.verify)

# Options that take all the values that follow: `--data a b` means `--data a --data b`.
LIST_OPTIONS = ("--data", "--set", "--part", "--test", "--learning-rates", "--probe", "--gpus")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dyadlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The options that stand before a verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 ran and failed, 2 the request was wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stdout is None:
        _fail(UserError("Standard output is closed; give it a file or a pipe."), 2)
    _show_warnings()
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # whatever a terminal cannot show is escaped
            output.reconfigure(errors="backslashreplace")
    try:
        app(args=spread_lists(sys.argv[1:] if arguments is None else arguments), prog_name="dyadlm")
    except UserError as error:
        _fail(error, 2)
    except RunFailed as error:
        _fail(error, getattr(error, "exit_code", 1))
    except OSError as error:  # a folder that may not be read, say: the system's own sentence says it best
        _fail(_full_disk(error) if error.errno in FULL else error, 1)
    except (MemoryError, RuntimeError) as error:
        if (missing := memory_missing(error)) is None:
            raise
        _fail(RunFailed(f"{missing}; use a smaller model, shorter texts or smaller batches, or another machine."), 1)


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """Repeat each of `LIST_OPTIONS` before every one of its values; `-` is a value."""
    spread: list[str] = []
    option = None
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*spread, *arguments[number:]]
        if argument.startswith("-") and argument != "-":
            option = argument if argument in LIST_OPTIONS else None
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _show_warnings() -> None:
    """What the library logs, as the command line says things."""
    logger = logging.getLogger("dyadlm")
    if not logger.handlers:
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("dyadlm: %(message)s"))
        logger.addHandler(shown)
    compilation = logging.getLogger("dyadlm.compilation")
    if sys.stderr is not None and sys.stderr.isatty() and not compilation.handlers:  # somebody waits
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("\ndyadlm: %(message)s"))  # often in the middle of an answer
        compilation.addHandler(shown)
        compilation.setLevel(logging.INFO)
        compilation.propagate = False


def _full_disk(error: OSError) -> RunFailed:
    place = error.filename2 or error.filename
    where = f": {place}" if place else ""
    return RunFailed(f"{error.strerror}{where}; make room there, or choose another place, and give the command again.")


def _fail(error: Exception, code: int) -> None:
    print(f"dyadlm: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    raise SystemExit(code)
