"""Tables on standard output, of which nothing is cut; and what is said on standard error, which may be closed, full or
of any encoding without ending the work."""

import contextlib
import sys
from collections.abc import Collection, Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Columns of text are folded, but not to fewer characters than this; a table that needs more room is stacked.
NARROWEST = 24
# Characters of a line where there is no terminal.
WIDTH = 160
GAP = 2


class _StandardError:
    """Standard error as it is at the time; what cannot be written is let go."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return sys.stderr.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def standard_error() -> Console:
    """A console for progress and remarks. Square brackets in names are no markup, and lines are not broken."""
    return Console(file=cast(IO[str], _StandardError()), highlight=False, markup=False, soft_wrap=True)


def print_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    right: Collection[str] = (),
    console: Console | None = None,
) -> None:
    """Print a table as wide as the terminal. No cell is cut: texts are folded, figures stay whole, and where that does
    not fit, each row becomes a block of lines "title value" under its first cell.

    right: titles of columns of figures. console: standard output. Cells hold no markup; they may have several lines.
    """
    console = console or Console(highlight=False, markup=False)
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    columns = [[Text(title), *(row[place] for row in cells)] for place, title in enumerate(titles)]
    wide = [max(map(_width, column)) for column in columns]
    least = [size if title in right else min(size, NARROWEST) for title, size in zip(titles, wide, strict=True)]
    needed = sum(least) + GAP * (len(titles) - 1)
    if not console.is_terminal:
        console.width = max(WIDTH, needed)
    if needed > console.width:
        _print_stacked(titles, cells, console)
        return
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for title, size in zip(titles, least, strict=True):
        figures = title in right
        table.add_column(
            title, justify="right" if figures else "left", overflow="fold", no_wrap=figures, min_width=size
        )
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _print_stacked(titles: Sequence[str], rows: Sequence[Sequence[Text]], console: Console) -> None:
    for number, (head, *values) in enumerate(rows):
        if number:
            console.print()
        console.print(head, style="bold")
        grid = Table.grid(padding=(0, GAP, 0, 0))
        grid.add_column()  # the indent
        grid.add_column(overflow="fold", max_width=console.width // 2)
        grid.add_column(overflow="fold")
        for title, value in zip(titles[1:], values, strict=True):
            if value.plain:
                grid.add_row("", " ".join(title.split()), value)
        console.print(grid)


def _width(text: Text) -> int:
    """Of the longest line."""
    return max(line.cell_len for line in text.split("\n", allow_blank=True))
