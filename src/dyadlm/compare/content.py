"""What the files of a study hold. They may be damaged, cut off, or changed by hand."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyadlm.errors import UserError
from dyadlm.evaluate.protocols import PROTOCOLS

if TYPE_CHECKING:
    from dyadlm.compare.cell import Cell

LARGEST = 1e300  # of a figure


def read_object(file: Path, remedy: str = "remove it, and its cell is run again") -> dict[str, Any]:
    """The object in a JSON file; NaN and what is infinite are None. Raises `UserError` where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged (it holds no object); {remedy}.")
    return content


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def is_whole(cell: "Cell", content: dict[str, Any]) -> bool:
    """Whether a cell's file has what the study and its page need of it."""
    try:
        return bool(cell.tokens) if content.get("diverged") else _has_figures(cell, content)
    except (KeyError, TypeError, AttributeError):  # a part is missing, or of another kind
        return False


def _has_figures(cell: "Cell", content: dict[str, Any]) -> bool:
    if not cell.tokens:
        return (
            all(_above(content[name], 0) for name in ("parameters", "seconds_per_token"))
            and _is_figure(content["flops_per_token"])  # of a model that only counts, none
            and isinstance(content["decoding_ends"], str)
            and _all(content["faults"], lambda fault: isinstance(fault, str))
            and _all(content["decoding"], lambda point: _have(point, ("context", "milliseconds", "state_bytes")))
        )
    if not cell.final:
        return _above(content["scores"]["fresh"]["nats"], 0)
    return (
        all(_above(content["scores"][name]["nats"], 0) for name in PROTOCOLS)
        and isinstance(content["carried"], bool)
        and _is_figure(content["peak_mebibytes"])
        and bool(content["curve"])
        and _all(content["curve"], lambda point: _have(point, ("tokens", "seconds", "nats")))
        and _all(
            content.get("lengths", []),  # there were none in earlier versions
            lambda point: _have(point, ("multiple",)) and (point["nats"] is None or _is_figure(point["nats"])),
        )
    )


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def _above(value: Any, least: float) -> bool:
    return _is_figure(value) and value > least


def _all(values: Any, sound: Any) -> bool:
    return isinstance(values, list) and all(sound(value) for value in values)


def _have(point: Any, names: tuple[str, ...]) -> bool:
    return all(_is_figure(point[name]) for name in names)
