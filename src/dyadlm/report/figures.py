"""Pictures as PNG: how the loss fell, and which levels of the tower speak."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.data.tokenizer import TextEncoder
from dyadlm.errors import UserError
from dyadlm.files import write_atomically
from dyadlm.model import DyadForCausalLM

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
COLOURS = "magma"
DOTS_PER_INCH = 150
# A picture wider than this many tokens could not be read.
MOST_TOKENS = 512
# Tokens are written below the picture while they have room.
MOST_WRITTEN = 96


def draw_losses(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "Loss") -> None:
    """Training and validation loss in bits per byte over the tokens seen, as PNG.

    metrics: the lines of RUN/metrics.jsonl. Raises `UserError` if they hold no loss.
    """
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
        _write(figure, path)


def _zoom(axes: Axes, bits: Sequence[float]) -> None:
    """Leave out the first fall, which would press the rest flat."""
    low, high = min(bits), float(np.quantile(bits, 0.98))
    room = max(high - low, 0.05)
    axes.set_ylim(low - 0.08 * room, high + 0.08 * room)


def draw_tower(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, path: Path) -> None:
    """Levels by time, as PNG: the length of what each level adds to the hidden state at each token.

    Above the mean over layers with the tokens, below it each layer. Raises `UserError` for a model without a
    tower, an empty text, and one of more than `MOST_TOKENS` tokens.
    """
    if not isinstance(model, DyadForCausalLM):
        raise UserError(f"A {model.config.model_type} model has no tower to draw; give a dyadlm model.")
    content = text.encode()
    ids, starts = TextEncoder(tokenizer).encode(content)
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise UserError(f"The picture takes a text of 1 to {MOST_TOKENS} tokens, not {len(ids)}.")
    with torch.no_grad():
        lengths = model.model.level_contributions(torch.from_numpy(ids).long().to(model.device))
    pieces = [content[a:b].decode(errors="replace") for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    _draw_contributions(lengths.float().cpu().numpy(), pieces, path)


def _draw_contributions(lengths: np.ndarray, pieces: Sequence[str], path: Path) -> None:
    """lengths: (L, K, T); pieces: the text of each token."""
    layers, levels, tokens = lengths.shape
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    width = min(max(8.0, 0.16 * tokens), 20.0)
    tall = 0.34 * levels + 0.8
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(width, tall + rows * (0.12 * levels + 0.6) + 0.4), layout="constrained")
        above, below = cast(Any, figure.subfigures(2, 1, height_ratios=[tall, rows * (0.12 * levels + 0.6)]))
        axes = above.add_subplot()
        image = _heat(axes, lengths.mean(axis=0), high=float(lengths.mean(axis=0).max()))
        axes.set_title("Which levels speak: how much each adds to the hidden state, mean over layers")
        axes.set_yticks(range(levels), [_span(level) for level in range(levels)])
        axes.set_ylabel("tokens that a level averages")
        _write_tokens(axes, pieces)
        above.colorbar(image, ax=axes, pad=0.01, aspect=30, label="length").outline.set_visible(False)
        grid = below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for layer, small in enumerate(grid.flat):
            if layer >= layers:
                small.set_visible(False)
                continue
            _heat(small, lengths[layer], high=float(lengths[layer].max()))
            small.set_title(f"layer {layer + 1}", fontsize=9, fontweight="normal")
            small.set_yticks([0, levels - 1], [_span(0), _span(levels - 1)], fontsize=8)
            small.set_xticks([])
        _write(figure, path)


def _heat(axes: Axes, values: np.ndarray, high: float) -> Any:
    image = axes.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=COLOURS, vmin=0.0, vmax=max(high, 1e-12)
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _span(level: int) -> str:
    return f"{2**level:,}"


def _write_tokens(axes: Axes, pieces: Sequence[str]) -> None:
    """The text below the picture: every token while there is room, else positions."""
    if len(pieces) > MOST_WRITTEN:
        axes.set_xlabel("token")
        return
    shown = [piece.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "·" for piece in pieces]
    long = max(map(len, shown)) > 2
    axes.set_xticks(
        range(len(pieces)),
        shown,
        rotation=90 if long else 0,
        fontfamily="DejaVu Sans Mono",
        fontsize=9,
        color="#222222",
    )


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, dpi=DOTS_PER_INCH, format="png", facecolor="white")
    write_atomically(path, buffer.getvalue())
