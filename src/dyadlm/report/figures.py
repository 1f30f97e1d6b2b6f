"""How the loss fell, as PNG; and the style of all pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dyadlm.errors import UserError
from dyadlm.files import write_atomically

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
}
TRAINING, VALIDATION = "#9db4d0", "#c2410c"
DOTS_PER_INCH = 150


def draw_losses(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "Loss") -> None:
    """Training and validation loss in bits per byte over the tokens seen, as PNG.

    metrics: the lines of RUN/metrics.jsonl. Raises `UserError` if they hold no loss.
    """
    metrics = [{name: value for name, value in m.items() if isinstance(value, int | float)} for m in metrics]
    training = [(m["tokens"], m["bits_per_byte"]) for m in metrics if "tokens" in m and "bits_per_byte" in m]
    if not training:
        raise UserError("There is no loss to draw yet; train for a while first.")
    tokens_at = {m["step"]: m["tokens"] for m in metrics if "tokens" in m}
    per_step = max(tokens_at.values()) / max(max(tokens_at), 1)
    validation = [(m["step"] * per_step, m["eval_bits_per_byte"]) for m in metrics if "eval_bits_per_byte" in m]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*training, strict=True), color=TRAINING, linewidth=1.2, label="training")
        last = training[-1]
        if validation:
            axes.plot(
                *zip(*validation, strict=True), color=VALIDATION, linewidth=2, marker="o", markersize=4,
                label="validation",
            )  # fmt: skip
            last = validation[-1]
        axes.annotate(
            f"{last[1]:.3f}", last, xytext=(8, 0), textcoords="offset points", va="center", fontweight="bold",
            color=VALIDATION if validation else TRAINING, annotation_clip=False,
        )  # fmt: skip
        _zoom(axes, [bits for _, bits in [*training, *validation]])
        axes.set(xlabel="tokens seen", ylabel="bits per byte", title=title)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.02)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.legend(loc="upper right")
        write_figure(figure, path)


def _zoom(axes: Axes, bits: Sequence[float]) -> None:
    """Leave out the first fall, which would press the rest flat."""
    low, high = min(bits), float(np.quantile(bits, 0.98))
    room = max(high - low, 0.05)
    axes.set_ylim(low - 0.08 * room, high + 0.08 * room)


def write_figure(figure: Figure, path: Path) -> None:
    """A figure as PNG, on white."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, dpi=DOTS_PER_INCH, format="png", facecolor="white")
    write_atomically(path, buffer.getvalue())
