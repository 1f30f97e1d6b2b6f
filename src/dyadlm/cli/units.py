"""How scored units are printed: rows for people, with the oddest span highlighted, JSON lines or CSV.

A row has what fits into a narrow terminal beside the text; JSON and CSV have all.
"""

import csv
import json
import sys
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from dyadlm.cli.shared import errors
from dyadlm.files import printable
from dyadlm.score.calibration import Calibration
from dyadlm.score.judging import Rule
from dyadlm.score.scorer import Scorer
from dyadlm.score.units import Unit

FIELDS = (
    "unit", "document", "line", "offset", "bytes", "bits", "bits_per_byte", "score", "p",
    "span_offset", "span_bytes", "span", "text",
)  # fmt: skip
HIGHLIGHT = "bold reverse"
# Columns of text that are shown however narrow the terminal is.
NARROWEST = 20

Form = Literal["rows", "json", "csv"]


class Printer:
    """Prints units in one of three forms to standard output. printed: how many so far."""

    def __init__(self, form: Form, unit: str, rule: Rule):
        self._form, self._unit, self._rule = form, unit, rule
        self._console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._table = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
        self.printed = 0

    def unit(self, unit: Unit) -> None:
        """Print one unit."""
        if not self.printed:
            self._head()
        self.printed += 1
        if self._form == "rows":
            self._console.print(self._row(unit))
            return
        record = self._record(unit)
        if self._form == "json":
            sys.stdout.write(json.dumps(record) + "\n")
        else:
            shown = {name: printable(value) if isinstance(value, str) else value for name, value in record.items()}
            self._table.writerow(shown)

    def summary(self, scorer: Scorer) -> None:
        """What was read, and the drift of its level: the last JSON line, or lines on standard error."""
        if self._form == "json":
            found: dict[str, Any] = {"lines": scorer.lines, "bytes": scorer.size, "bits_per_byte": level_of(scorer)}
            if self._rule.selects:
                found["alerts"] = self.printed
            found["drift"] = scorer.drift.summary()
            sys.stdout.write(json.dumps({"summary": found}) + "\n")
        else:
            if not self.printed and self._form == "csv":
                self._head()
            for line in sentences(scorer, self._rule, self.printed):
                errors.print(line)
        sys.stdout.flush()

    def _head(self) -> None:
        if self._form == "csv":
            self._table.writeheader()
        elif self._form == "rows":
            p = "" if self._rule.calibration is None else f"{'p':>9} "
            self._console.print(Text(f"{'score':>8} {'bits/byte':>9} {p} document:line: text", style="bold"))

    def _record(self, unit: Unit) -> dict[str, Any]:
        start, stop = unit.span
        return {
            "unit": self._unit,
            "document": unit.document,
            "line": unit.number,
            "offset": unit.offset,
            "bytes": unit.size,
            "bits": round(unit.bits, 4),
            "bits_per_byte": round(unit.bits_per_byte, 4),
            "score": round(unit.score, 4),
            "p": self._rule.p(unit),
            "span_offset": unit.offset + start,
            "span_bytes": stop - start,
            "span": unit.content[start:stop].decode(errors="backslashreplace"),
            "text": unit.content.decode(errors="backslashreplace"),
        }

    def _row(self, unit: Unit) -> Text:
        p = self._rule.p(unit)
        shown_p = "" if p is None else f"{p:9.2g} "
        numbers = f"{unit.score:8.1f} {unit.bits_per_byte:9.3f} {shown_p} {unit.document}:{unit.number}: "
        row = Text(numbers, end="")
        room = max(self._console.width - len(numbers), NARROWEST) if self._console.is_terminal else None
        for text, odd in zip(shown(unit, room), (False, True, False), strict=True):
            row.append(text, style=HIGHLIGHT if odd else None)
        row.end = "\n"
        return row


def shown(unit: Unit, room: int | None) -> tuple[str, str, str]:
    """The text before the oddest span, the span, and the text behind it; at most `room` characters, of which the span
    is the last to go. The line end is shown where the span reaches into it."""
    start, stop = unit.span
    content = unit.content
    bare = content.rstrip(b"\r\n")
    if stop <= len(bare):
        content = bare
    before, span, after = (
        printable(part.decode("utf-8", "surrogateescape"))
        for part in (content[:start], content[start:stop], content[stop:])
    )
    if room is None or len(before) + len(span) + len(after) <= room:
        return before, span, after
    span = span[:room]
    left = room - len(span)
    kept = max(left // 2, left - len(after))
    if len(before) > kept:
        before = ("…" + before[len(before) - kept + 1 :]) if kept > 0 else ""
    return before, span, after[: left - len(before)]


def level_of(scorer: Scorer) -> float:
    """Bits per byte over all that was read."""
    return scorer.bits / max(scorer.size, 1)


def sentences(scorer: Scorer, rule: Rule, alerts: int) -> list[str]:
    """What was read, alerts, and drift, for people."""
    found = [f"{scorer.lines:,} lines, {scorer.size:,} bytes: {level_of(scorer):.4f} bits per byte"]
    if rule.selects:
        found[0] += f"; alerts: {alerts:,}"
    drift = scorer.drift.summary()
    if drift is not None:
        p = "" if drift["p"] is None else f" (p = {drift['p']:.2g})"
        level, normal = drift["bits_per_byte"], drift["normal_bits_per_byte"]
        found.append(f"drift: now {level:.4f} bits per byte, normal {normal:.4f} by the {drift['normal']}{p}")
    return found


def say_calibrated(calibration: Calibration, scorer: Scorer, place: str, as_json: bool) -> None:
    """What a calibration holds."""
    if as_json:
        summary = {
            "units": calibration.units,
            "bits_per_byte": level_of(scorer),
            "smallest_alert": calibration.smallest,
        }
        sys.stdout.write(json.dumps({"calibration": place, **calibration.reading._asdict(), **summary}) + "\n")
        return
    errors.print(
        f"{calibration.units:,} normal {calibration.reading.unit}s at {level_of(scorer):.4f} bits per byte are in "
        f"{printable(place)}; the smallest false-alarm rate is --alert {calibration.smallest:.2g}"
    )
