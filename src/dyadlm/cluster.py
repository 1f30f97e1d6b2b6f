"""A Ray cluster, for as long as some work takes."""

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from dyadlm.errors import RunFailed, UserError, first_line

Engine = Literal["local", "ray"]
RETRIES = 2  # by Ray, of a lost task
ANSWER_SECONDS = 10.0  # that a cluster has to answer a call


@contextmanager
def ray_cluster(address: str | None, workers: int) -> Iterator[Any]:
    """The module `ray`, connected.

    address: of a cluster, which decides by itself how many tasks run at once; None starts one of `workers` CPUs on this
    machine, and ends it afterwards. SIGTERM means what it means to the caller. Raises `UserError` where Ray is not
    installed or not to be reached.
    """
    if find_spec("ray") is None:
        raise UserError("--engine ray needs Ray; run: pip install 'dyadlm[cluster]'")
    import ray

    try:
        if address is not None:
            _require_answer(address)
        with _own_sigterm():
            ray.init(
                address=address, num_cpus=None if address else workers, log_to_driver=False, logging_level=logging.ERROR
            )
    except Exception as error:  # Ray raises a bare one where a node does not start in time
        raise UserError(_not_reached(address, error)) from error
    try:
        yield ray
    finally:
        with _own_sigterm():
            ray.shutdown()


def _not_reached(address: str | None, error: Exception) -> str:
    if address == "auto" and str(error).startswith("Could not find any running Ray instance"):
        return "There is no running Ray cluster here; start one with `ray start --head`, or leave --address out."
    where = "Ray cannot be started here" if address is None else f"There is no Ray cluster at {address}"
    return f"{where} ({first_line(error)}); start one with `ray start --head` and give its --address."


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM. Ray puts its own there when it starts, and the system's when it ends; its own aborts
    the process with a trace of C++ where it takes longer than three seconds to end (Ray 2.60)."""
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals, and Ray leaves them
        yield
        return
    own = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        yield
    except SystemExit:  # of Ray's handler: the signal came meanwhile
        signal.signal(signal.SIGTERM, own)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, own)


def _require_answer(address: str) -> None:
    """Raise an error where nothing listens at HOST:PORT. Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:  # else a word such as "auto"
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()


def result_of(ray: Any, task: Any, what: str) -> Any:
    """What a task returns.

    Raises:
        Exception: as the task did, caused by Ray's error, which tells where.
        RunFailed: the task was lost with its worker, again and again; what: names it.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RunFailed(f"{what} was lost {RETRIES + 1} times ({first_line(error)}).") from error
