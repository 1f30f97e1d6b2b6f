"""`dyadlm serve`: models behind HTTP, as OpenAI's API has it, with sessions."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from dyadlm.cli.shared import Device, Dtype, Fields, errors, load
from dyadlm.cli.stopping import Stops

# The largest values of options: what is larger is a mistake. 2^30 MiB are a PiB.
MOST_MIB, MOST_SECONDS, MOST_REQUESTS = 2.0**30, 31_536_000.0, 10**6


def number(value: float) -> float:
    """The value of an option. Raises `BadParameter` for nan, which older typer takes for a number of any range."""
    if math.isnan(value):
        raise typer.BadParameter("nan is no number.")
    return value


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL ...",
            help="Runs, exported folders, tiny-en, or Hugging Face names; the first is the default.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen at. Beyond this machine it needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file whose first line clients have to send as their key. Or DYADLM_API_KEY."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name of this server, as Host headers give it.")
    ] = None,
    sessions: Annotated[
        str,
        typer.Option(metavar="FOLDER|URL", help="Where sessions are kept: a folder, or Redis as redis://HOST:PORT/0."),
    ] = "dyadlm-sessions",
    shared: Annotated[
        bool,
        typer.Option("--shared", help="Other servers use the folder of sessions, too: replicas behind a balancer."),
    ] = False,
    max_sessions: Annotated[int, typer.Option(metavar="N", min=1, max=10**7, help="Sessions that are kept.")] = 10_000,
    session_memory: Annotated[
        float, typer.Option(metavar="MIB", min=0, max=MOST_MIB, callback=number, help="Memory of sessions, in MiB.")
    ] = 1024,
    session_disk: Annotated[
        float, typer.Option(metavar="MIB", min=0, max=MOST_MIB, callback=number, help="Disk space of sessions, in MiB.")
    ] = 10_240,
    session_days: Annotated[
        float,
        typer.Option(
            metavar="DAYS", min=0.001, max=36_500, callback=number, help="Sessions unused for so long are deleted."
        ),
    ] = 30,
    autosave: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            max=MOST_SECONDS,
            callback=number,
            help="Write changed sessions after so long; 0: only when the server ends.",
        ),
    ] = 10,
    streams: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_REQUESTS, help="Texts that are written at once.")
    ] = 256,
    queue: Annotated[
        int, typer.Option(metavar="N", min=0, max=MOST_REQUESTS, help="Requests that wait beyond those.")
    ] = 512,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=2**31, help="New tokens of an answer, at most.")
    ] = 65_536,
    max_body: Annotated[
        float,
        typer.Option(metavar="MIB", min=0.001, max=1024, callback=number, help="Size of a request, at most, in MiB."),
    ] = 8,
    deadline: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.1, max=MOST_SECONDS, callback=number, help="Time of a request, at most."),
    ] = 600,
    grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            max=MOST_SECONDS,
            callback=number,
            help="Time that running requests have at the end.",
        ),
    ] = 10,
    threads: Annotated[
        int, typer.Option(metavar="N", min=1, max=1024, help="Threads of a step; more than 1 helps large models alone.")
    ] = 1,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve models over HTTP, with OpenAI's API.

    Models of dyadlm have sessions, too: a request names what was read before instead of sending it again. See
    docs/serve.md.
    """
    require_extra()
    # Read when numpy loads its library of matrix products, which nothing has done yet.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    os.environ.setdefault("MKL_NUM_THREADS", str(threads))
    from dyadlm.serve import Limits, ServedModel, run
    from dyadlm.serve.running import require_folder, require_key, require_port
    from dyadlm.serve.served import names_of

    limits = Limits(
        streams=streams,
        queue=queue,
        body_bytes=int(max_body * 2**20),
        max_tokens=max_tokens,
        deadline=deadline,
        grace=grace,
        sessions=max_sessions,
        session_memory=int(session_memory * 2**20),
        session_disk=int(session_disk * 2**20),
        ttl=session_days * 86_400,
        autosave=autosave,
    )
    key = read_key(api_key)
    require_key(host, key)
    require_port(host, port)
    require_folder(sessions, shared)
    names = names_of(models)
    served = {}
    for model, name in names.items():
        say(f"Loading {name} ...")
        served[name] = ServedModel(name, *load(model, device, dtype, fields), limits)

    def ready(address: str) -> None:
        say(f"Serving {', '.join(names.values())} at {address} (Ctrl-C ends it)")

    with Stops():  # a signal is how a server ends
        run(served, sessions, limits, host, port, key, allow_host or (), ready, shared)


def say(text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def read_key(file: Path | None) -> str | None:
    """The key in a file, else in the environment: what stands on a command line can be read by others. Raises
    `UserError` if the file cannot be read."""
    from dyadlm.errors import UserError

    if file is None:
        return os.environ.get("DYADLM_API_KEY") or None
    try:
        return file.read_text(encoding="utf-8").split("\n")[0].strip()
    except (OSError, UnicodeError) as error:
        raise UserError(f"The key cannot be read from {file}; give a file whose first line is the key.") from error


def require_extra() -> None:
    """Raise `UserError` if the packages of the extra `serve` are missing."""
    from importlib.util import find_spec

    from dyadlm.errors import UserError

    for package in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client"):
        if find_spec(package) is None:
            raise UserError(f"Serving needs the package {package}: pip install 'dyadlm[serve]'.")
