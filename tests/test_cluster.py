"""A Ray cluster as the caller sees it: whose the signals are, and which error comes back. Ray itself is made up."""

import errno
import signal
import sys
from types import SimpleNamespace

import pytest

from dyadlm import cluster
from dyadlm.cluster import ray_cluster, result_of
from dyadlm.errors import RunFailed, UserError


@pytest.fixture
def made_up_ray(monkeypatch):
    """It takes SIGTERM for itself as Ray does: its own handler from the start, and the system's at the end."""

    def take(handler):
        signal.signal(signal.SIGTERM, handler)

    def init(**options):
        take(lambda number, frame: sys.exit(number))

    ray = SimpleNamespace(init=init, shutdown=lambda: take(signal.SIG_DFL))
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.getsignal(signal.SIGTERM)
    yield ray
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_the_callers_before_in_and_after_a_cluster(made_up_ray):
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    with ray_cluster(None, 1):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert len(received) == 2


def test_sigterm_while_ray_starts_is_the_callers_too(made_up_ray):
    def stop(number, frame):
        raise KeyboardInterrupt

    def init(**options):
        start(**options)
        signal.raise_signal(signal.SIGTERM)

    start, made_up_ray.init = made_up_ray.init, init
    signal.signal(signal.SIGTERM, stop)
    with pytest.raises(KeyboardInterrupt), ray_cluster(None, 1):
        pass
    assert signal.getsignal(signal.SIGTERM) is stop


def test_no_cluster_to_find_is_said_with_what_to_do(made_up_ray):
    def init(**options):
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to.")

    made_up_ray.init = init
    with pytest.raises(UserError) as refused, ray_cluster("auto", 1):
        pass
    assert str(refused.value) == (
        "There is no running Ray cluster here; start one with `ray start --head`, or leave --address out."
    )


@pytest.mark.parametrize(
    "cause", [UserError("no text"), RunFailed("lost"), OSError(errno.ENOSPC, "full", "parts/ab"), ZeroDivisionError()]
)
def test_an_error_of_a_task_is_that_of_the_caller(cause):
    class RayTaskError(Exception):
        """Its text is a coloured trace of the worker."""

    error = RayTaskError("\x1b[36mray::task()\x1b[39m")
    error.cause = cause

    def get(task):
        raise error

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayTaskError=RayTaskError))
    with pytest.raises(type(cause)) as raised:
        result_of(ray, None, "A part")
    assert raised.value is cause
    assert raised.value.__cause__ is error
