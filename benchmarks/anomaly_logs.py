"""Finding the lines of faults in logs of real programs: `dyadlm score` beside three methods for logs.

    python benchmarks/anomaly_logs.py --work logs-work

`benchmarks/data/logs` holds the logs and says of each line whether it belongs to a fault; `benchmarks/real_logs.py`
made them. Splits are chronological. Of the lines before the first fault, the last third, at most 1,000, is for
calibration, and what is before that for training; the first 1,500 lines from the first fault on are the test. Every
method sees the same lines in the same order and gives one score for each.

Each cell (one method on one log) runs in a process of its own, whose largest memory is measured, and is kept in the
results; what is there is not run again. Needs the extra `bench`. Speeds count seconds of the processor, learning of the
peers included.
"""

import argparse
import json
import lzma
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

# What loads torch is imported where it is used: the memory of the peers is measured.
if TYPE_CHECKING:
    from common import Cells
    from dyadlm.score import Line

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "benchmarks" / "data" / "logs"
SOURCES = ("nginx", "redis", "sshd", "postgres", "dpkg", "fail2ban")
RATES = (0.001, 0.01)
TRAINING = ["--preset", "tiny", "--set", "max_steps=300", "learning_rate=2e-3"]
CALIBRATION, TEST = 1000, 1500
# Lines that are drawn together for intervals: what a fault writes stands together.
BLOCK, DRAWS = 20, 1000


class Log(NamedTuple):
    """Lines of a log, with their line ends, in three parts; odd: bool, of each line of the test."""

    train: list[bytes]
    calibration: list[bytes]
    test: list[bytes]
    odd: np.ndarray


def read_log(name: str) -> Log:
    """A log of `LOGS`, in parts."""
    content = lzma.decompress((LOGS / f"{name}.log.xz").read_bytes())
    rows = [row.split(b"\t", 1) for row in content.split(b"\n")[:-1]]
    odd = np.array([kind != b"-" for kind, _ in rows])
    lines = [line + b"\n" for _, line in rows]
    first = int(odd.argmax())
    cut, stop = first - min(CALIBRATION, first // 3), first + TEST
    return Log(lines[:cut], lines[cut:first], lines[first:stop], odd[first:stop])


# --- the peers: each learns from lines, and scores lines; higher is odder


def drain(train: list[bytes], lines: list[bytes]) -> list[float]:
    """How rare the template of a line is among the lines of the training, by drain3; a line with none is the oddest."""
    from drain3 import TemplateMiner
    from drain3.masking import MaskingInstruction
    from drain3.template_miner_config import TemplateMinerConfig

    config = TemplateMinerConfig()
    # Those of its own example.
    config.masking_instructions = [
        MaskingInstruction(r"((?<=[^A-Za-z0-9])|^)(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})((?=[^A-Za-z0-9])|$)", "IP"),
        MaskingInstruction(r"((?<=[^A-Za-z0-9])|^)(0x[a-f0-9A-F]+)((?=[^A-Za-z0-9])|$)", "HEX"),
        MaskingInstruction(r"((?<=[^A-Za-z0-9])|^)([\-\+]?\d+)((?=[^A-Za-z0-9])|$)", "NUM"),
    ]
    miner = TemplateMiner(config=config)
    for line in train:
        miner.add_log_message(text_of(line))
    sizes = {cluster.cluster_id: cluster.size for cluster in miner.drain.clusters}
    found = [miner.match(text_of(line)) for line in lines]
    return [math.log(len(train) / (0.5 if one is None else sizes[one.cluster_id])) for one in found]


def trigrams(parts: Callable[[bytes], list[str]]) -> Callable[[list[bytes], list[bytes]], list[float]]:
    """The share of a line's trigrams that the training does not hold."""

    def score(train: list[bytes], lines: list[bytes]) -> list[float]:
        known = {three for line in train for three in threes(parts(line))}
        return [float(np.mean([three not in known for three in threes(parts(line))])) for line in lines]

    return score


def threes(parts: list[str]) -> list[tuple[str, ...]]:
    parts = ["", "", *parts]
    return list(zip(parts, parts[1:], parts[2:], strict=False))


def forest(train: list[bytes], lines: list[bytes]) -> list[float]:
    """An isolation forest over counts of words, numbers masked."""
    from sklearn.ensemble import IsolationForest
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"\S+", lowercase=False, max_features=2000)
    known, asked = ([" ".join(words(masked(line))) for line in part] for part in (train, lines))
    model = IsolationForest(n_estimators=200, random_state=0).fit(counter.fit_transform(known).tocsc())
    found: list[float] = (-model.score_samples(counter.transform(asked).tocsr())).tolist()
    return found


def text_of(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r\n")


def masked(line: bytes) -> bytes:
    return re.sub(rb"\d+", b"0", line)


def words(line: bytes) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text_of(line))


PEERS: dict[str, Callable[[list[bytes], list[bytes]], list[float]]] = {
    "drain3": drain,
    "trigrams of characters": trigrams(lambda line: list(text_of(line))),
    "trigrams of characters, numbers masked": trigrams(lambda line: list(text_of(masked(line)))),
    "trigrams of words, numbers masked": trigrams(lambda line: words(masked(line))),
    "isolation forest": forest,
}
OURS = ("dyadlm", "dyadlm --memory", "dyadlm --learn")


METHODS = (*PEERS, *OURS)


def bits_of(model: Path, lines: list[bytes], learn: bool) -> np.ndarray:
    """The bits of the bytes of all lines, read as one stream as `dyadlm score` reads them."""
    from dyadlm.cli.score import open_scorer
    from dyadlm.score import Reading, chunks

    scorer, _, _ = open_scorer(str(model), "cpu", "float32", None, None, Reading(learn=learn), None, None, None)
    return np.concatenate([scored.bits for chunk in chunks(placed(lines)) for scored in scorer.read(chunk)])


def remembered(lines: list[bytes], bits: np.ndarray) -> np.ndarray:
    """The bits with a memory mixed into a reading without one: those of `--memory`, to the last (tests/score)."""
    from dyadlm.memory import ContextMemory

    memory = ContextMemory()
    memory.read(np.array([257]), np.array([np.nan]))  # the beginning token
    ids = np.frombuffer(b"".join(lines), np.uint8).astype(np.int64)
    nats = memory.read(ids, (bits * math.log(2)).astype(np.float32))
    return nats.astype(np.float64) / math.log(2)


def judged(lines: list[bytes], bits: np.ndarray) -> list[float]:
    """The default score of each line."""
    from dyadlm.score import Reading, units_of
    from dyadlm.score.units import ScoredLine
    from dyadlm.score.usual import Usual

    parts = np.split(bits, np.cumsum([len(line) for line in lines])[:-1])
    usual, nothing = Usual(), np.zeros(1, np.int64)
    scored = (
        ScoredLine(line, part, nothing, usual.expected(part)) for line, part in zip(placed(lines), parts, strict=True)
    )
    return [unit.score for unit in units_of(scored, Reading())]


def placed(lines: list[bytes]) -> "Iterator[Line]":
    from dyadlm.score.lines import Numbering

    return map(Numbering("log").place, lines)


# --- cells


def train(name: str, work: Path) -> dict[str, object]:
    """A model of the first lines of a log, by the command."""
    (work / f"{name}.train.log").write_bytes(b"".join(read_log(name).train))
    command = [sys.executable, "-m", "dyadlm", "train", "--data", work / f"{name}.train.log", *TRAINING]
    started = time.perf_counter()
    subprocess.run([*map(str, command), "--output", str(work / f"{name}.model")], check=True)
    return {"seconds": round(time.perf_counter() - started, 1)}


def read(name: str, method: str, work: Path) -> dict[str, object]:
    """One method on one log, in this process; its scores, or the bits of bytes that they come from, go to a file."""
    log = read_log(name)
    lines = [*log.calibration, *log.test]
    if method in PEERS:
        started = time.process_time()
        found = np.array(PEERS[method](log.train, lines))
        seconds = time.process_time() - started
    elif method == "dyadlm --memory":
        plain = np.load(work / saved_name(name, "dyadlm"))
        remembered(lines[:1], plain[: len(lines[0])])  # what is compiled is compiled
        started = time.process_time()
        found = remembered(lines, plain)
        seconds = time.process_time() - started + float((work / f"{name}.seconds").read_text())
    else:
        bits_of(work / f"{name}.model", lines[:3], learn=False)
        started = time.process_time()
        found = bits_of(work / f"{name}.model", lines, method == "dyadlm --learn")
        seconds = time.process_time() - started
        if method == "dyadlm":
            (work / f"{name}.seconds").write_text(str(seconds))
    np.save(work / saved_name(name, method), found)
    size = sum(map(len, lines))
    return {"bytes": size, "bytes_per_second": round(size / seconds), "peak_mib": peak_mib()}


def scores_of(name: str, method: str, work: Path) -> np.ndarray:
    """The score of each line of calibration and test."""
    log, found = read_log(name), np.load(work / saved_name(name, method))
    return found if method in PEERS else np.array(judged([*log.calibration, *log.test], found))


def saved_name(name: str, method: str) -> str:
    return f"{name}.{re.sub('[^a-z0-9]+', '_', method)}.npy"


def measures(scores: np.ndarray, log: Log) -> dict[str, object]:
    """AUC and F1 with intervals; at each rate that was asked for, by conformal thresholds, what was alerted."""
    calibration, test = np.sort(scores[: len(log.calibration)]), scores[len(log.calibration) :]
    p = (len(calibration) - np.searchsorted(calibration, test) + 1) / (len(calibration) + 1)
    picks = [draw(number, len(test)) for number in range(DRAWS)]
    picks = [pick for pick in picks if 0 < log.odd[pick].sum() < len(pick)]
    found: dict[str, object] = {
        "auc": with_interval(auc(test, log.odd), [auc(test[pick], log.odd[pick]) for pick in picks]),
        "best_f1": with_interval(best_f1(test, log.odd), [best_f1(test[pick], log.odd[pick]) for pick in picks]),
    }
    for rate in RATES:
        alerts = p <= rate
        if rate * (len(calibration) + 1) < 1:
            continue  # no threshold is so strict
        f1 = [f1_of(alerts[pick], log.odd[pick]) for pick in picks]
        found[f"at {rate:g}"] = {
            "false_alarms": float(alerts[~log.odd].mean()),
            "found": float(alerts[log.odd].mean()),
            "f1": with_interval(f1_of(alerts, log.odd), f1),
        }
    return found


def draw(number: int, size: int) -> np.ndarray:
    """Places of blocks of lines, drawn with replacement; the same for every method."""
    blocks = -(-size // BLOCK)
    chosen = np.random.default_rng(number).integers(blocks, size=blocks)
    places: np.ndarray = (chosen[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    return places[places < size]


def with_interval(value: float, draws: list[float]) -> list[float]:
    """The value, and the 95 % interval of its bootstrap."""
    return [round(float(number), 4) for number in (value, *np.quantile(draws, (0.025, 0.975)))]


def f1_of(alerts: np.ndarray, odd: np.ndarray) -> float:
    return float(2 * (alerts & odd).sum() / max(alerts.sum() + odd.sum(), 1))


def auc(scores: np.ndarray, odd: np.ndarray) -> float:
    """The chance that an odd line scores above a normal one, ties half."""
    normal = np.sort(scores[~odd])
    below = (np.searchsorted(normal, scores[odd]) + np.searchsorted(normal, scores[odd], "right")) / 2
    return float(below.mean() / len(normal))


def best_f1(scores: np.ndarray, odd: np.ndarray) -> float:
    """The largest F1 of any threshold, which nobody knows before."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(odd[order])
    whole = np.append(np.diff(scores[order]) != 0, True)  # equal scores are alerted together
    return float((2 * hits / (np.arange(1, len(scores) + 1) + odd.sum()))[whole].max())


def differences(name: str, work: Path) -> dict[str, object]:
    """AUC of each of ours less that of each peer, with the interval of a paired bootstrap."""
    log = read_log(name)
    saved = {method: scores_of(name, method, work)[len(log.calibration) :] for method in METHODS}
    picks = [draw(number, len(log.test)) for number in range(DRAWS)]
    picks = [pick for pick in picks if 0 < log.odd[pick].sum() < len(pick)]
    values = {method: auc(scores, log.odd) for method, scores in saved.items()}
    draws = {method: np.array([auc(scores[pick], log.odd[pick]) for pick in picks]) for method, scores in saved.items()}
    return {
        own: {peer: with_interval(values[own] - values[peer], list(draws[own] - draws[peer])) for peer in PEERS}
        for own in OURS
    }


def measured(arguments: list[str], place: Path) -> dict[str, object]:
    """What a process of this file found."""
    subprocess.run([sys.executable, __file__, *arguments], check=True)
    found: dict[str, object] = json.loads(place.read_text())
    return found


def peak_mib() -> int:
    """The most memory that this process had."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) // 1024


def draw_picture(cells: "Cells", path: Path) -> None:
    """AUC of each method on each log, with intervals."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SOURCES), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, SOURCES, strict=True):
        for place, method in enumerate(reversed(METHODS)):
            value, low, high = cells.results[f"{name}: {method}"]["auc"]
            axis.plot([low, high], [place, place], color="C0" if method in OURS else "C7")
            axis.plot(value, place, "o", color="C0" if method in OURS else "C7", markersize=4)
        axis.set(title=name, xlabel="AUC", yticks=range(len(METHODS)), yticklabels=reversed(METHODS))
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and scores")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "anomaly_logs.json")
    parser.add_argument("--only", nargs="*", choices=SOURCES, default=SOURCES, help="leave out the other logs")
    parser.add_argument("--cell", nargs=2, metavar=("SOURCE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work
    if options.cell is not None:
        (work / f"{options.cell[0]}.cell.json").write_text(json.dumps(read(options.cell[0], options.cell[1], work)))
        return
    try:
        import drain3
        import sklearn
    except ImportError as error:
        raise SystemExit(f"The peers are not installed ({error.name}); install dyadlm[bench].") from None
    del drain3, sklearn
    from common import Cells

    work.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.output)
    readings = [f"reading, {method}" for method in METHODS]
    names = [f"{name}: {what}" for name in options.only for what in ("training", *readings, *METHODS, "differences")]
    for cell in cells.missing(names):
        name, what = cell.split(": ")
        if what == "training":
            log = read_log(name)
            counts = {"train": len(log.train), "calibration": len(log.calibration), "test": len(log.test)}
            cells.store(cell, train(name, work) | {"lines": counts | {"of faults": int(log.odd.sum())}})
        elif what in readings:
            method = what.removeprefix("reading, ")
            cells.store(cell, measured(["--work", str(work), "--cell", name, method], work / f"{name}.cell.json"))
        elif what == "differences":
            cells.store(cell, differences(name, work))
        else:
            cells.store(cell, measures(scores_of(name, what, work), read_log(name)))
    if any(f"{name}: differences" not in cells.results for name in SOURCES):
        return
    draw_picture(cells, options.output.with_suffix(".png"))
    ahead = Counter(
        own
        for name in SOURCES
        for own, peers in cells.results[f"{name}: differences"].items()
        if own in OURS and all(low > 0 for _, low, _ in peers.values())
    )
    print(f"ahead of every peer, by the interval, of {len(SOURCES)} logs: {dict(ahead)}")


if __name__ == "__main__":
    main()
