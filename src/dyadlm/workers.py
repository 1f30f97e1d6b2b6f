"""Where independent tasks run: in processes of this machine, or as tasks of a Ray cluster.

Results are yielded as they come. A worker that dies costs one task, which is run again: here once, on Ray twice. A task
that dies each time ends the work with an error.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from dyadlm.cluster import RETRIES, Engine, ray_cluster, result_of
from dyadlm.errors import RunFailed, UserError

Task = TypeVar("Task", bound=Hashable)
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[Task], Result],
    wanted: Callable[[], Iterable[Task]],
    jobs: int,
    engine: Engine = "local",
    address: str | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Run tasks until none is wanted, and yield each with its result when it is done, in any order.

    work: a function of a module, or a `functools.partial` of one. wanted: the tasks that are still to be run, the first
    ones first; it is asked again after each that is done, so that no process waits for the end of a round. jobs: tasks
    at once; a cluster that is there decides by itself. address: of a Ray cluster; None starts one on this machine.

    Raises:
        UserError: what a task refuses; Ray is not installed or not to be reached.
        RunFailed: a task whose worker died twice, or what a task raises.
    """
    yield from _on_ray(work, wanted, jobs, address) if engine == "ray" else _here(work, wanted, jobs)


def _here(
    work: Callable[[Task], Result], wanted: Callable[[], Iterable[Task]], jobs: int
) -> Iterator[tuple[Task, Result]]:
    # A process for each task: what one leaves behind changes no figure of the next. Where the system can, each is a
    # copy of one that has loaded torch, which takes seconds.
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    function: Any = work.func if isinstance(work, partial) else work
    context.set_forkserver_preload([function.__module__])
    running: dict[Any, tuple[Task, BaseProcess]] = {}  # by the end of the pipe that a result comes from
    died: set[Task] = set()
    ready: Any
    try:
        while True:
            for task in _free(wanted(), (task for task, _ in running.values()))[: jobs - len(running)]:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, work, task), daemon=True)
                with _interrupts_delayed():
                    process.start()
                    running[receiver] = task, process
                sender.close()
            if not running:
                return
            for ready in wait(list(running)):
                task, process = running.pop(ready)
                try:
                    result = ready.recv()
                except (EOFError, OSError):  # also in the middle of what it sent
                    if task in died:
                        raise RunFailed(_dead(task)) from None
                    died.add(task)
                    continue
                finally:
                    ready.close()
                    process.join()
                if isinstance(result, Exception):
                    raise result
                yield task, result
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Ctrl-C reaches this process after the block. It never reaches what is started in it, which inherits this: those
    processes are ended from here, and would say much if they were stopped while they load."""
    came: list[int] = []
    # Blocked for what is started here. That alone would not delay it: the system gives it to another thread of this
    # process, and Python then interrupts the main one.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    in_main = threading.current_thread() is threading.main_thread()  # which alone sets handlers
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if in_main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # one that waits reaches `came` here
        if in_main:
            signal.signal(signal.SIGINT, handler or signal.default_int_handler)  # None: one that Python did not set
        if came:
            signal.raise_signal(signal.SIGINT)


def _dead(task: Hashable) -> str:
    return f"The process of {task} died twice; give --jobs 1 if memory was short."


def _work(sender: Connection, work: Callable[[Task], Result], task: Task) -> None:
    """In the process of a task: send its result, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that has started this one ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that temporary folders are removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result: Result | Exception
    try:
        result = work(task)
    except Exception as error:
        if not isinstance(error, UserError | RunFailed):
            error.add_note(traceback.format_exc())
        result = error
    with suppress(BrokenPipeError):  # nobody waits any more
        sender.send(result)


def _end_with_parent() -> None:
    """A killed process cannot end its workers, so each worker ends itself when its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by another one"
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _free(wanted: Iterable[Task], running: Iterable[Task]) -> list[Task]:
    taken = set(running)
    return [task for task in wanted if task not in taken]


def _on_ray(
    work: Callable[[Task], Result], wanted: Callable[[], Iterable[Task]], jobs: int, address: str | None
) -> Iterator[tuple[Task, Result]]:
    with ray_cluster(address, jobs) as ray:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES, max_calls=1)(_call)
        running: dict[Any, Task] = {}
        while True:
            running |= {remote.remote(work, task, Path.cwd()): task for task in _free(wanted(), running.values())}
            if not running:
                return
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(first)
            yield task, result_of(ray, first, str(task))


def _call(work: Callable[[Task], Result], task: Task, folder: Path) -> Result:
    """On a machine of the cluster, where paths mean what they mean to the caller if there is the same folder."""
    with suppress(OSError):
        os.chdir(folder)
    return work(task)
