"""Lines of files and streams: their places, parts of long ones, chunks, and every byte exactly once."""

import io

import pytest

from dyadlm.data.formats import Passage, read_file, split_text
from dyadlm.generate.streaming import LONGEST_LINE
from dyadlm.score import Line, chunks, lines_of, waiting_chunks
from dyadlm.score.lines import CHUNK_BYTES

TEXTS = {
    "empty lines": b"\n\na\n\n",
    "no final line end": b"a\nb",
    "carriage returns": b"a\r\nb\rc\r\n",
    "no UTF-8": b"\xff\xfe\n\x80 \xc3\n",
    "one long line": b"x" * (3 * LONGEST_LINE + 5),
    "long line of wide characters": "é".encode() * LONGEST_LINE + b"\nafter\n",
    "longer than a block of a file": b"y" * (2**20 + 7) + b"\nz\n",
    "nothing": b"",
}


def of_file(content: bytes) -> list[Line]:
    return list(lines_of(split_text(io.BytesIO(content), Passage("a", b""))))


def of_stream(content: bytes) -> list[Line]:
    return [line for chunk in waiting_chunks(io.BufferedReader(io.BytesIO(content)), "a") for line in chunk]


@pytest.mark.parametrize("read", [of_file, of_stream])
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_lines_hold_every_byte_at_its_place(read, content):
    lines = read(content)
    assert b"".join(line.content for line in lines) == content
    for line in lines:
        assert content[line.offset : line.offset + len(line.content)] == line.content
        assert line.number == content[: line.offset].count(b"\n") + 1
        assert 0 < len(line.content) <= LONGEST_LINE + 1
        assert b"\n" not in line.content[:-1]
    starts = [line.starts_document for line in lines]
    assert starts == [number == 0 for number in range(len(lines))]


def test_records_are_documents_of_their_own(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"text": "a\\nb"}\n{"text": ""}\n{"text": "c\\n"}\n')
    lines = list(lines_of(read_file(tmp_path / "log.jsonl", "log.jsonl", "text")))
    assert lines == [
        Line("log.jsonl:1", 1, 0, b"a\n"),
        Line("log.jsonl:1", 2, 2, b"b"),
        Line("log.jsonl:3", 1, 0, b"c\n"),
    ]


def test_chunks_are_full_and_bounded():
    lines = of_file(b"".join(b"z" * (number % 97) + b"\n" for number in range(500)) + b"w" * 3000 + b"\nend\n")
    found = list(chunks(lines))
    assert [line for chunk in found for line in chunk] == lines
    sizes = [sum(len(line.content) for line in chunk) for chunk in found]
    assert all(size <= CHUNK_BYTES or len(chunk) == 1 for size, chunk in zip(sizes, found, strict=True))
    following = [len(chunk[0].content) for chunk in found[1:]]
    assert all(size + more > CHUNK_BYTES for size, more in zip(sizes, following, strict=False))
