"""Training steps against a Llama of the same parameters (SDPA), by sequence length: time and peak memory, as ratios.

    python benchmarks/throughput.py            # times and memory
    python benchmarks/throughput.py --profile  # where our time goes
    python benchmarks/throughput.py --compile  # torch.compile of the core against eager
    python benchmarks/throughput.py --exported # the same model trained with and without companions

A step is forward, backward and AdamW. The two models take turns within a round, and the ratio is formed in each round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from common import Cells, arguments, dyad, interval, matched_llama, require_green, size
from dyadlm import DyadCache, DyadForCausalLM
from dyadlm.train.compiler import compiling
from dyadlm.train.fingerprint import Fingerprint
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions, TwinOptions
from dyadlm.train.twin import Twin
from streaming import burst

LENGTHS = (256, 1024, 4096, 16384)
FEWEST_TOKENS = 4096
FAMILIES = {"dyad": lambda length: dyad(), "llama": lambda length: matched_llama(positions=length)}


def stepper(model: torch.nn.Module, length: int) -> Callable[[], float]:
    """A function that takes one training step on random bytes and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 256, (max(1, FEWEST_TOKENS // length), length))

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        return time.perf_counter() - started

    model.train()
    return step


def peak_memory(family: str, length: int, threads: int) -> float:
    """MiB that two steps add, at their peak, to a process of their own (Linux)."""
    command = [sys.executable, __file__, "--measure-memory", family, str(length), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def memory(field: str) -> float:
    """MiB of this process from the kernel's record: VmRSS now, VmHWM at most. (ru_maxrss would remember the parent.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def measure_memory(family: str, length: int) -> None:
    step = stepper(FAMILIES[family](length), length)
    before = memory("VmRSS")
    step(), step()
    print(memory("VmHWM") - before)


def compare(options: argparse.Namespace) -> None:
    cells = Cells(options.output)
    for name in cells.missing([f"length {length}" for length in LENGTHS]):
        length = int(name.split()[1])
        torch.manual_seed(0)
        steps = {family: stepper(build(length), length) for family, build in FAMILIES.items()}
        times: dict[str, list[float]] = {family: [] for family in FAMILIES}
        for number in range(options.rounds + 1):
            for family, step in steps.items():
                taken = step()
                if number:
                    times[family].append(taken)
        peaks = {family: peak_memory(family, length, options.threads) for family in FAMILIES}
        cells.store(
            name,
            {
                "tokens_per_step": max(length, FEWEST_TOKENS),
                "seconds_per_step": {f: round(statistics.median(values), 4) for f, values in times.items()},
                "llama_over_dyad": interval([b / a for a, b in zip(times["dyad"], times["llama"], strict=True)]),
                "peak_mebibytes": {family: round(value) for family, value in peaks.items()},
                "rounds": options.rounds,
            },
        )


def show_profile() -> None:
    for length in (256, 4096):
        step = stepper(dyad(), length)
        step()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
        print(f"T = {length}")
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def compare_compiled(rounds: int) -> None:
    model = dyad()
    eager = stepper(model, 256)
    eager()
    compiled_model = dyad()
    compiled_model.model.stack = torch.compile(compiled_model.model.stack)
    compiled = stepper(compiled_model, 256)
    with compiling():
        first = compiled()
        ratios = [eager() / compiled() for _ in range(rounds)]
    print(json.dumps({"first_step_seconds": round(first, 1), "eager_over_compiled": interval(ratios)}))


def left_behind(fields: dict[str, Any], accompanied: bool, folder: Path) -> DyadForCausalLM:
    """A model after one training step, with all that can train beside it or with nothing, saved and loaded again."""
    torch.manual_seed(0)
    model = dyad(**fields).train()
    ids = torch.randint(0, 256, (2, 256))
    if accompanied:
        model.accompany("twin", Twin(model, TwinOptions("reverse")))
        model.accompany("fingerprint", Fingerprint(model.config, tags=True))
        if model.planner is not None:
            model.accompany("planner", PlannerLessons(model, PlannerOptions(teacher=0.2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(ids, labels=ids, index=ids, tags=ids[..., None].expand(-1, -1, 3)).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return DyadForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def compare_exported(options: argparse.Namespace) -> None:
    """Forward over 4096 tokens and streaming in turns, each model first in every other round."""
    cells = Cells(options.output)
    kinds: dict[str, dict[str, Any]] = {"exported": {}, "exported, planner": {"planner": "head", "consensus": 0.9}}
    ids = torch.randint(0, 256, (16, 256))
    for name in cells.missing(list(kinds)):
        models, sizes = [], []
        for accompanied in (False, True):
            with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
                models.append(left_behind(kinds[name], accompanied, Path(folder)))
                sizes.append((Path(folder) / "model.safetensors").stat().st_size)
        ratios: dict[str, list[float]] = {"forward": [], "streaming": []}
        for number in range(options.rounds + 1):
            taken: dict[tuple[str, int], float] = {}
            for which in (0, 1) if number % 2 else (1, 0):
                started = time.perf_counter()
                models[which](ids, use_cache=False)
                taken["forward", which] = time.perf_counter() - started
                taken["streaming", which] = burst(models[which], DyadCache(), ids[:1, :32])
            for part, values in ratios.items():
                if number:
                    values.append(taken[part, 1] / taken[part, 0])
        cells.store(
            name,
            {
                "parameters": [size(model) for model in models],
                "bytes": sizes,
                **{f"{part}_ratio": interval(values) for part, values in ratios.items()},
                "rounds": options.rounds,
            },
        )


def main() -> None:
    parser = arguments(__doc__ or "", "throughput.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--exported", action="store_true")
    parser.add_argument("--measure-memory", nargs=2, metavar=("FAMILY", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        family, length = options.measure_memory
        measure_memory(family, int(length))
        return
    require_green()
    if options.profile:
        show_profile()
    elif options.compile:
        compare_compiled(options.rounds)
    elif options.exported:
        compare_exported(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
