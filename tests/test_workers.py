"""Tasks in processes of this machine and on Ray: what dies, what is refused, what is wanted meanwhile."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from dyadlm import cluster
from dyadlm.errors import RunFailed, UserError
from dyadlm.workers import _interrupts_delayed, run_tasks


def square(task: int) -> int:
    return task * task


def once(marks: str, task: str) -> str:
    """Kills its own process the first time that the task is `ill`."""
    mark = Path(marks) / task
    if task == "ill" and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return task.upper()


def always(task: str) -> str:
    if task == "ill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    raise AssertionError


def stays(marks: str, task: str) -> None:
    (Path(marks) / task).write_text(str(os.getpid()))
    time.sleep(60)


def is_running(process: int) -> bool:
    """One that has ended may stay in the table of processes where the first one does not look after orphans."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return sys.platform != "linux"  # there is no such table elsewhere


def sends(marks: str, task: str) -> bytes:
    """The first time the process is killed between two parts of what it sends."""
    mark = Path(marks) / task
    if mark.exists():
        return b"whole"
    mark.write_text("")

    def send_a_part(connection, content):
        os.write(connection.fileno(), struct.pack("!i", len(content)) + content[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send_bytes = send_a_part
    return bytes(10_000)


def refuses(task: str) -> str:
    raise UserError("There is no text.")


def fails(task: str) -> float:
    return 1 / 0


def run_all(work, tasks, jobs=2, engine="local"):
    """The results of some tasks, each of which is wanted until it is done."""
    results = {}
    for task, result in run_tasks(work, lambda: [one for one in tasks if one not in results], jobs, engine):
        assert task not in results
        results[task] = result
    return results


def test_what_is_wanted_may_depend_on_what_was_found():
    results = {}

    def wanted():
        return [1, 2, 3] if len(results) < 3 else [] if len(results) == 4 else [sum(results.values())]

    for task, result in run_tasks(square, lambda: [one for one in wanted() if one not in results], 2):
        results[task] = result
    assert results == {1: 1, 2: 4, 3: 9, 14: 196}
    assert list(run_tasks(square, list, 2)) == []


def test_a_worker_that_dies_costs_its_task_alone(tmp_path):
    assert run_all(partial(once, str(tmp_path)), ["ill", "well"]) == {"ill": "ILL", "well": "WELL"}


def test_a_worker_that_dies_while_it_sends_costs_its_task_alone(tmp_path):
    assert run_all(partial(sends, str(tmp_path)), ["one"]) == {"one": b"whole"}


def test_a_task_that_dies_twice_stops_all_at_once():
    begun = time.monotonic()
    with pytest.raises(RunFailed, match="The process of ill died twice; give --jobs 1"):
        run_all(always, ["ill", "well"])
    assert time.monotonic() - begun < 30  # the other one is ended, not waited for


def test_errors_of_a_task_are_those_of_the_caller():
    with pytest.raises(UserError, match="no text") as refused:
        run_all(refuses, ["one"])
    assert not hasattr(refused.value, "__notes__")
    with pytest.raises(ZeroDivisionError) as failed:
        run_all(fails, ["one"])
    assert "in fails" in failed.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_ray_runs_a_task_again_whose_worker_was_killed(tmp_path):
    assert run_all(partial(once, str(tmp_path)), ["ill", "well"], engine="ray") == {"ill": "ILL", "well": "WELL"}
    with pytest.raises(UserError, match="no text"):
        run_all(refuses, ["one"], engine="ray")


def test_ray_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dyadlm\[cluster\]'"):
        run_all(square, [1], engine="ray")


def test_ray_that_does_not_start_is_said_in_a_sentence(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(
        UserError, match=r"Ray cannot be started here \(The .* startup\.\); start one with `ray start --head`"
    ):
        run_all(square, [1], engine="ray")


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system cannot delay signals")
@pytest.mark.parametrize("other_thread", [False, True])
def test_an_interrupt_while_a_process_starts_comes_later_and_is_not_lost(other_thread):
    """Whichever thread the system gives it to: torch's threads do not block it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    reached = False
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - where in the block it comes is what is tested
            with _interrupts_delayed():
                to = thread if other_thread else threading.main_thread()
                assert to.ident is not None
                signal.pthread_kill(to.ident, signal.SIGINT)
                time.sleep(0.05)
                reached = True
            raise AssertionError("it was lost")
        assert reached
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
        thread.join()


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path):
    program = "import sys; from test_workers import *; run_all(partial(stays, sys.argv[1]), ['one'])"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    started = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    try:
        until, mark = time.monotonic() + 60, tmp_path / "one"
        while not (mark.exists() and mark.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        worker = int(mark.read_text())
        assert is_running(worker)
    finally:
        started.kill()
        started.wait()
    while is_running(worker):
        assert time.monotonic() < until, "it works on"
        time.sleep(0.05)


def test_outside_of_the_main_thread_processes_start_as_ever():
    results: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: results.extend(run_all(square, [2], 1).items()))
    thread.start()
    thread.join()
    assert results == [(2, 4)]
