"""An hour of sessions that come and go: does the memory of `dyadlm serve` stay flat?

    python benchmarks/churn.py --seconds 3600

Clients on the loopback device create sessions, continue, fork, read on, save, list and delete them, score texts, leave
in the middle of an answer, and send what is refused. Sessions are bounded in memory and on disk: they are spilled, come
back, and are refused where there is no room. The resident memory of the server and the bytes of its folder are taken
every ten seconds. Flat means: a line through the memory of the last two thirds rises by less than it varies.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT, arguments, circumstances, dyad
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.files import write_atomically
from serving import Ours, memory, request

CLIENTS, PAUSE = 6, 0.5  # seconds between two requests of a client, on average
SESSIONS = 20  # of a client at most
MEMORY, DISK = 2, 64  # mebibytes of sessions
EVERY = 10  # seconds between two looks at the memory, at most; a short run takes 30 looks
TEXT = "HAMLET:\nTo be, or not to be, that is the question:\n"


async def leave(port: int, body: dict[str, Any]) -> None:
    """Ask for a stream and close the connection after its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content)}\r\n"
    writer.write((head + "Content-Type: application/json\r\n\r\n").encode() + content)
    await writer.drain()
    while line := await reader.readline():
        if line.startswith(b"data: "):
            break
    writer.close()


class Client:
    """One client that does one thing after the other. done: how often each was done; refused: answers that were."""

    def __init__(self, port: int, seed: int):
        self.port, self.draw = port, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.own: list[str] = []

    async def ask(self, method: str, path: str, body: Any) -> Any:
        try:
            return json.loads(await request(self.port, method, path, body) or b"null")
        except RuntimeError as error:  # an answer that says no; a server that fails is no such answer
            if "HTTP/1.1 500" in str(error):
                raise
            status = str(error).split("HTTP/1.1 ")[1][:3]
            self.refused[status] += 1
            if status == "404":  # deleted meanwhile
                self.own = [own for own in self.own if own not in f"{path} {body}"]
            return None

    async def act(self) -> None:
        """One request, of a kind that is drawn."""
        draw = self.draw
        kinds = ("create", "continue", "continue", "fork", "read", "save", "delete", "score", "leave", "list", "wrong")
        kind = draw.choice(kinds if self.own else ("create",))
        if len(self.own) > SESSIONS:
            kind = "delete"
        self.done[kind] += 1
        own = draw.choice(self.own) if self.own else ""
        answer = {"max_tokens": draw.randint(1, 60), "seed": draw.randint(0, 9)}
        if kind in ("create", "fork"):
            path, body = ("/v1/sessions", {"text": TEXT * draw.randint(1, 40)})
            if kind == "fork":
                path, body = f"/v1/sessions/{own}/fork", {}
            made = await self.ask("POST", path, body)
            if made is not None:
                self.own.append(made["id"])
        elif kind == "continue":
            more = {"session": own, "prompt": draw.choice(["and ", "KING:\n"]), "keep": draw.random() < 0.7}
            await self.ask("POST", "/v1/completions", more | answer)
        elif kind == "read":
            await self.ask("POST", f"/v1/sessions/{own}/read", {"text": TEXT * draw.randint(1, 20)})
        elif kind == "save":
            await self.ask("POST", f"/v1/sessions/{own}/save", {})
        elif kind == "delete":
            self.own.remove(own)
            await self.ask("DELETE", f"/v1/sessions/{own}", {})
        elif kind == "score":
            await self.ask("POST", "/score", {"text": TEXT * draw.randint(1, 8), "per": "line"})
        elif kind == "leave":
            await leave(self.port, {"prompt": TEXT, "max_tokens": 200})
        elif kind == "list":
            await self.ask("GET", "/v1/sessions", {})
        else:
            await self.ask("POST", "/v1/completions", {"prompt": TEXT, "max_tokens": -1})


async def churn(server: Ours, place: Path, seconds: float) -> dict[str, Any]:
    clients = [Client(server.port, seed) for seed in range(CLIENTS)]
    ends = time.monotonic() + seconds
    samples: list[tuple[float, float, int]] = []

    async def acts(client: Client) -> None:
        while time.monotonic() < ends:
            await client.act()
            await asyncio.sleep(client.draw.uniform(0, 2 * PAUSE))

    async def looks() -> None:
        begun = time.monotonic()
        while time.monotonic() < ends:
            size = sum(file.stat().st_size for file in place.glob("tmp*/**/*") if file.is_file())
            samples.append((time.monotonic() - begun, memory(server.process.pid), size))
            if len(samples) % 30 == 1:
                print(f"{samples[-1][0]:6.0f} s  {samples[-1][1]:7.1f} MiB  {size:,} bytes on disk", flush=True)
            await asyncio.sleep(min(EVERY, seconds / 30))

    await asyncio.gather(looks(), *map(acts, clients))
    late = np.array([sample[:2] for sample in samples[len(samples) // 3 :]])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(late) > 2 else float("nan")
    done, refused = (sum((getattr(client, name) for client in clients), Counter()) for name in ("done", "refused"))
    return {
        "seconds": seconds,
        "requests": dict(done.most_common()),
        "refused": dict(refused.most_common()),
        "mebibytes": {
            "first": round(samples[0][1], 1),
            "after a third": round(float(late[0, 1]), 1),
            "last": round(samples[-1][1], 1),
            "largest": round(max(sample[1] for sample in samples), 1),
            "standard deviation of the last two thirds": round(statistics.pstdev(late[:, 1].tolist()), 2),
            "rise over the last two thirds, by a line": round(slope * float(late[-1, 0] - late[0, 0]), 2),
        },
        "bytes on disk, largest": max(sample[2] for sample in samples),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "", "churn.json")
    parser.add_argument("--seconds", type=float, default=3600.0)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dyad("tiny").save_pretrained(folder / "dyad")
        byte_tokenizer().save_pretrained(folder / "dyad")
        bounds = ("--session-memory", str(MEMORY), "--session-disk", str(DISK), "--autosave", "1")
        server = Ours(folder, 8, 0, *bounds)
        try:
            found = asyncio.run(churn(server, folder, options.seconds))
        finally:
            server.close()
    print(json.dumps(found))
    write_atomically(options.output, json.dumps(found | {"circumstances": circumstances()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
