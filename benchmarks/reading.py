"""How fast text is read, and how soon the command line answers, on one thread.

    python benchmarks/reading.py                    # a new `tiny` model; --run FOLDER for another

Cells:
    start     wall time of `--version`, `--help`, `import dyadlm`, and of `generate` until its first token is there.
    stream    `dyadlm stream` over a log of 79-byte lines from a pipe: bytes per second of processor time and of wall
              time, the largest resident memory over 1 MB and over 5 MB, and the wait for the first row.
    slow      a source that writes a line every 0.2 s: how long after a line its rows are there.
    pieces    texts of 80 and 2,048 tokens read by the engine's step, by the engine's form for many tokens, and by
              torch: microseconds of processor time a token.
    prompt    a prompt of 100,000 tokens read into a session: tokens per second of processor time.

Model and log are made here, from fixed seeds; the speed does not depend on the weights.
"""

import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Cells, arguments, dyad
from dyadlm.data import byte_tokenizer
from dyadlm.generate import EngineModel, Session, load_model

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
DYADLM = [sys.executable, "-m", "dyadlm"]
LINE_BYTES = 79
PROMPT_TOKENS = 100_000


def make_model(folder: Path) -> None:
    """A `tiny` model as `dyadlm train` leaves it."""
    torch.manual_seed(0)
    model, tokenizer = dyad(), byte_tokenizer()
    model.use_tokenizer(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def log_of(size: int) -> bytes:
    """Lines of an access log, each of LINE_BYTES with its end."""
    draw = random.Random(0)
    lines = []
    while len(lines) * LINE_BYTES < size:
        clock = f"{draw.randint(0, 23):02}:{draw.randint(0, 59):02}:{draw.randint(0, 59):02}"
        line = f"2026-11-26 {clock} sshd[{draw.randint(1000, 9999)}]: Accepted publickey for user{draw.randint(1, 99)}"
        line += f" from 10.0.{draw.randint(0, 255)}.{draw.randint(0, 255)}"
        lines.append(line.ljust(LINE_BYTES - 1)[: LINE_BYTES - 1])
    return "\n".join(lines).encode() + b"\n"


def start(run: Path, repeats: int) -> dict[str, Any]:
    """Seconds of wall time. The first run of each fills the caches of the system and is left out."""
    commands = {
        "--version": [*DYADLM, "--version"],
        "--help": [*DYADLM, "--help"],
        "import": [sys.executable, "-c", "import dyadlm"],
        "first token": [*DYADLM, "generate", str(run), "--prompt", "HAMLET:", "--max-new-tokens", "1", "--seed", "1"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
            if number:
                taken[name].append(time.perf_counter() - begun)
    return {name: {"median": round(statistics.median(v), 3), "largest": round(max(v), 3)} for name, v in taken.items()}


def stream(run: Path, size: int) -> dict[str, Any]:
    """One run over a log of so many bytes, from a pipe."""
    content = log_of(size)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*DYADLM, "stream", str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    writer = threading.Thread(target=lambda: (process.stdin.write(content), process.stdin.close()))
    writer.start()
    process.stdout.readline()
    first, rows = time.perf_counter() - begun, 1
    peak = 0
    for _ in process.stdout:
        rows += 1
        if rows % 100_000 == 0:
            peak = max(peak, resident(process.pid))
    writer.join()
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter() - begun
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "bytes": len(content),
        "rows": rows,
        "bytes_per_processor_second": round(len(content) / processor),
        "bytes_per_second": round(len(content) / wall),
        "seconds_to_first_row": round(first, 2),
        "resident_mib": peak,
    }


def resident(process: int) -> int:
    """Memory of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def slow(run: Path, lines: int = 20) -> dict[str, Any]:
    """Seconds from the end of a line to its last row, for a source that pauses after each line."""
    content = log_of(lines * LINE_BYTES).splitlines(keepends=True)
    process = subprocess.Popen(
        [*DYADLM, "stream", str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    waits = []
    for line in content:
        process.stdin.write(line)
        process.stdin.flush()
        begun = time.perf_counter()
        for _ in line:
            process.stdout.readline()
        waits.append(time.perf_counter() - begun)
        time.sleep(0.2)
    process.stdin.close()
    process.wait()
    return {"median": round(statistics.median(waits[1:]), 4), "largest": round(max(waits[1:]), 4)}


def prompt(run: Path, repeats: int) -> dict[str, Any]:
    """Tokens per second of this thread."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(run, "cpu")
    tokens = list(log_of(PROMPT_TOKENS)[:PROMPT_TOKENS])
    rates = []
    for _ in range(repeats):
        session = Session(model, tokenizer)
        begun = time.thread_time()
        session.read(tokens)
        rates.append(PROMPT_TOKENS / (time.thread_time() - begun))
    return {"median": round(statistics.median(rates)), "largest": round(max(rates))}


def pieces(run: Path, repeats: int) -> dict[str, Any]:
    """Microseconds a token of this thread; the fastest of some repetitions, since other programs disturb."""
    torch.set_num_threads(1)
    tokens = np.frombuffer(log_of(16_384)[:16_384], np.uint8).astype(np.int64)
    light = EngineModel(run)
    engine, found = light.engine, {}
    for size in (80, 2048):
        texts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        taken: dict[str, list[float]] = {"step": [], "engine": [], "torch": []}
        for _ in range(repeats + 1):
            state = engine.start()
            taken["step"].append(
                of_thread(texts, lambda text, state=state: [engine.step(state, k) for k in text.tolist()])
            )
            taken["engine"].append(of_thread(texts, Session(light, light.tokenizer).read))
            taken["torch"].append(of_thread(texts, Session(light.in_torch(), light.tokenizer).read))
        found[f"{size} tokens"] = {name: round(1e6 * min(times[1:]) / len(tokens), 1) for name, times in taken.items()}
    return found


def of_thread(texts: list[np.ndarray], read: Callable[[np.ndarray], object]) -> float:
    """Seconds of this thread for all texts."""
    begun = time.thread_time()
    for text in texts:
        read(text)
    return time.thread_time() - begun


def main() -> None:
    parser = arguments(__doc__ or "", "reading.json")
    parser.add_argument("--run", type=Path, help="a model folder; a new tiny model by default")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cells = Cells(options.output)
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or Path(folder)
        if options.run is None:
            make_model(run)
        measures = {
            "start": lambda: start(run, options.repeats),
            "slow": lambda: slow(run),
            "stream, 1 MB": lambda: stream(run, 1_000_000),
            "pieces": lambda: pieces(run, options.repeats),
            "prompt": lambda: prompt(run, options.repeats),
            "stream, 5 MB": lambda: stream(run, 5_000_000),
        }
        for name in cells.missing(list(measures)):
            cells.store(name, measures[name]())


if __name__ == "__main__":
    main()
