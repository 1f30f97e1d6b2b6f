"""A file that grows: its lines as they are complete, through rotation and truncation, as `tail -F` does."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dyadlm.errors import UserError
from dyadlm.files import printable
from dyadlm.generate.streaming import MOST_WAITING, parts_of
from dyadlm.score.lines import Line, Numbering, chunks

POLL_SECONDS = 0.25


class Place(NamedTuple):
    """Up to where a file was read: which file it was, and number and offset of the next line."""

    device: int
    inode: int
    number: int
    offset: int


class Follower:
    """The lines of a file from its beginning on, without end, in chunks.

    A line is given when it is complete. Where the name leads to another file (rotation), the rest of the old one is
    read first; where the file has become shorter (truncation), it is read from its beginning. In both cases a new
    document begins. While there is no file of that name, the old one is read on.

    place: after all chunks that were given so far; None before the first.
    """

    def __init__(self, path: Path, place: Place | None = None, wait: Callable[[float], None] = time.sleep):
        """place: of an earlier reading, continued if the name still leads to that file and it is not shorter.

        Raises:
            UserError: there is no such file.
        """
        if not path.is_file():
            raise UserError(f"There is no file {path} to follow; name a file, or send a pipe to standard input.")
        self._path, self.place, self._wait = path, place, wait
        self._name = printable(path.name)

    def __iter__(self) -> Iterator[list[Line]]:
        file = self._opened()
        try:
            yield from self._read(file, self._continued(file))
            while True:
                file.close()
                file = self._opened()
                yield from self._read(file, Numbering(self._name))
        finally:
            file.close()

    def _continued(self, file: BinaryIO) -> Numbering:
        """Where an earlier reading stopped, if it was of this file; else its beginning."""
        status, place = os.fstat(file.fileno()), self.place
        if place is None or (place.device, place.inode) != (status.st_dev, status.st_ino):
            return Numbering(self._name)
        if place.offset > status.st_size:
            return Numbering(self._name)
        file.seek(place.offset)
        return Numbering(self._name, place.number, place.offset)

    def _read(self, file: BinaryIO, numbering: Numbering) -> Iterator[list[Line]]:
        """The lines of one file until another one has taken its name."""
        status = os.fstat(file.fileno())
        rest = b""

        def given(lines: list[bytes]) -> Iterator[list[Line]]:
            for chunk in chunks(map(numbering.place, lines)):
                last = chunk[-1]
                number = last.number + last.content.endswith(b"\n")
                self.place = Place(status.st_dev, status.st_ino, number, last.offset + len(last.content))
                yield chunk

        replaced = False
        while True:
            if block := file.read(MOST_WAITING):
                *complete, rest = (rest + block).split(b"\n")
                found = [part for line in complete for part in parts_of(line + b"\n")]
                *long, rest = parts_of(rest)
                yield from given([*found, *long])
                continue
            if replaced:  # and nothing more has come since that was seen
                if rest:
                    yield from given([rest])
                return
            if os.fstat(file.fileno()).st_size < file.tell():
                if rest:
                    yield from given([rest])
                file.seek(0)
                numbering, rest = Numbering(self._name), b""
                continue
            replaced = self._replaced(status)
            if not replaced:
                self._wait(POLL_SECONDS)

    def _replaced(self, status: os.stat_result) -> bool:
        """Whether the name leads to another file."""
        try:
            now = os.stat(self._path)
        except FileNotFoundError:
            return False
        return (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino)

    def _opened(self) -> BinaryIO:
        while True:
            try:
                return self._path.open("rb", buffering=0)
            except FileNotFoundError:  # renamed again in between
                self._wait(POLL_SECONDS)
