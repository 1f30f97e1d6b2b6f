"""A Ray cluster, for as long as some work takes."""

import logging
import socket
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
    machine, and ends it afterwards. Raises `UserError` where Ray is not installed or not to be reached.
    """
    if find_spec("ray") is None:
        raise UserError("--engine ray needs Ray; run: pip install 'dyadlm[cluster]'")
    import ray

    try:
        if address is not None:
            _require_answer(address)
        ray.init(
            address=address, num_cpus=None if address else workers, log_to_driver=False, logging_level=logging.ERROR
        )
    except Exception as error:  # Ray raises a bare one where a node does not start in time
        where = "Ray cannot be started here" if address is None else f"There is no Ray cluster at {address}"
        raise UserError(
            f"{where} ({first_line(error)}); start one with `ray start --head` and give its --address."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise an error where nothing listens at HOST:PORT. Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:  # else a word such as "auto"
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()


def result_of(ray: Any, task: Any, what: str) -> Any:
    """What a task returns.

    Raises:
        UserError, RunFailed: as the task did.
        RunFailed: the task was lost with its worker, again and again; what: names it.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | RunFailed):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise RunFailed(f"{what} was lost {RETRIES + 1} times ({first_line(error)}).") from error
