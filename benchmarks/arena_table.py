"""The table of docs/arena.md, from the results of `benchmarks/arena.py`; with --write it replaces the old one.

python benchmarks/arena_table.py [--write]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import ROOT
from dyadlm.evaluate.protocols import PROTOCOLS
from dyadlm.files import write_atomically
from dyadlm.zoo import FAMILIES

RESULTS = ROOT / "benchmarks" / "results" / "arena" / "results.json"
PAGE = ROOT / "docs" / "arena.md"
BEGIN, END = "<!-- table of all families: benchmarks/arena_table.py -->\n", "<!-- end of the table -->\n"
COLUMNS = (
    *("family", "source", "fresh", "after 1,024", "carried", "with a memory"),
    *("rate", "MFLOP a token", "µs a token", "KB of state"),
)
STATE_AFTER = 1000  # tokens of context


def table(results: dict[str, Any]) -> str:
    """One line for each family that has been trained, the least loss in fresh windows first."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    families = [(name, family) for name, family in results["families"].items() if family["seeds"]]
    for name, family in sorted(families, key=lambda item: _mean_nats(item[1], "fresh")):
        lines.append("| " + " | ".join(_row(name, family)) + " |")
    return "\n".join(lines) + "\n"


def _row(name: str, family: dict[str, Any]) -> list[str]:
    seed = family["seeds"][0]
    losses = [
        f"{_mean_nats(family, protocol):.3f}"
        + ("" if seed["carried"] or protocol not in ("carried", "remembered") else " w")
        for protocol in PROTOCOLS
    ]
    states = [at["state_bytes"] for at in family["decoding"] if at["context"] == STATE_AFTER]
    return [
        f"`{name}`" + (" (audit: " + "; ".join(family["faults"]) + ")" if family["faults"] else ""),
        FAMILIES[name].paper,
        *losses,
        f"{family['rate']:g}" + _doubt(family),
        f"{family['flops_per_token'] / 1e6:.1f}",
        f"{family['seconds_per_token'] * 1e6:.0f}",
        f"{states[0] / 1000:,.{0 if states[0] >= 10_000 else 1}f}" if states and states[0] else "–",
    ]


def _doubt(family: dict[str, Any]) -> str:
    """What a better rate might be missed for."""
    if family["rate_at_the_edge"]:
        return " (at an end)"
    return "" if family.get("settling") else " (not settled)"


def _mean_nats(family: dict[str, Any], protocol: str) -> float:
    return statistics.fmean(seed["scores"][protocol]["nats"] for seed in family["seeds"])


def page_with(text: str, made: str) -> str:
    """The page with this table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + made + "\n" + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    made = table(json.loads(asked.results.read_text()))
    if asked.write:
        write_atomically(PAGE, page_with(PAGE.read_text(), made))
    else:
        print(made, end="")


if __name__ == "__main__":
    main()
