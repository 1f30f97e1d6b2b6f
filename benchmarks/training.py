"""Time of a training step on a CPU, of this code and of another commit, taking turns.

    python benchmarks/training.py --against 3c2a5a6          # shapes below, one thread
    python benchmarks/training.py --against 3c2a5a6 --compile   # this code with train.compile as well

Each contender is a process of its own with its own source tree (a git worktree for the other commit). In every round
each runs a few steps of forward, backward, clipping and fused AdamW, on the same bytes, and reports its processor time.
Ratios are formed in each round. Losses are reported after the same number of steps from the same weights.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import ROOT, Cells, arguments, interval

SHAPES = {
    "tiny, 4 x 256": ("tiny", 4, 256, 4),
    "tiny, 1 x 4096": ("tiny", 1, 4096, 1),
    "small, 2 x 1024": ("small", 2, 1024, 1),
}

# Reads a number of steps a line; answers with milliseconds of processor time a step and the last loss.
WORKER = """
import sys, time, torch
preset, rows, length, form = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
import dyadlm
torch.set_num_threads(1)
torch.manual_seed(0)
config = dyadlm.DyadConfig.from_preset(preset, dropout=0.0)
model = dyadlm.DyadForCausalLM(config).train()
with torch.no_grad():
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02 + (1.0 if "norm" in name else 0.0))
from dyadlm.train.compiler import compiling
around = compiling()
around.__enter__()  # for as long as this process lives
if "compiled" in form:
    model.compile()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
text = torch.frombuffer(bytearray(open(sys.argv[5], "rb").read()), dtype=torch.uint8).long()
draw = torch.Generator().manual_seed(2)
for line in sys.stdin:
    begun = time.process_time()
    for _ in range(int(line)):
        at = torch.randint(0, len(text) - length, (rows,), generator=draw).tolist()
        ids = torch.stack([text[start:start + length] for start in at])
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in form):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(1000 * (time.process_time() - begun) / int(line), loss.item(), flush=True)
"""


class Contender:
    """A process that trains with the source tree of one commit."""

    def __init__(self, tree: Path, shape: tuple[str, int, int, int], form: str, text: Path):
        preset, rows, length, _ = shape
        command = [sys.executable, "-c", WORKER, preset, str(rows), str(length), form, str(text)]
        environment = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def steps(self, count: int) -> tuple[float, float]:
        """Milliseconds of a step, and the last loss."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        milliseconds, loss = self.process.stdout.readline().split()
        return float(milliseconds), float(loss)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(trees: dict[str, tuple[Path, str]], shape: tuple[str, int, int, int], text: Path, rounds: int) -> Any:
    """trees: by name, a source tree and how it computes."""
    with ExitStack() as stack:
        contenders = {name: Contender(tree, shape, form, text) for name, (tree, form) in trees.items()}
        for contender in contenders.values():
            stack.callback(contender.close)
        times: dict[str, list[float]] = {name: [] for name in trees}
        losses: dict[str, float] = {}
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                taken, losses[name] = contender.steps(shape[3])
                if number:  # the first round warms up
                    times[name].append(taken)
    first = times["before"]
    return {
        "milliseconds": {name: round(statistics.median(values), 1) for name, values in times.items()},
        "before_over_it": {
            name: interval([one / other for one, other in zip(first, values, strict=True)])
            for name, values in times.items()
            if name != "before"
        },
        "losses_after_all_steps": {name: round(loss, 5) for name, loss in losses.items()},
        "rounds": rounds,
    }


def main() -> None:
    parser = arguments(__doc__ or "", "training.json")
    parser.add_argument("--against", required=True, help="the commit to compare with")
    parser.add_argument("--compile", action="store_true", help="also with train.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    cells = Cells(options.output)
    with tempfile.TemporaryDirectory() as folder:
        before, text = Path(folder) / "before", Path(folder) / "text"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), options.against], cwd=ROOT, check=True)
        try:
            text.write_bytes(b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md"))))
            trees = {"before": (before, "float32"), "now": (ROOT, "float32"), "bfloat16": (ROOT, "bfloat16")}
            if options.compile:
                trees |= {"compiled": (ROOT, "compiled"), "compiled bfloat16": (ROOT, "compiled bfloat16")}
            for name in cells.missing(list(options.shapes)):
                cells.store(name, {"against": options.against, **measure(trees, SHAPES[name], text, options.rounds)})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    print(json.dumps({name: cells.results[name]["before_over_it"] for name in options.shapes}, indent=1))


if __name__ == "__main__":
    main()
