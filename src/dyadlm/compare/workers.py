"""Where cells run: in processes of this machine, or as tasks of a Ray cluster. What is done is told as it is done.

A worker that dies costs one cell, which is run again; a cell that dies twice stops the study.
"""

import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
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
    running: dict[Future[tuple[dict[str, Any], bytes]], Cell] = {}
    pool = _pool(jobs)
    try:
        while True:
            for cell in _free(wanted(), running.values())[: jobs - len(running)]:
                running[pool.submit(run, recipe, cell)] = cell
            if not running:
                return
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            try:
                for future in ended:
                    found, weights = future.result()
                    yield Done(running.pop(future), found, weights)
            except BrokenProcessPool:
                # Python does not say which of the processes died, and has ended all; each is run again alone.
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(jobs)
                while running:
                    _, cell = running.popitem()
                    yield Done(cell, *_alone(recipe, cell, run))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _free(wanted: Iterable[Cell], running: Iterable[Cell]) -> list[Cell]:
    taken = set(running)
    return [cell for cell in wanted if cell not in taken]


def _alone(recipe: Recipe, cell: Cell, run: Run) -> tuple[dict[str, Any], bytes]:
    pool = _pool(1)
    try:
        return pool.submit(run, recipe, cell).result()
    except BrokenProcessPool:
        raise RunFailed(
            f"The process of the cell {cell.name!r} died twice; give --jobs 1 if memory was short."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # A process for each cell: what a cell leaves behind changes no figure of the next. Where the system can, each is a
    # copy of one that has loaded torch, which takes seconds. Ctrl-C goes to the workers, too: they end without a word,
    # and this process says what is kept.
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(["dyadlm.compare.cell"])
    return ProcessPoolExecutor(
        jobs,
        mp_context=context,
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
        max_tasks_per_child=1,
    )


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
