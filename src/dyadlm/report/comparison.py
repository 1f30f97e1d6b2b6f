"""Several models in one picture: curves with their bands, and one figure of each with its interval; as PNG and as SVG.

A model has the same colour in every picture and on the page around it. The SVG names colours as the page's variables,
so that it follows the page from light to dark.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from dyadlm.diagnose import Curve, Reading
from dyadlm.report.figures import STYLE, write_figure

# The page's variables. Models can be told apart by people who see two of the three primary colours, and by markers.
_LIGHT_MODELS = ("#0072b2", "#d55e00", "#4c2660", "#2fa37a", "#602418", "#aa00ff", "#9f7c58", "#001b9f")
_DARK_MODELS = ("#4da6e8", "#ff8a3d", "#e6d6ff", "#1f9e74", "#fff0a8", "#d95cff", "#8f6b45", "#6f7dff")
LIGHT = {
    "ink": "#1c2430", "quiet": "#566071", "rule": "#d8dde5", "reference": "#868e9c", "paper": "#ffffff",
    "raised": "#f4f6f9", "best": "#dcf0e6", "warning": "#fdf0d5", "link": "#005a94", "shade": "#1c243047",
} | {f"model-{number}": colour for number, colour in enumerate(_LIGHT_MODELS)}  # fmt: skip
DARK = {
    "ink": "#e4e8ee", "quiet": "#a3adbb", "rule": "#343c49", "reference": "#8b94a3", "paper": "#14181f",
    "raised": "#1c222b", "best": "#17402f", "warning": "#43340f", "link": "#7cc0f5", "shade": "#e4e8ee47",
} | {f"model-{number}": colour for number, colour in enumerate(_DARK_MODELS)}  # fmt: skip

SIGNS = dict(zip("os^DvPX*", "●■▲◆▼✚✖★", strict=True))  # of markers, on the page
MARKERS = tuple(SIGNS)
DASHES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (4, 2)), (0, (6, 2, 1, 2)), (0, (2, 2)))  # of references
LONGEST_NAME = 26  # characters of a name in a picture
MOST_MARKED = 40  # points of a curve that get markers
WIDTH, HEIGHT = 4.8, 2.6  # inches: letters stay readable where a phone shows it
SVG = "{http://www.w3.org/2000/svg}"


class Look(NamedTuple):
    """How one model is shown everywhere. name: whole; colour: a key of `LIGHT`; muted: a reference."""

    name: str
    colour: str
    marker: str
    dash: Any
    muted: bool

    @property
    def sign(self) -> str:
        """The marker as a letter."""
        return SIGNS[self.marker]

    @property
    def short(self) -> str:
        """The name with its middle left out, if it is long."""
        half = LONGEST_NAME // 2
        return self.name if len(self.name) <= LONGEST_NAME else f"{self.name[:half]}…{self.name[1 - half :]}"


def looks(models: Sequence[str], references: Sequence[str]) -> list[Look]:
    """One for each model, then for each reference; names that come twice are numbered."""
    shown: list[Look] = []
    taken: set[str] = set()
    for place, raw in enumerate([*models, *references]):
        plain = " ".join("".join(sign if sign.isprintable() else " " for sign in raw).split()) or "unnamed"
        name, count = plain, 1
        while name in taken:
            count += 1
            name = f"{plain} ({count})"
        taken.add(name)
        number = place - len(models)
        if number < 0:
            marker = MARKERS[place % len(MARKERS)]
            again = place // len(_LIGHT_MODELS)  # more models than colours: the same ones, dashed
            dash = "solid" if again == 0 else DASHES[again % len(DASHES)]
            shown.append(Look(name, f"model-{place % len(_LIGHT_MODELS)}", marker, dash, False))
        else:
            shown.append(Look(name, "reference", MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)], True))
    return shown


def draw_curves(curves: Sequence[tuple[Look, Curve]]) -> Figure:
    """The same curve of several models; their intervals as bands. References beyond the models' scale are cut off."""
    first = curves[0][1]
    with rc_context(STYLE | _STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.16 * math.ceil(len(curves) / 2)), layout="constrained")
        axes = figure.add_subplot()
        for look, curve in curves:
            _draw_curve(axes, look, curve, band=min(0.2, 0.7 / len(curves)))
        _scale_x(axes, [x for _, curve in curves for x in curve.x], first.log_x)
        _scale_y(axes, [y for _, curve in curves for y in _heights(curve)], first.log_y)
        limits = _limits_of_models(curves, first.log_y)
        axes.set_ylim(limits)
        axes.set(xlabel=first.x_label, ylabel=textwrap.fill(first.y_label, LONGEST_NAME))
        axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.7)
        if len(curves) > 1:
            handles = [_handle(look) for look, _ in curves]
            legend = figure.legend(handles, ["·"] * len(handles), loc="outside lower left", ncols=2, fontsize=8)
            for text, (look, curve) in zip(legend.get_texts(), curves, strict=True):
                beyond = limits is not None and not any(limits[0] <= y <= limits[1] for y in _heights(curve))
                # Set here, for a label with a leading _ would be left out.
                text.set_text(look.short + " (beyond the scale)" * beyond)
        return figure


def _heights(curve: Curve) -> list[float]:
    return [y for part in (curve.y, curve.low, curve.high) for y in part or () if math.isfinite(y)]


def _limits_of_models(curves: Sequence[tuple[Look, Curve]], log: bool) -> tuple[float, float] | None:
    """That hold the models, where references would take more than half of the height; None elsewhere."""
    models = [y for look, curve in curves if not look.muted for y in _heights(curve)]
    every = [y for _, curve in curves for y in _heights(curve)]
    span = max(models, default=0.0) - min(models, default=0.0)
    if log or not span or max(every) - min(every) <= 2 * span:
        return None
    return min(models) - 0.05 * span, max(models) + 0.05 * span


def draw_readings(readings: Sequence[tuple[Look, Reading]]) -> Figure:
    """The same reading of several models, one below the other; their intervals as bars."""
    with rc_context(STYLE | _STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.24 * len(readings)), layout="constrained")
        axes = figure.add_subplot()
        for row, (look, reading) in enumerate(readings):
            colour = LIGHT[look.colour]
            if reading.interval is not None:
                axes.plot(reading.interval, [row, row], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="butt")
            axes.plot(
                [reading.value], [row], linestyle="none", marker=look.marker, markersize=6, color=colour,
                markerfacecolor=LIGHT["paper"] if look.muted else colour,
            )  # fmt: skip
        axes.set_yticks(range(len(readings)), [look.short for look, _ in readings])
        for label, (look, _) in zip(axes.get_yticklabels(), readings, strict=True):
            label.set_color(LIGHT["quiet" if look.muted else "ink"])
        axes.set_ylim(len(readings) - 0.4, -0.6)
        axes.set_xlabel(readings[0][1].unit)
        axes.xaxis.set_major_formatter(_scalar())
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.grid(axis="x", color=LIGHT["rule"], linewidth=0.7)
        return figure


def write_picture(figure: Figure, title: str, path: Path) -> None:
    """As PNG, with its title in it."""
    with rc_context(STYLE | _STYLE), _any_sign():
        heading = figure.suptitle(title, x=0.02, ha="left", fontsize=10, fontweight="bold", color=LIGHT["ink"])
        write_figure(figure, path)
        # Removed, it would still be laid out by older releases of matplotlib.
        heading.set(visible=False, in_layout=False)


def to_svg(figure: Figure, key: str, alternative: str) -> str:
    """As SVG to stand within a page: no title, letters as text, colours as the page's variables.

    key: of letters and digits, unlike that of any other picture of the page. alternative: its text for those who
    cannot see it.
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(STYLE | _STYLE | {"svg.fonttype": "none", "svg.hashsalt": key}), _any_sign():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}style":  # it would hold for the whole page
                parent.remove(child)
    variables = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        old = dict(element.attrib)
        element.attrib.clear()
        for name, value in old.items():
            element.set(name.removeprefix("{http://www.w3.org/1999/xlink}"), _in_page(name, value, key, variables))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": alternative, "class": "picture"})
    return ElementTree.tostring(root, encoding="unicode")


_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names may hold dollars
    "axes.edgecolor": LIGHT["reference"],
    "axes.labelcolor": LIGHT["quiet"],
    "axes.labelsize": 9,
    "xtick.color": LIGHT["quiet"],
    "ytick.color": LIGHT["quiet"],
    "lines.solid_joinstyle": "round",
}


def _any_sign() -> Any:
    """Signs that the font of the PNG lacks are drawn as boxes, without a word."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _in_page(name: str, value: str, key: str, variables: dict[str, str]) -> str:
    """One attribute of the SVG: its references within this picture alone, its colours from the page."""
    if name == "id":
        return f"{key}-{value}"
    value = value.replace("url(#", f"url(#{key}-")
    if name.endswith("href"):
        return value.replace("#", f"#{key}-", 1)
    if name != "style":
        return value
    return re.sub(r"#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), value)


def _draw_curve(axes: Axes, look: Look, curve: Curve, band: float) -> None:
    """band: how opaque its interval is."""
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    colour = LIGHT[look.colour]
    marker = look.marker if len(x) <= MOST_MARKED else ""
    if curve.low is not None and curve.high is not None:
        low, high = np.asarray(curve.low, float), np.asarray(curve.high, float)
        if len(x) == 1:
            axes.vlines(x, low, high, color=colour, linewidth=2.2, alpha=0.55)
        else:
            axes.fill_between(x, low, high, color=colour, alpha=band / 2 if look.muted else band, linewidth=0)
    axes.plot(
        x, y, color=colour, linestyle=look.dash, linewidth=1.2 if look.muted else 1.7, marker=marker,
        markersize=2.6 if look.muted else 3.6, markeredgewidth=0, zorder=2.1 if look.muted else 2.5,
    )  # fmt: skip


def _handle(look: Look) -> Line2D:
    return Line2D([], [], color=LIGHT[look.colour], linestyle=look.dash, marker=look.marker, markersize=4)


def _scale_x(axes: Axes, points: Sequence[float], logarithmic: bool) -> None:
    """Ticks that say what there is: whole numbers where all are whole, powers of two where all are."""
    finite = sorted({point for point in points if math.isfinite(point)})
    positive = [point for point in finite if point > 0]
    plain = FuncFormatter(lambda value, _: compact(value))
    if not logarithmic or len(positive) < 2:
        whole = all(point == int(point) for point in finite)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
        axes.xaxis.set_major_formatter(plain)
        return
    if finite[0] < positive[0]:  # what comes before the first step has a place too
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    else:
        axes.set_xscale("log")
    before = [0.0] if finite[0] <= 0 else []
    if all(math.log2(point).is_integer() for point in positive):
        every = math.ceil(len(positive) / 8)
        axes.xaxis.set_major_locator(FixedLocator([*before, *positive[::every]]))
    else:
        axes.xaxis.set_major_locator(FixedLocator([*before, *_log_ticks(positive[0], positive[-1])]))
        axes.set_xlim(*_with_room(axes, finite))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1.0, 2.0, 5.0) if math.log10(high) - math.log10(low) < 2.5 else (1.0,)
    return [tick for tick in LogLocator(subs=steps).tick_values(low, high) if low <= tick <= high]


def _scale_y(axes: Axes, values: Sequence[float], logarithmic: bool) -> None:
    """What hardly changes is not blown up to a mountain. Logarithmic only where all values are above zero."""
    low, high = min(values), max(values)
    if logarithmic and low > 0:
        middle, half = math.sqrt(low * high), max(1.2 * math.sqrt(high / low), math.sqrt(10))  # a decade at least
        axes.set_yscale("log")
        axes.set_ylim(middle / half, middle * half)
        axes.yaxis.set_major_locator(FixedLocator(_log_ticks(middle / half, middle * half)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    most = max(abs(low), abs(high))
    if high - low < 0.002 * most or most == 0:
        axes.set_ylim(low - (0.02 * most or 1.0), high + (0.02 * most or 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)) if most >= 1e4 else _scalar())


def _with_room(axes: Axes, finite: Sequence[float]) -> tuple[float, float]:
    """The points with a little room on both sides, as wide at any scale."""
    change = axes.xaxis.get_transform()
    low, high = (float(place) for place in change.transform(np.array([finite[0], finite[-1]])))
    room = 0.04 * (high - low)
    low, high = (float(place) for place in change.inverted().transform(np.array([low - room, high + room])))
    return low, high


def _scalar() -> ScalarFormatter:
    """Plain numbers, without an offset to add in the head."""
    return ScalarFormatter(useOffset=False)


def compact(value: float) -> str:
    """In few letters: 12000 → 12k."""
    for size, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and (size > 1e3 or abs(value) >= 1e4):
            return f"{value / size:.3g}{sign}".replace("-", "−")
    return f"{value:g}".replace("e-0", "e-").replace("-", "−")
