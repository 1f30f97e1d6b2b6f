"""What the levels and mechanisms of a model do along a text, as PNG.

Dimension letters: L layers, T tokens, H heads, K levels, N rows of a panel.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Patch

from dyadlm.evaluate.inspection import TowerReading
from dyadlm.report.figures import STYLE, write_figure

COLOURS = "magma_r"
EVEN, ODD, HIT, PALE = "#9db4d0", "#dbe5f1", "#c2410c", "#f4f4f4"
WRITING = "DejaVu Sans Mono"
HEADS = ("#1f5fa8", "#c2410c", "#2f855a", "#7c3aa8", "#a16207", "#0e7490", "#be185d", "#555555")
# Tokens are written below a panel while they have room.
MOST_WRITTEN = 96
# Layers whose choices are drawn: so many, evenly spread.
MOST_LAYERS = 6
LINE = 0.24  # inches for one line of a panel that has names


class Panel(NamedTuple):
    """One panel of a picture. draw: into given axes; what it returns has a scale of colours. written: with tokens.
    unit: of the scale."""

    height: float  # inches, without title and tokens
    draw: Callable[[Axes], Any]
    written: bool
    unit: str = "length of the\nadded vector"


def draw_tower(reading: TowerReading, path: Path) -> None:
    """One text from left to right, as PNG.

    From above: how much each level adds to the hidden state; where the segments of semantic levels begin; which
    contexts slots knew; how well the levels were forecast; which levels each head chose, layer by layer; and the first
    panel for each layer. What a model does not have is left out.
    """
    lengths = reading.contributions.float().cpu().numpy()
    layers, levels, tokens = lengths.shape
    panels = _panels(reading, lengths)
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    small = rows * (0.12 * levels + 0.6)
    heights = [panel.height + 0.35 + 0.35 * panel.written for panel in panels]
    with rc_context(STYLE | {"axes.grid": False}):
        width = min(max(8.0, 0.16 * tokens), 20.0)
        figure = Figure(figsize=(width, sum(heights) + small + 0.4), layout="constrained")
        above, below = cast(Any, figure.subfigures(2, 1, height_ratios=[sum(heights), small]))
        grid = above.add_gridspec(len(panels), 2, width_ratios=[1.0, 0.012], height_ratios=heights)
        for number, panel in enumerate(panels):
            axes = above.add_subplot(grid[number, 0])
            image = panel.draw(axes)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
            _write_tokens(axes, reading.pieces if panel.written else None, tokens)
            if image is not None:
                bar = above.colorbar(image, cax=above.add_subplot(grid[number, 1]), label=panel.unit)
                bar.outline.set_visible(False)
        each = below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for layer, axes in enumerate(each.flat):
            if layer >= layers:
                axes.set_visible(False)
                continue
            _heat(axes, lengths[layer])
            axes.set_title(f"layer {layer + 1}, as in the first panel", fontsize=9, fontweight="normal")
            axes.set_yticks(range(levels), reading.levels, fontsize=6)
            axes.set_xticks([])
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        write_figure(figure, path)


def _panels(reading: TowerReading, lengths: np.ndarray) -> list[Panel]:
    levels, seen = lengths.shape[1], reading.behaviour

    def contributions(axes: Axes) -> Any:
        axes.set_title("What each level adds to the hidden state, at each token (mean over layers)")
        axes.set_yticks(range(levels), reading.levels)
        axes.set_ylabel("window of a level,\ntokens or kind of segment")
        return _heat(axes, lengths.mean(axis=0))

    panels = [Panel(LINE * levels, contributions, written=True)]
    if seen.segments:
        begins = {
            name if len(each) == 1 else f"{name}, layer {layer + 1}": own[0].cpu().numpy()
            for name, each in seen.segments.items()
            for layer, own in enumerate(each)
        }
        panels.append(Panel(LINE * len(begins), lambda axes: _draw_segments(axes, begins), written=True))
    if seen.hits:
        hits = {_context(name): hit[0].cpu().numpy() for name, hit in seen.hits.items()}
        panels.append(Panel(LINE * len(hits), lambda axes: _draw_hits(axes, hits), written=not seen.segments))
    if (skills := seen.skills()) is not None:
        shown = skills.float().cpu().numpy()
        panels.append(Panel(LINE * levels, partial(_draw_skills, shown, reading.levels), True, "skill"))
    if reading.opinions:
        likely = {name: said.exp().cpu().numpy() for name, said in reading.opinions.items()}
        panels.append(Panel(LINE * len(likely), partial(_draw_opinions, likely), True, "probability"))
    if seen.routes is not None:
        routes = seen.routes[:, 0].float().cpu().numpy()
        shown = np.unique(np.linspace(0, len(routes) - 1, min(len(routes), MOST_LAYERS)).round().astype(int)).tolist()
        height = max(0.05 * routes.shape[2], 0.17) * levels
        for layer in shown:
            draw = partial(_draw_routes, routes[layer], reading.levels, layer, layer == shown[0])
            panels.append(Panel(height, draw, written=layer == shown[-1]))
    return panels


def _heat(axes: Axes, values: np.ndarray) -> Any:
    """values (K, T), the first level lowest."""
    high = max(float(values.max()), 1e-12)
    return axes.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=COLOURS, vmin=0.0, vmax=high
    )


def _draw_segments(axes: Axes, begins: dict[str, np.ndarray]) -> None:
    """Segments of each level in two shades by turns."""
    parity = np.stack([own.cumsum() % 2 for own in begins.values()])
    _paint(axes, np.array([to_rgb(ODD), to_rgb(EVEN)])[parity], list(begins))
    axes.set_title("Segments of the text: the shade changes where a new one begins")


def _draw_hits(axes: Axes, hits: dict[str, np.ndarray]) -> None:
    known = np.stack(list(hits.values())).astype(int)
    _paint(axes, np.array([to_rgb(PALE), to_rgb(HIT)])[known], list(hits))
    axes.set_title("Slots: orange where the last tokens, or the open word, stood earlier in this text")


def _draw_skills(skills: np.ndarray, levels: Sequence[str], axes: Axes) -> Any:
    """skills (K, T): not a number where nothing has come yet."""
    axes.set_title("Forecasts of each level: 1 is exact, 0 is no better than no change")
    axes.set_yticks(range(len(levels)), levels)
    return axes.imshow(skills, aspect="auto", origin="lower", interpolation="nearest", cmap="RdBu", vmin=-1.0, vmax=1.0)


def _draw_opinions(likely: dict[str, np.ndarray], axes: Axes) -> Any:
    """likely: by who says it, (T,), not a number where nothing was said yet; the first one highest."""
    axes.set_title("Probability that each part gave to the token that came")
    axes.set_yticks(range(len(likely)), list(reversed(likely)))
    rows = np.stack(list(reversed(likely.values())))
    return axes.imshow(rows, aspect="auto", origin="lower", interpolation="nearest", cmap=COLOURS, vmin=0.0, vmax=1.0)


def _draw_routes(routes: np.ndarray, levels: Sequence[str], layer: int, first: bool, axes: Axes) -> None:
    """routes (T, H, K): a band for each level, in it a line for each head, as dark as the level weighs."""
    tokens, heads, count = routes.shape
    palette = HEADS if heads <= len(HEADS) else [colormaps["turbo"](place) for place in np.linspace(0.05, 0.95, heads)]
    colours = np.array([to_rgb(colour) for colour in palette[:heads]])
    weights = (routes / np.maximum(routes.max(), 1e-12)).transpose(2, 1, 0)[..., None]  # (K, H, T, 1)
    # A level that counts at all can be told from one that does not.
    weights = np.where(weights > 0, 0.2 + 0.8 * weights, 0.0)
    painted = 1 - weights * (1 - colours[None, :, None])
    _paint(axes, painted.reshape(count * heads, tokens, 3), [])
    axes.set_yticks((np.arange(count) + 0.5) * heads - 0.5, levels, fontsize=8)
    for edge in range(count + 1):
        axes.axhline(edge * heads - 0.5, color="#dddddd", linewidth=0.6)
    axes.set_title(f"Which levels each head chose: layer {layer + 1}" if first else f"layer {layer + 1}")
    if first:
        legend = [Patch(color=colour, label=f"head {head + 1}") for head, colour in enumerate(colours)]
        axes.legend(
            handles=legend[: len(HEADS)], loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(HEADS), fontsize=8,
            handlelength=1.0, borderaxespad=0.2, columnspacing=1.0,
        )  # fmt: skip


def _paint(axes: Axes, colours: np.ndarray, names: Sequence[str]) -> None:
    """colours (N, T, 3), the first row lowest."""
    axes.imshow(colours, aspect="auto", origin="lower", interpolation="nearest")
    axes.set_yticks(range(len(names)), names)


def _context(name: str) -> str:
    return {"1": "1 token", "word": "the open word"}.get(name, f"{name} tokens")


def _write_tokens(axes: Axes, pieces: Sequence[str] | None, tokens: int) -> None:
    """The text below a panel: every token while there is room, else positions; nothing for None."""
    if pieces is None:
        axes.set_xticks([])
        return
    if tokens > MOST_WRITTEN:
        axes.set_xlabel("token")
        return
    shown = [_written(piece) for piece in pieces]
    long = max(map(len, shown)) > 2
    axes.set_xticks(
        range(len(pieces)),
        shown,
        rotation=90 if long else 0,
        fontfamily=WRITING,
        fontsize=9,
        color="#222222",
    )


def _written(piece: str) -> str:
    """A token as it is written: signs for white space, a dot for what the font does not have."""
    signs = piece.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    font = get_font(findfont(WRITING))
    return "".join(sign if font.get_char_index(ord(sign)) else "·" for sign in signs) or "·"
