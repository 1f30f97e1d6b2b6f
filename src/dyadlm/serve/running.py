"""A server from its start to its end: loads the models, listens, and ends in good order."""

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import uvicorn

from dyadlm.errors import UserError
from dyadlm.files import locked, require_writable
from dyadlm.serve.app import create_app
from dyadlm.serve.security import LOOPBACK
from dyadlm.serve.served import ServedModel
from dyadlm.serve.session_storage import is_redis, shared_storage
from dyadlm.serve.settings import Limits

LOCK_PATIENCE = 2.0  # seconds, for a server that is about to end


def run(
    models: dict[str, ServedModel],
    folder: Path | str,
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    shared: bool = False,
) -> None:
    """Serve until a signal comes. folder, shared: of sessions, as in `create_app`; without shared no other server may
    use the folder. ready: is told the address.

    Raises `UserError` if a host beyond this machine is to be served without a key, the port is taken, or another server
    uses the folder.
    """
    require_key(host, key)
    with own_folder(folder, shared):
        hosts = None if key is not None else [*LOOPBACK, *allowed_hosts]
        app = create_app(models, folder, limits, key, hosts, shared)
        listening = listen(host, port)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(limits.grace) + 5,
            limit_concurrency=4 * (limits.streams + limits.queue),
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        if ready is not None:
            address, number = listening.getsockname()[:2]
            ready(f"http://{f'[{address}]' if ':' in address else address}:{number}")
        uvicorn.Server(config).run(sockets=[listening])


def require_key(host: str, key: str | None) -> None:
    """Raise `UserError` for a server that others can reach without a key, or a key that no header can hold."""
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UserError("The key is a word of printable ASCII characters.")
    if host not in LOOPBACK and key is None:
        raise UserError(
            f"Others could reach {host}; give a key with --api-key FILE or in DYADLM_API_KEY, or leave out --host "
            "to serve this machine alone."
        )


def own_folder(folder: Path | str, shared: bool) -> AbstractContextManager[None]:
    """Keep other servers out of a folder of sessions that is not shared. Raises `UserError` while one uses it."""
    if shared or is_redis(folder):
        return nullcontext()
    folder = Path(folder)
    taken = f"Another server keeps its sessions in {folder}; end it, or give this one another folder with --sessions."
    return locked(folder, taken, LOCK_PATIENCE)


def require_folder(folder: Path | str, shared: bool = False) -> None:
    """Raise `UserError` if the folder of sessions is another server's, nothing can be written to it, or sessions cannot
    be shared there, before models are loaded."""
    if not is_redis(folder):
        require_writable(Path(folder) / "session", "a session")
    if shared or is_redis(folder):
        shared_storage(folder).close()
    with own_folder(folder, shared):
        pass


def require_port(host: str, port: int) -> None:
    """Raise `UserError` if the port is taken, before models are loaded."""
    listen(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` if there can be none."""
    try:
        found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except (OSError, OverflowError):
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"There can be no server at {host}:{port} ({reason}); choose another --port.") from error
    return listening
