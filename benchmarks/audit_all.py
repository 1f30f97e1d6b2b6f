"""The audit over every causal model type of transformers: which pass, which fail and why, which cannot be built.

    python benchmarks/audit_all.py                   # every type; results land one by one, a second call goes on
    python benchmarks/audit_all.py llama xlnet       # these alone
    python benchmarks/audit_all.py --table           # the table, from the results there are

A small new model of each type (`dyadlm audit --architecture TYPE`) is audited in a process of its own, within
--minutes and --gigabytes: some types can be built only at their full size.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dyadlm.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "audit_all.json"
TABLE = Path(__file__).parent / "results" / "audit_all.md"


def audited(architecture: str, minutes: float, gigabytes: float) -> dict[str, Any]:
    """What the command says of one type: `verdict` is passed, failed or not built; `reason` in words."""

    def limit() -> None:
        size = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    command = [sys.executable, "-m", "dyadlm", "audit", "--architecture", architecture, "--device", "cpu", "--json"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * minutes, preexec_fn=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"verdict": "not built", "reason": f"more than {minutes:g} minutes"}
    try:
        found = json.loads(told.stdout)
    except ValueError:
        lines = told.stderr.strip().splitlines() or ["no message"]
        reason = lines[-1].removeprefix("dyadlm: ")
        if told.returncode < 0 or "memory" in reason.lower():
            reason = f"more than {gigabytes:g} GiB"
        return {"verdict": "not built", "reason": reason}
    if "mmap" in told.stdout:
        return {"verdict": "not built", "reason": f"more than {gigabytes:g} GiB"}
    failed = {check["name"]: check["sentence"] for check in found["checks"] if check["status"] == "failed"}
    return {
        "verdict": "failed" if failed else "passed",
        "reason": "; ".join(f"{name}: {sentence}" for name, sentence in failed.items()),
        "failed": sorted(failed),
        "not_applicable": sorted(check["name"] for check in found["checks"] if check["status"] == "not applicable"),
        "left_out": found["left_out"],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: failures first, then what could not be built, then the names of those that passed."""
    counts = Counter(result["verdict"] for result in results["types"].values())
    lines = [
        "# The audit over the causal model types of transformers",
        "",
        f"transformers {results['transformers']}, torch {results['torch']}; small new models; "
        "made by `benchmarks/audit_all.py`.",
        f"{counts['passed']} pass, {counts['failed']} fail, {counts['not built']} cannot be built small.",
        "",
    ]
    for verdict, title in (("failed", "Fail"), ("not built", "Not built")):
        lines += [f"## {title}", "", "| type | reason |", "|---|---|"]
        for name, result in sorted(results["types"].items()):
            if result["verdict"] == verdict:
                reason = result["reason"].replace("|", "\\|")
                lines.append(f"| {name} | {reason if len(reason) <= 300 else reason[:297] + '...'} |")
        lines.append("")
    passed = [
        name + (f" (not applicable: {', '.join(result['not_applicable'])})" if result["not_applicable"] else "")
        for name, result in sorted(results["types"].items())
        if result["verdict"] == "passed"
    ]
    return "\n".join([*lines, "## Pass", "", ", ".join(passed) + ".", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all that are not done")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--table", action="store_true", help="write the table alone")
    given = parser.parse_args()
    results: dict[str, Any] = {"types": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    import torch

    results |= {"transformers": transformers.__version__, "torch": torch.__version__}
    wanted = given.types or [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in results["types"]]
    for name in [] if given.table else wanted:
        results["types"][name] = audited(name, given.minutes, given.gigabytes)
        write_atomically(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {results['types'][name]['verdict']} {results['types'][name]['reason'][:150]}", flush=True)
    write_atomically(TABLE, table(results))


if __name__ == "__main__":
    main()
