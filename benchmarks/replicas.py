"""What it costs that several servers share their sessions: requests to one session, in turn to the replicas.

    python benchmarks/replicas.py                                   # a folder
    python benchmarks/replicas.py --redis redis://127.0.0.1:6379/0  # Redis, too

Each server is a process with the model `tiny-en`; the client asks for 4 new tokens after 2, again and again, in one
session. `alone`: one server, whose sessions are its own. `shared, one`: one server that shares them. `shared, turns`:
two servers, each request to the other one, so that each reads what the other one has written. Milliseconds of a
request; the load of the machine stands beside them.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx

from common import Cells, arguments

REQUESTS = 300


@contextmanager
def server(place: str, *more: str) -> Iterator[str]:
    """A server; its address."""
    command = [sys.executable, "-m", "dyadlm", "serve", "tiny-en", "--port", "0", "--sessions", place, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"at (http://\S+)", said)):
        line = process.stderr.readline()
        if not line:
            raise RuntimeError(said)
        said += line
    try:
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def measure(place: str, count: int, *more: str) -> dict[str, float]:
    """Milliseconds of requests to so many servers in turn."""
    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            addresses = list(pool.map(stack.enter_context, [server(place, *more) for _ in range(count)]))
        clients = [stack.enter_context(httpx.Client(base_url=address, timeout=60)) for address in addresses]
        session = clients[0].post("/v1/sessions", json={"text": "To be"}).raise_for_status().json()
        body = {"session": session["id"], "prompt": " a", "max_tokens": 4, "temperature": 0}
        taken = []
        for number in range(REQUESTS + 20):
            began = time.perf_counter()
            clients[number % count].post("/v1/completions", json=body).raise_for_status()
            taken.append(1000 * (time.perf_counter() - began))
    taken = sorted(taken[20:])
    return {
        "milliseconds": round(statistics.median(taken), 2),
        "p99": round(taken[int(0.99 * len(taken))], 2),
        "state_bytes": session["state_bytes"],
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], "replicas.json")
    parser.add_argument("--redis", help="the URL of a server")
    options = parser.parse_args()
    cells = Cells(options.output)
    places = ["folder", *(["redis"] if options.redis else [])]
    names = ["alone", *(f"{place}, {kind}" for place in places for kind in ("one", "turns"))]
    for name in cells.missing(names):
        place, _, kind = name.partition(", ")
        with tempfile.TemporaryDirectory() as folder:
            where = options.redis if place == "redis" else folder
            cells.store(name, measure(where, 1 + (kind == "turns"), *["--shared"][: name != "alone"]))


if __name__ == "__main__":
    main()
