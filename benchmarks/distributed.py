"""Runs on several processes against one process: parity, another number of processes, killed workers, two nodes.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --namespaces    # as root: only the runs on two nodes, network namespaces

What stands in `--output` is not measured again.

Every run trains the same small model on the same text over gloo; a cell tells how far its losses are from those of one
process, and how long it took. torchrun starts the processes, or accelerate. `killed` loses a worker to SIGKILL under
`torchrun --max-restarts`; `resized` begins in one process and goes on in two, in four and in one; `killed-and-resized`
loses all of four and goes on in two.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Cells, arguments

STEPS, EVERY = 40, 5
SETTINGS = (
    f"max_steps={STEPS}", f"save_steps={EVERY}", "eval_steps=0", "logging_steps=1", "save_total_limit=null",
    "train.windows_per_step=8", "train.schedule=constant", "warmup_steps=0", "learning_rate=1e-2", "adam_epsilon=1e-4",
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.dropout=0", "data.sequence_length=64",
)  # fmt: skip
# What starts the processes: a module of Python and its options.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node={processes}")
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes={processes}", "--num_machines=1",
    "--mixed_precision=no", "--dynamo_backend=no",
)  # fmt: skip
SHARDED, CARRIED = ("fsdp=true",), ("train.carry_state=true",)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "watch"]
# The two ends of a link between two nodes.
NODES = {"dyadlm-a": "10.77.0.1", "dyadlm-b": "10.77.0.2"}


class Place:
    """A folder of runs on one text."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(random.Random(0).choices(WORDS, k=20_000)))

    def command(self, run: str, processes: int, *options: str, launcher: tuple[str, ...] = TORCHRUN) -> list[str]:
        """Processes: 0 is one without a launcher. The run begins, or goes on with what is there."""
        started = [word.format(processes=processes) for word in ("-m", *launcher)] if processes else []
        train = ["-m", "dyadlm", "train", "--preset", "tiny", "--data", str(self.text), "--device", "cpu"]
        train += ["--dtype", "float32", "--output", str(self.folder / run), "--resume", "--set", *SETTINGS, *options]
        return [sys.executable, *started, *train]

    def run(self, run: str, processes: int, *options: str, launcher: tuple[str, ...] = TORCHRUN) -> None:
        require_success(subprocess.Popen(self.command(run, processes, *options, launcher=launcher), **quiet()))

    def until(self, run: str, step: int, process: subprocess.Popen[str]) -> None:
        """Wait until a checkpoint is there."""
        while not (self.folder / run / f"checkpoint-{step}").is_dir():
            assert process.poll() is None, f"{run} ended too early: {process.communicate()[1]}"
            time.sleep(0.01)

    def losses(self, run: str) -> list[float]:
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]


def quiet() -> dict[str, Any]:
    return {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        # Without the second one, workers that torchrun starts again find the addresses of those that died (torch 2.13).
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    }


def require_success(process: subprocess.Popen[str]) -> str:
    """What the run told while it went."""
    try:
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    return said


def workers(launcher: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def killed(place: Place, run: str, *options: str) -> dict[str, Any]:
    """A worker dies after the first checkpoint; torchrun starts all of them again."""
    command = place.command(run, 2, *options, launcher=(*TORCHRUN, "--max-restarts=3"))
    process = subprocess.Popen(command, **quiet())
    place.until(run, EVERY, process)
    begun = place.losses(run)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    said = require_success(process)
    assert "Going on from" in said, "the worker was killed too late"
    return {"killed_after_step": len(begun)}


def killed_and_resized(place: Place, run: str) -> dict[str, Any]:
    """Four processes and what started them die; two go on."""
    process = subprocess.Popen(place.command(run, 4, *SHARDED), **quiet())
    place.until(run, EVERY, process)
    begun = place.losses(run)
    for number in (process.pid, *workers(process.pid)):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    place.run(run, 2, *SHARDED)
    return {"killed_after_step": len(begun)}


def resized(place: Place, run: str, *options: str) -> None:
    for stop, processes in ((10, 0), (20, 2), (30, 4), (STEPS, 0)):
        place.run(run, processes, *options, f"max_steps={stop}")


@contextmanager
def two_nodes() -> Iterator[None]:
    """Two network namespaces with a link between them, gone afterwards."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    first, second = NODES
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "to-b", "netns", first, "type", "veth", "peer", "name", "to-a", "netns", second)
        for name, device in ((first, "to-b"), (second, "to-a")):
            ip("-n", name, "address", "add", f"{NODES[name]}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def on_two_nodes(place: Place, run: str, *options: str) -> None:
    """One process on each node; the folder of the run is common to both."""
    with two_nodes():
        started = []
        for rank, (name, device) in enumerate(zip(NODES, ("to-b", "to-a"), strict=True)):
            launcher = (
                "torch.distributed.run",
                "--nproc-per-node={processes}",
                "--nnodes=2",
                f"--node-rank={rank}",
                f"--master-addr={NODES['dyadlm-a']}",
                "--master-port=29500",
            )
            command = place.command(run, 1, *options, launcher=launcher)
            settings = quiet()
            settings["env"]["GLOO_SOCKET_IFNAME"] = device
            started.append(subprocess.Popen(["ip", "netns", "exec", name, *command], **settings))
        for process in started:
            require_success(process)


def studies(place: Place) -> dict[str, tuple[str, Callable[[str], Any]]]:
    """By name of the cell: the run of one process that it must equal, and how it is made."""
    return {
        "one": ("one", lambda run: place.run(run, 0)),
        "one-carried": ("one-carried", lambda run: place.run(run, 0, *CARRIED)),
        "two": ("one", lambda run: place.run(run, 2)),
        "two-accelerate": ("one", lambda run: place.run(run, 2, launcher=ACCELERATE)),
        "two-accelerate-sharded": ("one", lambda run: place.run(run, 2, *SHARDED, launcher=ACCELERATE)),
        "four": ("one", lambda run: place.run(run, 4)),
        "two-sharded": ("one", lambda run: place.run(run, 2, *SHARDED)),
        "four-sharded": ("one", lambda run: place.run(run, 4, *SHARDED)),
        "killed": ("one", lambda run: killed(place, run)),
        "killed-sharded": ("one", lambda run: killed(place, run, *SHARDED)),
        "resized": ("one", lambda run: resized(place, run, *SHARDED)),
        "resized-carried": ("one-carried", lambda run: resized(place, run, *CARRIED)),
        "killed-and-resized": ("one", lambda run: killed_and_resized(place, run)),
    }


def main() -> None:
    parser = arguments(__doc__ or "", "distributed.json")
    parser.add_argument("--namespaces", action="store_true", help="two nodes in network namespaces; needs root")
    options = parser.parse_args()
    if options.namespaces and (os.geteuid() or not shutil.which("ip")):
        parser.error("--namespaces needs root, and the program ip (of Debian: iproute2)")
    cells = Cells(options.output)
    folder = Path(tempfile.mkdtemp(prefix="dyadlm-distributed-"))
    place = Place(folder)
    made = studies(place)
    names = list(made)
    if options.namespaces:
        made |= {
            "two-nodes": ("one", lambda run: on_two_nodes(place, run)),
            "two-nodes-sharded": ("one", lambda run: on_two_nodes(place, run, *SHARDED)),
        }
        names = [name for name in made if name not in names]
    try:
        for name in cells.missing(names):
            like, make = made[name]
            if like != name and not (folder / like).is_dir():
                made[like][1](like)
            begin = time.perf_counter()
            told = make(name) or {}
            seconds = time.perf_counter() - begin
            found, expected = place.losses(name), place.losses(like)
            assert len(found) == len(expected) == STEPS, (name, len(found))
            furthest = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
            cells.store(name, {**told, "last_loss": found[-1], "furthest": furthest, "seconds": round(seconds, 1)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
