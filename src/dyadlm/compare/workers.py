"""Where cells run: in processes of this machine, or as tasks of a Ray cluster. What is done is told as it is done.

A worker that dies costs one cell, which is run again; a cell that dies twice stops the study.
"""

import logging
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NamedTuple

from dyadlm.compare.cell import Cell, Recipe, run_cell
from dyadlm.errors import RunFailed, UserError

Engine = Literal["local", "ray"]
Run = Callable[[Recipe, Cell], tuple[dict[str, Any], bytes]]
Wanted = Callable[[], Iterable[Cell]]
RETRIES = 2  # by Ray, of a lost task


class Done(NamedTuple):
    """A cell that has ended. found: as JSON can hold it; weights: safetensors, empty where nothing was trained."""

    cell: Cell
    found: dict[str, Any]
    weights: bytes


def run_cells(
    recipe: Recipe, wanted: Wanted, jobs: int, engine: Engine = "local", address: str | None = None
) -> Iterator[Done]:
    """Run cells, `jobs` at once, until none is wanted, and yield each when it is done, in any order.

    wanted: the cells that are still to be run, the first ones first; it is asked again after each cell that is done, so
    that no process waits for the end of a round. address: of a Ray cluster; None starts one on this machine.

    Raises:
        UserError: what a cell refuses; Ray is not installed or not to be reached.
        RunFailed: a cell whose worker died twice.
    """
    yield from _on_ray(recipe, wanted, jobs, address) if engine == "ray" else _here(recipe, wanted, jobs)


def _here(recipe: Recipe, wanted: Wanted, jobs: int, run: Run = run_cell) -> Iterator[Done]:
    # A process for each cell: what a cell leaves behind changes no figure of the next. Where the system can, each is a
    # copy of one that has loaded torch, which takes seconds.
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    context.set_forkserver_preload([__name__])
    running: dict[Any, tuple[Cell, BaseProcess]] = {}  # by the end of the pipe that a result comes from
    died: set[Cell] = set()
    ready: Any
    try:
        while True:
            for cell in _free(wanted(), (cell for cell, _ in running.values()))[: jobs - len(running)]:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, run, recipe, cell), daemon=True)
                process.start()
                sender.close()
                running[receiver] = cell, process
            if not running:
                return
            for ready in wait(list(running)):
                cell, process = running.pop(ready)
                try:
                    result = ready.recv()
                except EOFError:
                    if cell in died:
                        raise RunFailed(
                            f"The process of the cell {cell.name!r} died twice; give --jobs 1 if memory was short."
                        ) from None
                    died.add(cell)
                    continue
                finally:
                    ready.close()
                    process.join()
                if isinstance(result, Exception):
                    raise result
                yield Done(cell, *result)
    finally:
        for _, process in running.values():
            process.terminate()


def _work(sender: Connection, run: Run, recipe: Recipe, cell: Cell) -> None:
    """In the process of a cell: send what was found, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that has started this one ends it
    result: tuple[dict[str, Any], bytes] | Exception
    try:
        result = run(recipe, cell)
    except Exception as error:
        if not isinstance(error, UserError | RunFailed):
            error.add_note(traceback.format_exc())
        result = error
    with suppress(BrokenPipeError):  # nobody waits any more
        sender.send(result)


def _free(wanted: Iterable[Cell], running: Iterable[Cell]) -> list[Cell]:
    taken = set(running)
    return [cell for cell in wanted if cell not in taken]


def _on_ray(recipe: Recipe, wanted: Wanted, jobs: int, address: str | None) -> Iterator[Done]:
    if find_spec("ray") is None:
        raise UserError("--engine ray needs Ray; run: pip install 'dyadlm[cluster]'")
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.init(address=address, num_cpus=None if address else jobs, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "Ray cannot be started here" if address is None else f"There is no Ray cluster at {address}"
        raise UserError(f"{where} ({error}); start one with `ray start --head`.") from error
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES, max_calls=1)(run_cell)
        running: dict[Any, Cell] = {}
        while True:
            running |= {task.remote(recipe, cell): cell for cell in _free(wanted(), running.values())}
            if not running:
                return
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(first)
            try:
                found, weights = ray.get(first)
            except RayTaskError as error:
                if isinstance(error.cause, UserError | RunFailed):
                    raise error.cause from error
                raise
            except RayError as error:
                raise RunFailed(f"The cell {cell.name!r} was lost {RETRIES + 1} times ({error}).") from error
            yield Done(cell, found, weights)
    finally:
        ray.shutdown()
