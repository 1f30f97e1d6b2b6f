"""The ranges that the page of `dyadlm diagnose` shows beside a model, from the answers in benchmarks/results/diagnosis.

    python benchmarks/usual.py          # writes src/dyadlm/report/usual.json; nothing is measured anew

A range goes from the lowest to the highest seed of one kind of model, and is kept for readings that all seeds have.
"""

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "diagnosis"
USUAL = ROOT / "src" / "dyadlm" / "report" / "usual.json"
KINDS = ("dyadlm-0.3M", "dyadlm-1M", "dyadlm-3M", "llama-1M", "mamba2-1M")


def ranges() -> list[dict[str, Any]]:
    """One entry for each kind, asked once and over its checkpoints."""
    return [
        _kind(kind, sorted(RESULTS.glob(f"{kind}-seed[0-9]{over}.json")), bool(over))
        for kind in KINDS
        for over in ("", "-over-time")
    ]


def _kind(name: str, files: list[Path], over_time: bool) -> dict[str, Any]:
    stored = [json.loads(file.read_text()) for file in files]
    found: dict[str, dict[str, list[float]]] = {}
    for probe in stored[0]["results"]:
        each = [diagnosis["results"].get(probe, {"readings": {}})["readings"] for diagnosis in stored]
        for reading in each[0]:
            values = [readings[reading]["value"] for readings in each if reading in readings]
            if len(values) == len(stored) and all(map(math.isfinite, values)):
                found.setdefault(probe, {})[reading] = [min(values), max(values)]
    return {
        "name": name,
        "parameters": _parameters(stored[0]["results"]["memorise"]),
        "over_time": over_time,
        "seeds": len(stored),
        "ranges": found,
    }


def _parameters(result: dict[str, Any]) -> int:
    """The number that `memorise` divided by: its capacity is the mean bits of a canary × canaries / parameters."""
    readings = result["readings"]
    bits = readings["stored"]["value"] * result["settings"]["canaries"]
    return round(bits / readings["capacity"]["value"])


if __name__ == "__main__":
    USUAL.write_text(json.dumps(ranges(), indent=1) + "\n")
