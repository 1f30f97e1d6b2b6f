"""Everything that only a GPU can say, in one command of at most nine minutes; resumable.

    python benchmarks/gpu.py --output DIR [--shard FILE] [--wheels DIR] [--minutes 9] [--stages STAGE ...]

tests: the tests that need a GPU. kernels: tests of the Triton kernels, and their time beside that of a copy
(`gpu_kernels.py`). training: time of a step (`gpu_training.py`), and of a decoded token (`gpu_decoding.py`). study:
models of 1M parameters, many at once (`gpu_study.py`). text: `tiny-en`, and `small` beside a Llama, on as much text as
the time allows (`gpu_text.py`; needs the file that `shard.py` writes).

Each stage is a process of its own with a share of the time, and leaves JSON and a log in DIR; at the end
`gpu_summary.py` makes one file of them, and pictures. What is there is not measured again. A machine without network
gets its packages, torch aside, from a folder of wheels (`--wheels`). On a machine of the same kind this fills it:
`pip download -r requirements.lock --dest DIR`. With `--rehearse` everything runs at small sizes, on the CPU where there
is no GPU.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXTS = ("tiny-en", "small", "llama-small")
# Of the whole time.
SHARES = {"tests": 0.1, "kernels": 0.1, "training": 0.25, "study": 0.33, "text": 0.22}
LENGTHS = (2048, 8192, 32768)
TRAINED = [
    ("llama-compiled", "small"),
    ("ours-compiled", "small"),
    ("llama-compiled", "base"),
    ("ours-compiled", "base"),
    ("mamba2-compiled", "small"),
    ("ours", "small"),
    ("ours-without-kernels", "small"),
]


def install(folder: Path) -> None:
    """What the wheels of a folder hold; torch and what goes with CUDA stay those of the machine."""
    kept = ("torch-", "triton-", "nvidia_")
    wheels = [str(wheel) for wheel in sorted(folder.glob("*.whl")) if not wheel.name.startswith(kept)]
    if not wheels:
        sys.exit(f"There are no wheels in {folder}.")
    # Packages are complete in the folder, so that none is looked for elsewhere.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels]
    subprocess.run(command, check=True)


class Run:
    """The folder of results and the time that is left."""

    def __init__(self, options: argparse.Namespace):
        self.folder, self.options = options.output.resolve(), options  # stages run in another folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.until = time.time() + 60 * options.minutes
        if options.wheels is not None:
            install(options.wheels)
        import torch

        self.gpu = torch.cuda.is_available()
        self.texts: dict[str, subprocess.Popen[bytes]] = {}  # models that get ready to train on text

    def command(self, script: str, *arguments: Any) -> list[str]:
        return [sys.executable, str(HERE / script), *map(str, arguments)]

    def start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        """A process whose output goes to a file, with the source tree on its path."""
        paths = [str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.folder / "inductor"))
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent)

    def finish(self, process: subprocess.Popen[bytes], log: str, seconds: float) -> None:
        """Wait for a process, at most so long; show the end of what it said."""
        try:
            process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"{log}: stopped after {seconds:.0f} s", flush=True)
        lines = (self.folder / log).read_text(errors="replace").splitlines()
        print("\n".join(f"  {line[:240]}" for line in lines[-self.options.tail :]), flush=True)


def tested(run: Run, chosen: list[str], log: str, seconds: float) -> None:
    """Run tests, with what they say in a log."""
    command = [
        sys.executable, "-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider", "--override-ini=addopts=",
        "-W", "default", "-x" if run.options.first else "--maxfail=20",
    ]  # fmt: skip
    run.finish(run.start(command, log), log, seconds)


def tests(run: Run, seconds: float) -> None:
    """The tests of the GPU and of what they build on."""
    tested(run, ["tests/gpu", "tests/generate/test_graph_step.py", "tests/ops/test_transport.py"], "tests.log", seconds)


def kernels(run: Run, seconds: float) -> None:
    """Kernels are tested in half of the time, as compiled where there is a GPU, and then measured."""
    until = time.time() + seconds
    tested(
        run, ["tests/kernels/test_kernels.py", "tests/kernels/test_slot_kernels.py"], "kernel tests.log", seconds / 2
    )
    arguments: list[Any] = ["--folder", run.folder, "--until", until - 0.2 * seconds]
    arguments += ["--rehearse"] if run.options.rehearse else []
    run.finish(run.start(run.command("gpu_kernels.py", *arguments), "kernels.log"), "kernels.log", until - time.time())


def training(run: Run, seconds: float) -> None:
    """All contenders get ready side by side, while tokens are decoded; then one after the other is measured."""
    begun, folder = time.time(), run.folder / "training"
    folder.mkdir(exist_ok=True)
    cells = [(contender, preset, length) for contender, preset in TRAINED for length in LENGTHS]
    extra: list[Any] = []
    if run.options.rehearse:
        cells = [(contender, "tiny", 256) for contender in ("ours", "llama-compiled", "mamba2-compiled")]
        extra = ["--tokens", 512] + ([] if run.gpu else ["--device", "cpu"])
    waiting = {}
    for contender, preset, length in cells:
        name = f"{contender} {preset} {length}"
        if not (folder / f"{name}.json").exists():
            for sign in ("ready", "go"):
                (folder / f"{name}.{sign}").unlink(missing_ok=True)
            arguments = ["--contender", contender, "--preset", preset, "--lengths", length, "--name", name]
            command = run.command("gpu_training.py", "--folder", folder, *arguments, *extra)
            waiting[name] = run.start(command, "training.log")
    if run.gpu:
        presets = ["small"] if run.options.rehearse else ["small", "base"]
        arguments = ["--folder", run.folder, "--until", begun + 0.6 * seconds - 5, "--preset", *presets]
        run.finish(run.start(run.command("gpu_decoding.py", *arguments), "decoding.log"), "decoding.log", 0.6 * seconds)
    while time.time() < begun + 0.66 * seconds and not all(
        (folder / f"{name}.ready").exists() or process.poll() is not None for name, process in waiting.items()
    ):
        time.sleep(0.2)
    print(f"prepared in {time.time() - begun:.0f} s", flush=True)
    for name, process in waiting.items():
        if not (folder / f"{name}.ready").exists():
            print(f"{name}: not ready in time", flush=True)
            process.kill()
    for name, process in waiting.items():
        if process.poll() is None:
            (folder / f"{name}.go").touch()
            try:
                process.wait(timeout=max(1.0, begun + seconds - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
        result = folder / f"{name}.json"
        print(name, result.read_text() if result.exists() else "no result", flush=True)


def study(run: Run, seconds: float) -> None:
    if "text" in run.options.stages:
        prepare_texts(run)  # on the processor, meanwhile
    arguments: list[Any] = ["--output", run.folder / "study.json", "--weights", run.folder / "weights"]
    arguments += ["--seconds", max(5.0, seconds - 18), "--device", "cuda" if run.gpu else "cpu"]
    if run.options.compile_study:
        arguments += ["--compile"]
    if run.options.rehearse:
        arguments += ["--steps", 60 if run.gpu else 1, "--sweep-steps", 40 if run.gpu else 1]
        arguments += ["--validation-tokens", 4096 if run.gpu else 1024, "--study", "families"]
    run.finish(run.start(run.command("gpu_study.py", *arguments), "study.log"), "study.log", seconds)


def prepare_texts(run: Run) -> None:
    """Start the models that train on text; they compile and wait."""
    if run.options.shard is None or run.texts:
        return
    unpacked = run.folder / "shard"
    if not unpacked.exists():
        part = run.folder / "shard.part"  # as a call that was stopped may leave it
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(run.options.shard) as archive:
            archive.extractall(part, filter="data")
        part.rename(unpacked)
    for name in run.options.texts:
        if (run.folder / f"{name}.json").exists():
            continue
        for sign in ("ready", "go"):
            (run.folder / f"{name}.{sign}").unlink(missing_ok=True)
        arguments: list[Any] = ["--model", name, "--shard", unpacked, "--folder", run.folder]
        arguments += ["--compile"] if run.gpu else ["--device", "cpu", "--rows", 1]
        run.texts[name] = run.start(run.command("gpu_text.py", *arguments), f"text {name}.log")


def text(run: Run, seconds: float) -> None:
    """tiny-en with two fifths of the time, then `small` and the Llama with equal parts."""
    prepare_texts(run)
    if not run.texts:
        print("no shard was given" if run.options.shard is None else "all texts are there", flush=True)
        return
    until = time.time() + seconds
    while time.time() < until - 0.5 * seconds and not all(
        (run.folder / f"{name}.ready").exists() or process.poll() is not None for name, process in run.texts.items()
    ):
        time.sleep(0.2)
    shares = {name: 1.4 if name == "tiny-en" else 1.0 for name in run.texts}
    after = 6.0 * len(shares)  # in which models are scored and saved
    each = max(2.0, (until - time.time() - after) / sum(shares.values()))
    for name, process in run.texts.items():
        part = run.folder / f"{name}.part"  # whoever waits for the file reads it at once
        part.write_text(f"{each * shares[name]:.1f}")
        part.rename(run.folder / f"{name}.go")
        run.finish(process, f"text {name}.log", until + 10 - time.time())


STAGES = {"tests": tests, "kernels": kernels, "training": training, "study": study, "text": text}


def refused(options: argparse.Namespace) -> str | None:
    """What is wrong with the request, before minutes of a GPU are spent."""
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        return f"--minutes is {options.minutes}; give a number above 0"
    if options.tail < 1:
        return f"--tail is {options.tail}; give at least 1"
    if options.output.exists() and not options.output.is_dir():
        return f"{options.output} is no folder; give another --output"
    if options.wheels is not None and not options.wheels.is_dir():
        return f"there is no folder {options.wheels}; --wheels is one of wheels"
    if options.shard is not None and not (options.shard.is_file() and tarfile.is_tarfile(options.shard)):
        return f"{options.shard} is no archive; --shard is the file that shard.py wrote"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder of results and logs")
    parser.add_argument("--shard", type=Path, metavar="FILE", help="text: `python benchmarks/shard.py --output FILE`")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these wheels first")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all stages together (default: 9)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="models of the stage text")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the CPU where there is no GPU")
    parser.add_argument("--compile-study", action="store_true", help="compile the models of the stage study")
    parser.add_argument("--first", action="store_true", help="stop the tests at the first failure")
    parser.add_argument("--tail", type=int, default=12, help="lines shown of each log")
    options = parser.parse_args()
    if wrong := refused(options):
        parser.error(wrong)
    run = Run(options)
    import torch

    card: dict[str, Any] = {"torch": torch.__version__, "device": "cpu"}
    if run.gpu:
        card |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print(json.dumps(card), flush=True)
    (run.folder / "card.json").write_text(json.dumps(card))
    for number, stage in enumerate(options.stages):
        left = run.until - time.time()
        if left < 10:
            print(f"no time for {stage}", flush=True)
            continue
        seconds = left * SHARES[stage] / sum(SHARES[later] for later in options.stages[number:])
        begun = time.time()
        print(f"==== {stage}: at most {seconds:.0f} s of {left:.0f}", flush=True)
        STAGES[stage](run, seconds)
        print(f"==== {stage}: {time.time() - begun:.0f} s", flush=True)
    shutil.rmtree(run.folder / "shard", ignore_errors=True)
    shutil.rmtree(run.folder / "inductor", ignore_errors=True)
    subprocess.run(run.command("gpu_summary.py", "--folder", run.folder), check=True)


if __name__ == "__main__":
    main()
