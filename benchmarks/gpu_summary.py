"""One file and pictures of what the stages of `gpu.py` have left in a folder.

    python benchmarks/gpu_summary.py --folder DIR

`gpu.json` has all figures by stage, as `benchmarks/results/gpu.json` does, with the card and the commit. Pictures: the
rate of training by length of text, the time of a decoded token by rows, and the loss on text by seconds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common import commit
from dyadlm.files import write_atomically

TEXTS = ("tiny-en", "small", "llama-small")


def gathered(folder: Path) -> dict[str, Any]:
    """The figures of all stages; a stage without any is left out."""
    found: dict[str, Any] = {"card": json.loads((folder / "card.json").read_text()), "commit": commit()}
    for stage in ("tests", "kernel tests"):
        log = folder / f"{stage}.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        if ended := [line.strip("= ") for line in lines if " passed" in line or " failed" in line]:
            found[stage] = ended[-1]
    parts = {
        "training": {file.stem: json.loads(file.read_text()) for file in sorted((folder / "training").glob("*.json"))},
        "text": {name: json.loads(file.read_text()) for name in TEXTS if (file := folder / f"{name}.json").exists()},
        **{
            stage: json.loads(file.read_text())
            for stage in ("kernels", "decoding", "study")
            if (file := folder / f"{stage}.json").exists()
        },
    }
    return found | {stage: part for stage, part in parts.items() if part}


def draw_training(axes: Any, cells: dict[str, Any]) -> None:
    series: dict[str, dict[int, float]] = {}
    for name, cell in cells.items():
        contender, preset, _ = name.split()
        for length, figures in cell.items():
            if isinstance(figures, dict):
                series.setdefault(f"{contender} {preset}", {})[int(length)] = figures["tokens_per_second"]
    for name, rates in series.items():
        axes.plot(sorted(rates), [rates[length] for length in sorted(rates)], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="tokens of a text", ylabel="trained tokens a second")


def draw_decoding(axes: Any, cells: dict[str, Any]) -> None:
    series: dict[str, dict[int, float]] = {}
    for name, cell in cells.items():
        if "milliseconds" in cell:
            what, _, context = name.partition(" at ")
            words, rows = what.rsplit(" ", 1)
            line = f"{words} after {context}" if context else words
            series.setdefault(line, {})[int(rows)] = cell["milliseconds"]
    for line, times in series.items():
        axes.plot(sorted(times), [times[rows] for rows in sorted(times)], marker="o", label=line)
    axes.set(xscale="log", yscale="log", xlabel="rows at once", ylabel="milliseconds for a token of each row")


def draw_text(axes: Any, cells: dict[str, Any]) -> None:
    for name, cell in cells.items():
        _, seconds, nats = zip(*cell["history"], strict=True)
        axes.plot(seconds, nats, label=f"{name} ({cell['parameters'] / 1e6:.1f}M)")
    axes.set(xlabel="seconds of training", ylabel="loss in training, nats a byte")


PICTURES = {"training": draw_training, "decoding": draw_decoding, "text": draw_text}


def summarise(folder: Path) -> None:
    """Write the file and the pictures."""
    found = gathered(folder)
    write_atomically(folder / "gpu.json", json.dumps(found, indent=1) + "\n")
    # A machine without matplotlib has the figures all the same.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for stage, draw in PICTURES.items():
        if stage in found:
            figure = Figure(figsize=(8.0, 5.0), layout="constrained")
            axes = figure.add_subplot()
            draw(axes, found[stage])
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            axes.set_title(f"{stage}: {found['card']['device']}, {found['commit']}")
            FigureCanvasAgg(figure)
            figure.savefig(folder / f"{stage}.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    summarise(parser.parse_args().folder)
