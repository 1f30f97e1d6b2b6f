"""Lines of files and streams, with their places, in chunks that are read at once."""

from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from dyadlm.data.formats import Passage
from dyadlm.generate.streaming import parts_of, waiting_lines

# Most bytes that are read together: with the tokens between documents they go through the model in one pass of 2,048
# tokens, which is the most efficient size, at little memory.
CHUNK_BYTES = 2000


class Line(NamedTuple):
    """A line of a document, with its line end; or a part of one that is longer than `LONGEST_LINE` bytes.

    number: of the line in its document, from 1. offset: of the first byte in the (decompressed) document, from 0.
    Only a line feed ends a line; a carriage return before it belongs to the line.
    """

    document: str
    number: int
    offset: int
    content: bytes

    @property
    def starts_document(self) -> bool:
        return self.offset == 0


class Numbering:
    """Gives places to the lines of one document, in order. number, offset: of the next line."""

    def __init__(self, document: str, number: int = 1, offset: int = 0):
        self.document, self.number, self.offset = document, number, offset

    def place(self, content: bytes) -> Line:
        """The next line."""
        line = Line(self.document, self.number, self.offset, content)
        self.offset += len(content)
        self.number += content.endswith(b"\n")
        return line


def lines_of(passages: Iterable[Passage]) -> Iterator[Line]:
    """The lines of the documents of files; of a long line its parts."""
    numbering = Numbering("")
    for passage in passages:
        if passage.starts:
            numbering = Numbering(passage.document)
        for content in whole_lines(passage.content):
            yield from map(numbering.place, parts_of(content))


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a text, with their ends."""
    *complete, rest = content.split(b"\n")
    return [*(line + b"\n" for line in complete), *([rest] if rest else [])]


def chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines in lists of at most `CHUNK_BYTES` bytes; a longer line is alone."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        if chunk and size + len(line.content) > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(line)
        size += len(line.content)
    if chunk:
        yield chunk


def waiting_chunks(file: BinaryIO, document: str) -> Iterator[list[Line]]:
    """The lines of a stream as they come: many at once where many are waiting, and none waits for the next."""
    numbering = Numbering(document)
    for found in waiting_lines(file):
        yield from chunks(map(numbering.place, found))
