"""Many clients on the loopback device: `dyadlm serve` beside the server of llama.cpp with a Llama of the same size.

    python benchmarks/serving.py                 # all cells, the smallest first; run again to go on
    python benchmarks/serving.py --contexts 0 --streams 1 8 --seconds 60
    python benchmarks/serving.py --restored      # first token after a session of 100,000 tokens was restored

Needs the extras `serve` and `bench`. The preset `tiny` and a Llama of as many parameters, random weights of a scale at
which every part speaks, float32 (the keys and values of llama.cpp are float16), temperature 1. Each server is a process
of its own, and so is the client. A cell is a number of streams at a context. The context is read before the clock
starts: by us into a session, from which every stream goes on; by llama.cpp into the cache of one of its slots, from
which it is copied to the others. Then every stream asks for the same number of new tokens at once, `--rounds` times for
each server in turn; the median is told, with the load of the machine, since both servers share it with whatever else
runs. A cell that takes more than four times `--seconds` is given up.

Figures: tokens per second of all streams; seconds until the first token and between two events, median and 99th
percentile. Our server may tell several tokens in one event where the client is slower than the model.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import ROOT, Cells, arguments, dyad, llama, size
from decoding import speaking, text

CONTEXTS = (0, 1_000, 8_000)
STREAMS = (1, 8, 64, 200)
NEW_TOKENS = 64
# Layers, width and heads of the Llama, as in decoding.py.
LLAMA = (5, 128, 4)
RESTORED_TOKENS = 100_000


class Told:
    """One stream as its client saw it. times: of events, in seconds since the start. tokens: written."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens = 0


async def request(port: int, method: str, path: str, body: Any, told: Told | None = None) -> bytes:
    """Send a request; the body of the answer. told: takes the times of its events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    content = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content)}\r\n"
    writer.write((head + "Content-Type: application/json\r\nConnection: close\r\n\r\n").encode() + content)
    started, received = time.perf_counter(), b""
    await writer.drain()
    while line := await reader.readline():
        if told is not None and line.startswith(b"data: {"):
            told.times.append(time.perf_counter() - started)
            event = json.loads(line[6:])
            used = (event.get("usage") or {}).get("completion_tokens")
            told.tokens = used or event.get("tokens_predicted") or told.tokens
        received += line
    writer.close()
    status = int(received.split(b" ", 2)[1])
    if status >= 300:
        raise RuntimeError(f"{path}: {received[:400]!r}")
    return received.partition(b"\r\n\r\n")[2]


class Ours:
    """`dyadlm serve`."""

    def __init__(self, folder: Path, streams: int, context: int, *more: str):
        place = tempfile.mkdtemp(dir=folder)
        command = [sys.executable, "-m", "dyadlm", "serve", str(folder / "dyad"), "--port", "0", "--sessions", place]
        self.process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        while "http://" not in said:
            line = self.process.stderr.readline()
            if not line:
                raise RuntimeError(said)
            said += line
        self.port = int(said.split("http://127.0.0.1:")[1].split()[0])
        self.context, self.session = context, ""

    async def prepare(self, _streams: int) -> None:
        if self.context:
            body = {"text": bytes(text(self.context)).decode(errors="replace")}
            self.session = json.loads(await request(self.port, "POST", "/v1/sessions", body))["id"]

    async def write(self, _stream: int, told: Told) -> None:
        body: dict[str, Any] = {"prompt": "x", "max_tokens": NEW_TOKENS, "seed": 1, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.session:
            body |= {"session": self.session, "keep": False}
        await request(self.port, "POST", "/v1/completions", body, told)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


LLAMA_PROGRAM = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.port, p.n_parallel, p.n_ctx = sys.argv[1], 0, int(sys.argv[2]), int(sys.argv[3])
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[4])
p.warmup, p.cont_batching, p.cache_prompt, p.n_threads_http = True, True, True, int(sys.argv[2]) + 4
p.fit_params = False
p.timeout_read = p.timeout_write = 3600
p.slot_save_path = sys.argv[5]
server = x.Server(p)
print("at", server.listening_address, flush=True)
time.sleep(36000)
"""


class LlamaServer:
    """The server of llama.cpp, one slot a stream."""

    def __init__(self, folder: Path, streams: int, context: int, threads: int):
        positions = streams * (context + NEW_TOKENS + 64)
        command = [sys.executable, "-c", LLAMA_PROGRAM, str(folder / "llama.gguf"), str(streams), str(positions)]
        command += [str(threads), f"{folder}/"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        line = ""
        while not line.startswith("at "):
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("llama.cpp's server does not start.")
        self.port = int(line.rsplit(":", 1)[1].strip(" \n/"))
        self.context = context

    async def prepare(self, streams: int) -> None:
        """The context is read once, and its keys and values copied to the other slots, which takes far less time than
        reading it in each."""
        if not self.context:
            return
        await self._ask(0, 1, None)
        await request(self.port, "POST", "/slots/0?action=save", {"filename": "context"})
        for stream in range(1, streams):
            await request(self.port, "POST", f"/slots/{stream}?action=restore", {"filename": "context"})

    async def write(self, stream: int, told: Told) -> None:
        await self._ask(stream, NEW_TOKENS, told)

    async def _ask(self, stream: int, tokens: int, told: Told | None) -> None:
        body = {
            "prompt": [3 + byte for byte in text(self.context)] + [3 + ord("x")],
            "n_predict": tokens,
            "id_slot": stream,
            "temperature": 1,
            "top_k": 0,
            "top_p": 1,
            "min_p": 0,
            "seed": 1,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": told is not None,
        }
        await request(self.port, "POST", "/completion", body, told)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def write_byte_gguf(model: Any, path: Path) -> None:
    """The Llama with a vocabulary of bytes: three control tokens, then <0x00> to <0xFF>."""
    import gguf

    import llama_cpp

    class Writer(gguf.GGUFWriter):
        def add_tokenizer_model(self, _model: str) -> None:
            super().add_tokenizer_model("llama")
            self.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))])
            self.add_token_scores([0.0] * 259)
            self.add_token_types([2, 3, 3, *[6] * 256])
            self.add_bos_token_id(1)
            self.add_eos_token_id(2)

    original, gguf.GGUFWriter = gguf.GGUFWriter, Writer
    try:
        llama_cpp.write_gguf(model, path)
    finally:
        gguf.GGUFWriter = original


async def measured(server: Any, streams: int) -> dict[str, float]:
    """All streams at once."""
    told = [Told() for _ in range(streams)]
    started = time.perf_counter()
    await asyncio.gather(*(server.write(number, one) for number, one in enumerate(told)))
    taken = time.perf_counter() - started
    first = [one.times[0] for one in told]
    between = np.concatenate([np.diff(one.times) for one in told if len(one.times) > 1])
    return {
        "tokens_per_second": sum(one.tokens for one in told) / taken,
        "first_p50": float(np.percentile(first, 50)),
        "first_p99": float(np.percentile(first, 99)),
        "between_p50": float(np.percentile(between, 50)),
        "between_p99": float(np.percentile(between, 99)),
        "memory_mebibytes": memory(server.process.pid),
    }


def memory(process: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def cell(folder: Path, streams: int, context: int, rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """Both servers in turn."""
    limits = ("--streams", str(max(streams, 8)))
    servers: dict[str, Any] = {"dyadlm": Ours(folder, streams, context, *limits)}
    try:
        servers["llama.cpp"] = LlamaServer(folder, streams, context, threads)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        began = time.perf_counter()

        async def all_rounds() -> None:
            for server in servers.values():
                await server.prepare(streams)
                await server.write(0, Told())  # compiled, loaded, warm
            for _ in range(rounds):
                for name, server in servers.items():
                    found[name].append(await measured(server, streams))
                if time.perf_counter() - began > seconds:
                    break

        asyncio.run(asyncio.wait_for(all_rounds(), 4 * seconds))
    finally:
        for server in servers.values():
            server.close()
    ratios = [
        one["tokens_per_second"] / other["tokens_per_second"]
        for one, other in zip(found["dyadlm"], found["llama.cpp"], strict=True)
    ]
    told: dict[str, Any] = {
        name: {key: float(f"{statistics.median(one[key] for one in runs):.4g}") for key in runs[0]}
        for name, runs in found.items()
    }
    told["throughput_over_llama_cpp"] = {
        "median": round(statistics.median(ratios), 3),
        "all": [round(r, 3) for r in ratios],
    }
    told["llama_cpp_threads"] = threads
    return told | {"rounds": len(ratios), "new_tokens": NEW_TOKENS, "load_average": os.getloadavg()[0]}


def restored_cell(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds until the first token of a session of many tokens that is on disk alone."""
    server = Ours(folder, 1, RESTORED_TOKENS, "--session-memory", "0", "--autosave", "0.1")
    times = []

    async def measure() -> None:
        await server.prepare(1)
        for _ in range(rounds + 1):
            while True:
                found = json.loads(await request(server.port, "GET", f"/v1/sessions/{server.session}", {}))
                if found["place"] == "disk":
                    break
                await asyncio.sleep(0.1)
            told = Told()
            body = {"prompt": "", "max_tokens": 1, "session": server.session, "keep": False, "stream": True}
            await request(server.port, "POST", "/v1/completions", body, told)
            times.append(told.times[0])

    try:
        asyncio.run(measure())
    finally:
        server.close()
    return {
        "tokens": RESTORED_TOKENS,
        "milliseconds": {
            "median": round(1000 * statistics.median(times[1:]), 2),
            "largest": round(1000 * max(times[1:]), 2),
        },
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "", "serving.json")
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a cell begins no new round")
    parser.add_argument("--restored", action="store_true")
    options = parser.parse_args()
    cells = Cells(options.output)
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = dyad("tiny").eval()
        speaking(model)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder / "dyad")
        from dyadlm.data.tokenizer import byte_tokenizer

        byte_tokenizer().save_pretrained(folder / "dyad")
        layers, width, heads = LLAMA
        peer = llama(size(model), layers, width, heads, positions=2**18).eval()
        write_byte_gguf(peer, folder / "llama.gguf")
        if options.restored:
            for cell_name in cells.missing([f"restored, {RESTORED_TOKENS}"]):
                cells.store(cell_name, restored_cell(folder, 20))
            return
        pairs = sorted(itertools.product(options.streams, options.contexts), key=lambda pair: (pair[0] * pair[1], pair))
        wanted = {f"{streams} streams, context {context}": (streams, context) for streams, context in pairs}
        for cell_name in cells.missing(list(wanted)):
            try:
                found = cell(folder, *wanted[cell_name], options.rounds, options.seconds, options.threads)
            except TimeoutError:
                print(f"    more than {4 * options.seconds:.0f} s; give it more --seconds", flush=True)
                continue
            cells.store(cell_name, found)


if __name__ == "__main__":
    main()
