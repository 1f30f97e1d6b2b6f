"""How far a preparation is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from dyadlm.data.formats import Passage
    from dyadlm.data.parts import Piece

# Called with what is done, the bytes of text that were read, all of them where their number is known, and the tokens.
Progress: TypeAlias = Callable[[str, int, int | None, int], None]
MEASURING, TOKENISING = "measuring", "tokenising"
# Of a line to the next where there is no terminal.
SECONDS_A_LINE = 60.0


class Reading:
    """Counts text as it is read, and the tokens that are made of it. progress: who is told; nobody for None."""

    def __init__(self, progress: Progress | None, what: str, total: int | None = None):
        self._progress, self._what, self._total = progress, what, total
        self.bytes = self._tokens = 0

    def of(self, passages: "Iterator[Passage]") -> "Iterator[Passage]":
        """The passages as they come."""
        for passage in passages:
            self.bytes += len(passage.content)
            self._tell()
            yield passage

    def made(self, tokenised: "Iterator[list[Piece]]") -> "Iterator[list[Piece]]":
        """The tokens of the text as they come."""
        for pieces in tokenised:
            self._tokens += sum(len(piece.ids) for piece in pieces)
            self._tell()
            yield pieces

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._what, self.bytes, self._total, self._tokens)


@contextmanager
def preparation_progress(console: Console) -> Iterator[Progress]:
    """What shows it: a bar on a terminal, which goes away at the end, and a line now and then elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=console, transient=True)
    task, told = bar.add_task("", total=None, tokens=0), time.monotonic()

    def show(what: str, read: int, total: int | None, tokens: int) -> None:
        nonlocal told
        if console.is_terminal:
            if bar.tasks[0].description != what:
                bar.reset(task)  # the time left is that of this pass over the text
            bar.update(task, description=what, completed=read, total=total, tokens=tokens)
            bar.start()  # once there is something to show: what is prepared already takes no time
        elif time.monotonic() - told >= SECONDS_A_LINE:
            told = time.monotonic()
            share = f"{decimal(read)} of {decimal(total)} ({read / total:.0%})" if total else decimal(read)
            console.print(f"{what}: {share}, {tokens:,} tokens")

    try:
        yield show
    finally:
        if console.is_terminal:
            bar.stop()
