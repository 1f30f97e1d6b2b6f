"""Shared test set-up: few threads, no network, deterministic kernels, uninitialised memory poisoned with NaN."""

import gc
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Set before any Hugging Face import: tests never reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a GPU the kernels of Triton run in its interpreter, which is chosen when Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))  # processes find their programs by name

gc.disable()  # while modules and tests are loaded, which stay


def pytest_collection_finish() -> None:
    """Keep what is loaded out of every collection of garbage. Trainer asks for one at each start, of a second."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def deterministic_torch():
    """Fixed seed; `torch.empty` returns NaN, so that reading what was never written fails a test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def forkserver():
    """The context of `multiprocessing` for processes that nothing tells apart from a program started alone.

    They are forked from a server that has imported everything, once for all tests, because that takes longest.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dyadlm.train", "torch._dynamo", "torch.utils.tensorboard", "fastapi", "uvicorn"])
    return context


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """A server of Redis, where there is one."""
    redis = pytest.importorskip("redis", reason="needs the extra redis")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    with redis.Redis.from_url(url) as client:
        for _ in range(100):
            try:
                client.ping()
            except redis.ConnectionError:
                time.sleep(0.05)
            else:
                break
    yield url
    server.terminate()
    server.wait()


@pytest.fixture
def signals_as_before():
    """Signals that are heeded. A command that is stopped leaves them ignored: all that is left to it is to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:  # tests that run in the background may be told to ignore them
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
