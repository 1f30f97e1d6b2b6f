"""Which score of a line finds planted lines, whether alerts are as rare as asked, and what learning while reading does.

    python benchmarks/synthetic_log.py --lines 8000 --seed 1 > normal.log
    dyadlm train --preset tiny --data normal.log --output log-model --set max_steps=300 learning_rate=2e-3
    python benchmarks/anomalies.py log-model

Every log is read as one stream. The first half of a normal log calibrates, the other half tells the rate of false
alarms; three logs with 5 lines planted of each of 8 kinds tell AUC and the share that is found at a false-alarm rate of
0.001. The same is done with a log of another host, other paths and other addresses than those of the training, with
learning and without.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

import synthetic_log
from anomaly_logs import auc
from common import ROOT, circumstances
from dyadlm.files import write_atomically
from dyadlm.generate import EngineModel, Session, engine_model
from dyadlm.score import Calibration, Drift, Line, Reading, Scorer, chunks, units
from dyadlm.score.learning import Learner
from dyadlm.score.lines import Numbering
from dyadlm.score.units import ScoredLine

RATES = (0.01, 0.001)
OTHERWISE = (("web1", "db-prod-7"), ("10.0.", "172.16."), ("/api/v1/", "/graphql/v2/"), ("postgres[", "mariadb["))


def excess(expected: float) -> Callable[[np.ndarray], float]:
    """The largest sum over a span of the bits beyond `expected` a byte."""

    def of(bits: np.ndarray) -> float:
        return units.oddest_span(bits - expected)[0]

    return of


def beyond(expected: float) -> Callable[[np.ndarray], float]:
    """The sum over all bytes of the bits beyond `expected`."""

    def of(bits: np.ndarray) -> float:
        return float(np.maximum(bits - expected, 0).sum())

    return of


def window(width: int) -> Callable[[np.ndarray], float]:
    """The largest sum of bits over so many neighbouring bytes."""

    def of(bits: np.ndarray) -> float:
        sums = np.concatenate([[0.0], np.cumsum(bits)])
        return float((sums[width:] - sums[:-width]).max()) if len(bits) > width else float(bits.sum())

    return of


def default(scored: ScoredLine) -> float:
    """What `dyadlm score` judges a line by."""
    (unit,) = units.units_of([scored], Reading())
    return unit.score


SCORES: dict[str, Callable[[np.ndarray], float]] = {
    "mean bits per byte": lambda bits: float(bits.mean()),
    "total bits": lambda bits: float(bits.sum()),
    "largest byte": lambda bits: float(bits.max()),
    **{f"window of {width} bytes": window(width) for width in (4, 16)},
    **{f"excess over {expected} bits": excess(expected) for expected in (1, 2, 3, 4, 5, 6)},
    **{f"beyond {expected} bits": beyond(expected) for expected in (2, 3, 4)},
}


# All but the default look at bits alone.
JUDGES: dict[str, Callable[[ScoredLine], float]] = {"default": default} | {
    name: (lambda scored, score=score: score(scored.bits)) for name, score in SCORES.items()
}


def read(model: EngineModel, lines: list[str], learn: bool = False) -> list[ScoredLine]:
    """The lines with the bits of their bytes."""
    numbering = Numbering("log")
    placed: list[Line] = [numbering.place(f"{line}\n".encode()) for line in lines]
    learner = Learner(model.fields["vocab_size"], model.fields["hidden_size"]) if learn else None
    scorer = Scorer(Session(model, model.tokenizer), model.tokenizer, Drift(), learner)
    return [scored for chunk in chunks(placed) for scored in scorer.read(chunk)]


def study(model: EngineModel, lines: int, changed: bool, learn: bool) -> dict[str, object]:
    """Each score's AUC, share found and false alarms, on logs like those of the training or on others."""

    def log(seed: int, odd: int) -> tuple[list[str], dict[int, str]]:
        found, planted = synthetic_log.log(lines, seed, odd)
        for old, new in OTHERWISE if changed else ():
            found = [line.replace(old, new) for line in found]
        return found, planted

    normal = read(model, log(11, 0)[0] + log(12, 0)[0], learn)
    logs = []
    for seed in (21, 22, 23):
        found, planted = log(seed, 5)
        odd = np.isin(np.arange(1, lines + 1), list(planted))
        logs.append((read(model, found, learn), odd))
    result: dict[str, object] = {
        "bits per byte of the normal log": float(np.concatenate([scored.bits for scored in normal]).mean()),
        "of its last quarter": float(np.concatenate([scored.bits for scored in normal[-len(normal) // 4 :]]).mean()),
    }
    for name, score in JUDGES.items():
        calibration = Calibration("", Reading())
        for scored in normal[:lines]:
            calibration.add(score(scored))
        alarms = [calibration.p(score(scored)) for scored in normal[lines:]]
        cells = []
        for read_lines, odd in logs:
            scores = np.array([score(scored) for scored in read_lines])
            found_odd = [calibration.p(value) <= RATES[1] for value in scores[odd]]
            cells.append((auc(scores, odd), float(np.mean(found_odd))))
        result[name] = {
            "auc": [round(cell[0], 5) for cell in cells],
            "found at 0.001": [round(cell[1], 3) for cell in cells],
            "false alarms": {str(rate): float(np.mean(np.array(alarms) <= rate)) for rate in RATES},
        }
        means = [statistics.mean(cell[place] for cell in cells) for place in (0, 1)]
        print(f"{name:24} AUC {means[0]:.4f}  found {means[1]:.3f}  {result[name]}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="trained as above")
    parser.add_argument("--lines", type=int, default=3000, help="of each log")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "anomalies.json")
    options = parser.parse_args()
    model = engine_model(options.model, "cpu", "float32")
    if model is None:
        raise SystemExit("Train the model as it is said above.")
    found: dict[str, object] = {"lines": options.lines} | circumstances()
    for name, changed, learn in (
        ("like the training", False, False),
        ("like the training, learning", False, True),
        ("another system", True, False),
        ("another system, learning", True, True),
    ):
        print(f"-- {name}", flush=True)
        found[name] = study(model, options.lines, changed, learn)
        write_atomically(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
