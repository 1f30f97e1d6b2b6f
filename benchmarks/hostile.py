"""Damaged and hostile inputs: what the command line does with each, counted by class, for two commits.

    git worktree add OLD 3c2a5a6
    PYTHONPATH=OLD/src python benchmarks/hostile.py --label before   # all trials with the code of that commit
    PYTHONPATH=src python benchmarks/hostile.py --label now
    python benchmarks/hostile.py --table                             # results/hostile.md, of both
    PYTHONPATH=src python benchmarks/hostile.py --only states        # one class, printed trial by trial

A trial damages a copy of an intact input and calls the command line in a forked child. Its outcome is one of

    right      the result of the intact input, or an exit that the trial allows (a signal that saves, say)
    refused    exit code 1 or 2, and a message of at most eight lines without a traceback
    wrong      exit code 0 with another result, or where the input had to be refused; raw escape sequences in a message
    traceback  a traceback, or an exit without a message
    crash      ended by a signal that nobody sent
    hang       not ended after LIMIT seconds

Damage that nothing can show is left out: weights, states and ids that change within their range in a file whose
checksum was made again, or whose format has none.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command line sets it, before transformers is imported

from hostile_inputs import CLASSES, Intact, Told, Trial  # beside this file

RESULTS = Path(__file__).parent / "results"
LIMIT = 20.0
OUTCOMES = ("right", "refused", "wrong", "traceback", "crash", "hang")
MOST_LINES = 8
SMALL = [
    "max_steps=6",
    "save_steps=2",
    "eval_steps=3",
    "logging_steps=1",
    "per_device_train_batch_size=4",
    "data.sequence_length=32",
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.intermediate_size=16",
    "model.slot_entries=16",
    "model.slot_layers=[1]",
    "learning_rate=0.01",
]


def call(trial: Trial) -> Told:
    """Run the command line in a child that was forked from this process, which has imported everything."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        given.write(trial.stdin)
        given.seek(0)
        here, there = (os.pipe(), os.pipe()) if trial.act else (None, None)
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(here[0] if here else given.fileno(), 0)
            os.dup2(there[1] if there else out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.closerange(3, 256)
            _be_the_command(trial.arguments)
        if trial.act and here and there:
            os.close(here[0])
            os.close(there[1])
            with os.fdopen(here[1], "wb", 0) as to_it, os.fdopen(there[0], "rb", 0) as from_it:
                trial.act(child, to_it, from_it)
                code = _wait(child)
        else:
            code = _wait(child)
        out.seek(0)
        err.seek(0)
        return Told(code, out.read(), err.read())


def _be_the_command(arguments: list[str]) -> None:
    """In the child: what `python -m dyadlm` does, down to the exit code."""
    from dyadlm.cli import main

    code: Any = 0
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # a shell may have had them ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = code or 120  # as Python ends where its output is read no more
    finally:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _wait(child: int) -> int | None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def outcome(trial: Trial, told: Told, intact: Any) -> str:
    """One of `OUTCOMES`."""
    lines = [line for line in told.err.decode(errors="replace").splitlines() if line.strip()]
    if told.code is None:
        return "hang"
    if b"Traceback (most recent call last)" in told.err:
        return "traceback"
    if trial.check is not None:
        return "right" if trial.check(told) else "crash" if told.code < 0 else "wrong"
    if told.code < 0:
        return "crash"
    if b"\x1b" in told.err:
        return "wrong"
    if told.code:
        return "refused" if told.code in (1, 2) and 0 < len(lines) <= MOST_LINES else "traceback"
    if trial.expect == "any":
        return "right"
    if trial.expect == "refuse":
        return "wrong"
    return "right" if trial.figure(told) == intact else "wrong"


def make_intact(place: Path) -> Intact:
    """Train two small models, prepare data, save states; with the code under test."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    text = "\n\n".join(" ".join(draw.choices(words, k=40)) + "." for _ in range(40)) + "\n"
    (place / "text.txt").write_text(text)
    records = [json.dumps({"text": part}) for part in text.split("\n\n")]
    (place / "documents.jsonl").write_text("\n".join(records) + "\n")
    run, other = str(place / "run"), str(place / "other")
    base = ["--preset", "tiny", "--data", str(place / "text.txt"), "--device", "cpu", "--dtype", "float32", "--set"]
    calls = [
        ["train", "--output", run, *base, *SMALL],
        ["train", "--output", other, *base, *SMALL, "seed=1"],
        ["data", "prepare", str(place / "documents.jsonl"), "--output", str(place / "prepared")],
        ["stream", run, "--state-out", str(place / "state")],
        ["stream", other, "--state-out", str(place / "other-state")],
    ]
    for arguments in calls:
        told = call(Trial("intact", arguments, stdin=text[:300].encode()))
        if told.code:
            raise SystemExit(f"{arguments[0]} of the intact inputs fails: {told.err.decode()[-2000:]}")
    lora = ["train", "--output", str(place / "adapter"), "--model", run, "--lora", "2", *base[2:], "max_steps=2"]
    call(Trial("intact", [*lora, "data.sequence_length=32", "learning_rate=0.1"]))  # there are none at the old commit
    return Intact(place)


def import_everything(intact: Intact) -> None:
    """So that a forked child has nothing to import or compile."""
    import contextlib
    import io

    import matplotlib.pyplot  # noqa: F401
    import transformers.trainer  # noqa: F401

    from dyadlm.cli import main

    run = str(intact / "run")
    for arguments in (["stream", run], ["evaluate", run, "--data", str(intact / "prepared"), "--json"]):
        with (
            contextlib.suppress(SystemExit),
            contextlib.redirect_stdout(io.StringIO()),
            open(os.devnull, encoding="utf-8") as sys.stdin,
        ):
            main(arguments)


def measure(only: str | None) -> dict[str, Any]:
    """Every trial of every class: counts of outcomes, and what is neither right nor refused."""
    import dyadlm

    tree = Path(dyadlm.__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True, check=False
    ).stdout.strip()
    result: dict[str, Any] = {"commit": commit, "classes": {}}
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        os.environ["DYADLM_CACHE"] = str(Path(folder) / "cache")
        intact = make_intact(Path(folder))
        import_everything(intact)
        for name, trials in CLASSES.items():
            if only in (None, name) and (name != "adapters" or (intact / "adapter").exists()):
                begun = time.monotonic()
                result["classes"][name] = measure_class(name, trials, intact, only is not None)
                counts = result["classes"][name]["counts"]
                print(f"{name}: {counts} in {time.monotonic() - begun:.0f} s", flush=True)
    return result


def measure_class(name: str, trials: Callable[..., Iterator[Trial]], intact: Intact, aloud: bool) -> dict[str, Any]:
    """The first trial of a class is the intact input; its figure is what `same` means."""
    counts: Counter[str] = Counter()
    listed, known = {}, {}
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        place = Path(folder)
        for trial in trials(random.Random(name), intact, place):
            told = call(trial)
            if trial.name.startswith("intact"):
                if told.code:
                    raise SystemExit(f"{name}, {trial.name}: the intact input fails: {told.err.decode()[-2000:]}")
                known[trial.name.removeprefix("intact ")] = trial.figure(told)
            else:
                kind = next((key for key in known if trial.name.startswith(f"{key}: ")), "intact")
                found = outcome(trial, told, known.get(kind))
                counts[found] += 1
                last = told.err.decode(errors="replace").strip().splitlines()[-1:] or [""]
                if found not in ("right", "refused"):
                    listed[trial.name] = [found, last[0][:200]]
                if aloud:
                    print(f"{found:9} {trial.name}: {told.code} {last[0][:160]}", flush=True)
            for left in place.iterdir():
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink()
    return {"trials": sum(counts.values()), "counts": {key: counts[key] for key in OUTCOMES}, "listed": listed}


def table(results: dict[str, Any]) -> str:
    """Markdown: counts by class for both commits, then every trial that is still neither right nor refused."""
    before, now = results["before"], results["now"]
    lines = [
        "# Damaged and hostile inputs, before and after",
        "",
        f"Before: commit {before['commit']}. After: commit {now['commit']}. Made by `benchmarks/hostile.py`, which "
        "says what the outcomes mean. Each cell: before → after.",
        "",
        "| class | trials | " + " | ".join(OUTCOMES) + " |",
        "|---|---|" + "---|" * len(OUTCOMES),
    ]
    rows = {name: (before["classes"].get(name), entry) for name, entry in now["classes"].items()}
    for name, (old, new) in rows.items():
        cells = [f"{old['counts'][key] if old else '–'} → {new['counts'][key]}" for key in OUTCOMES]
        trials = f"{old['trials']} → {new['trials']}" if old and old["trials"] != new["trials"] else str(new["trials"])
        lines.append(f"| {name} | {trials} | " + " | ".join(cells) + " |")
    both = [(old, new) for old, new in rows.values() if old]
    sums = [
        f"{sum(old['counts'][key] for old, _ in both)} → {sum(new['counts'][key] for _, new in both)}"
        for key in OUTCOMES
    ]
    lines.append(f"| classes of both | {sum(new['trials'] for _, new in both)} | " + " | ".join(sums) + " |")
    lines += ["", "## Neither right nor refused after", ""]
    left = [(name, trial, *found) for name, (_, new) in rows.items() for trial, found in new["listed"].items()]
    lines += [f"- {name}: {trial}: {found}. `{last.replace('`', '')}`" for name, trial, found, last in left] or [
        "None."
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", choices=("before", "now"), help="write the results under this name")
    parser.add_argument("--only", choices=list(CLASSES), help="one class; with --label its results are replaced")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    given = parser.parse_args()
    found = None if given.table else measure(given.only)
    path = RESULTS / "hostile.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if found is not None:
        if not given.label:
            return
        if given.only and given.label in results:
            found["classes"] = results[given.label]["classes"] | found["classes"]
        results[given.label] = found
        path.write_text(json.dumps(results, indent=1) + "\n")
    if {"before", "now"} <= results.keys():
        (RESULTS / "hostile.md").write_text(table(results))


if __name__ == "__main__":
    main()
