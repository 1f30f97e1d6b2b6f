"""What a file holds and how it is read: text, JSON, JSON lines and Parquet, plain, compressed or in a zip archive.

The kind is told by the content first and by the name after that, in capitals or not. Whatever is not text is refused.
"""

import bz2
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet
import zstandard

from dyadlm.data.chat import CONVERSATION, RESERVED, as_json, has_messages, messages_of
from dyadlm.errors import UserError

BLOCK_BYTES = 1 << 20
# A record (a line of JSON, a member of an array) is parsed whole, so that its size needs a bound.
LONGEST_RECORD = 1 << 26
# Decompressed bytes for each compressed one. Text seldom passes 30; a bomb has 1,000 and more.
MOST_DECOMPRESSED = 250
# No file is called a bomb before it has given so many bytes.
UNSUSPICIOUS_BYTES = 1 << 26
# Zstandard keeps a window of the text; `zstd --long=31` writes the widest. Memory is taken as it is filled.
ZSTD_WINDOW = 1 << 31
# Compressed bytes that are unpacked at once: 4 bytes may stand for 128 KiB.
ZSTD_BLOCK = 1 << 12

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
ZIP, PARQUET = b"PK\x03\x04", b"PAR1"
FILE_SUFFIXES = (*COMPRESSED.values(), ".zip", ".parquet", ".json", *JSON_LINES, ".txt", ".md", ".csv", ".log")

# First bytes of files that are not text, and what to call them.
FOREIGN = {
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"%PDF": "a PDF document",
    b"7z\xbc\xaf\x27\x1c": "an archive of a kind that is not read",
    b"Rar!": "an archive of a kind that is not read",
    b"\x7fELF": "a program",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "an array",
    b"SQLite format 3\x00": "a database",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
TAR_MARK, TAR_PLACE = b"ustar", 257
# Names of files that are not text, whatever they begin with.
FOREIGN_SUFFIXES = frozenset(
    (  # noqa: SIM905 - as a list it would be a page long
        ".7z .arrow .avi .avif .bin .bmp .class .dll .doc .docx .dylib .exe .flac .gguf .gif .h5 .heic .ico .jpeg .jpg "
        ".m4a .mkv .mov .mp3 .mp4 .npy .npz .o .odt .ogg .otf .pdf .pickle .pkl .png .ppt .pptx .pt .pth .pyc .rar "
        ".safetensors .so .sqlite .tar .tgz .tif .tiff .ttf .wav .webm .webp .woff .woff2 .xls .xlsx"
    ).split()
)
UNREADABLE = (
    OSError,
    EOFError,
    NotImplementedError,  # a method of compression that Python does not have
    UnicodeDecodeError,
    lzma.LZMAError,
    pa.ArrowException,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
)


@dataclass(frozen=True)
class Passage:
    """Some bytes of a document, with the tags that its tokens carry.

    offset: where content begins in the document, in bytes of (decompressed) text; starts: the document begins
    here. A document is all passages from one that starts to the next one that starts. A conversation is one passage of
    the kind `CONVERSATION`, whose content is its messages as JSON (`dyadlm.data.chat`); it is never divided.
    """

    document: str
    content: bytes
    section: str = ""
    kind: str = "text"
    offset: int = 0
    starts: bool = True


class NotText(UserError):
    """A file that holds something else than text; in a folder it is left out."""


def read_file(path: Path, name: str, text_field: str, ratio: float = MOST_DECOMPRESSED) -> Iterator[Passage]:
    """The passages of one file; its documents are called `name`, or `name:number` where it holds records.

    ratio: how many bytes a compressed one may stand for. Raises `UserError` if the file cannot be read, or holds no
    text (`NotText`).
    """
    try:
        with path.open("rb") as raw:
            head = raw.read(512)
            raw.seek(0)
            if head.startswith(ZIP):
                yield from _zip(raw, name, text_field, ratio)
            elif head.startswith(PARQUET) or path.suffix.lower() == ".parquet":
                yield from _parquet(raw, name, text_field)
            else:
                with _decompressed(raw, head, path.suffix.lower(), name, ratio) as file:
                    yield from _content(file, name, text_field)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def require_text_name(name: str) -> None:
    """Raise `NotText` if a file of that name holds no text."""
    suffix = PurePath(_inner_name(name)).suffix.lower()
    if suffix in FOREIGN_SUFFIXES:
        raise NotText(f"{name} is not text ({suffix}); give text, JSON lines or Parquet, or turn it into text first.")


def _inner_name(name: str) -> str:
    """The name without the ending of its compression."""
    suffix = PurePath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in COMPRESSED.values() else name


def _content(file: BinaryIO, name: str, text_field: str) -> Iterator[Passage]:
    """What is decompressed, by its first bytes and its name."""
    require_text_name(name)
    head = file.peek(BLOCK_BYTES)  # type: ignore[attr-defined]  # of every buffered file
    foreign = next((what for mark, what in FOREIGN.items() if head.startswith(mark)), None)
    if head[TAR_PLACE : TAR_PLACE + len(TAR_MARK)] == TAR_MARK:
        foreign = "a tar archive"
    if foreign is not None:
        raise NotText(f"{name} is {foreign}, not text in UTF-8; unpack or convert it first.")
    suffix = PurePath(_inner_name(name)).suffix.lower()
    if suffix in JSON_LINES or (suffix == ".json" and _is_line_of_json(head, text_field)):
        yield from _json_lines(file, name, text_field)
    elif suffix == ".json" and _is_array_of_objects(head):
        yield from _json_array(file, name, text_field)
    else:
        yield from split_text(file, Passage(name, b""))


# ---- decompression


@contextmanager
def _decompressed(raw: BinaryIO, head: bytes, suffix: str, name: str, ratio: float) -> Iterator[BinaryIO]:
    """The file by its first bytes; by its name where these say nothing, so that what is damaged is not text."""
    kind = next((kind for mark, kind in COMPRESSED.items() if head.startswith(mark)), suffix)
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _ZstdFile,
    }
    if kind not in openers:
        yield raw
        return
    with openers[kind](raw) as unpacked:
        yield io.BufferedReader(_Bounded(unpacked, raw.tell, name, ratio), BLOCK_BYTES)


class _Bounded(io.RawIOBase):
    """Decompressed bytes, refused where they are too many for the compressed ones they come from."""

    def __init__(self, unpacked: Any, packed_bytes: Callable[[], int], name: str, ratio: float):
        self._unpacked, self._packed_bytes, self._name, self._ratio = unpacked, packed_bytes, name, ratio
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self._unpacked.readinto(buffer)
        self._given += size
        if self._given > max(UNSUSPICIOUS_BYTES, self._ratio * self._packed_bytes()):
            raise UserError(
                f"{self._name} unpacks to more than {self._ratio:g} times its size, as a decompression bomb does; "
                "if it is really text, raise the limit (--set data.most_decompressed=N, --most-decompressed N)."
            )
        return size


class _ZstdFile(io.RawIOBase):
    """Decompressed zstd, frame after frame. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(ZSTD_BLOCK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends before its compressed data does")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _zip(raw: BinaryIO, name: str, text_field: str, ratio: float) -> Iterator[Passage]:
    """The files of an archive, in the order of their names; what is no text is left out."""
    texts = 0
    with zipfile.ZipFile(raw) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise UserError(f"{name} is encrypted; unpack it first.")
            inner = f"{name}/{info.filename}"
            with archive.open(info) as packed:
                file = io.BufferedReader(_Bounded(packed, partial(int, info.compress_size), inner, ratio))
                try:
                    yield from _content(file, inner, text_field)
                except NotText:
                    continue
            texts += 1
    if not texts:
        raise NotText(f"{name} holds no file of text; unpack it and look.")


# ---- text and records


def split_text(file: Any, passage: Passage) -> Iterator[Passage]:
    """One document in blocks that end with a line where possible, else with a character; tagged as `passage` is."""
    offset = 0
    rest = b""

    def part(content: bytes) -> Passage:
        return Passage(passage.document, content, passage.section, passage.kind, offset, offset == 0)

    while block := file.read(BLOCK_BYTES):
        content = rest + block
        edge = content.rfind(b"\n") + 1 or whole_characters(content)
        content, rest = content[:edge], content[edge:]
        if content:
            yield part(content)
        offset += len(content)
    if rest:
        yield part(rest)


def whole_characters(content: bytes) -> int:
    """Where a character of UTF-8 that ends beyond `content` begins; else the end."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte & 0xC0 != 0x80:
            size = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) - back if size > back else len(content)
    return len(content)


def _json_lines(file: BinaryIO, name: str, text_field: str) -> Iterator[Passage]:
    number = 0
    while line := file.readline(LONGEST_RECORD + 1):
        number += 1
        if len(line) > LONGEST_RECORD:
            raise UserError(f"{name}, line {number} is longer than {LONGEST_RECORD >> 20} MiB; divide it.")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"{name}, line {number} is no JSON object; each line must be one.")
        yield from read_record(record, f"{name}:{number}", text_field)


def _is_line_of_json(head: bytes, text_field: str) -> bool:
    """Whether the first line is a JSON object with the field, as in many files of JSON lines called `.json`.

    Of a line that is longer than `head` the field's name has to do.
    """
    line, end, _ = head.lstrip().partition(b"\n")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return not end and line.startswith(b"{") and json.dumps(text_field).encode() in line
    return isinstance(record, dict) and (text_field in record or has_messages(record))


def _is_array_of_objects(head: bytes) -> bool:
    begins = head.lstrip()
    return begins.startswith(b"[") and begins[1:].lstrip().startswith(b"{")


def _json_array(file: BinaryIO, name: str, text_field: str) -> Iterator[Passage]:
    """The objects of an array, one after the other; the array is never held whole."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        for number, record in enumerate(_members(text, name), start=1):
            if not isinstance(record, dict):
                raise UserError(f"{name}, record {number} is no JSON object; each must be one.")
            yield from read_record(record, f"{name}:{number}", text_field)
    finally:
        text.detach()  # the file is closed by whoever opened it


def _members(text: io.TextIOWrapper, name: str) -> Iterator[Any]:
    """The values of a JSON array. While one does not end, ever more is read, so that none is parsed often."""
    decoder = json.JSONDecoder()
    number, size, rest = 0, BLOCK_BYTES, ""
    expected = "["
    while True:
        rest = rest.lstrip()
        if rest and rest[0] in expected:
            if rest[0] == "]":
                _require_end(rest[1:], text, name)
                return
            expected, rest = "", rest[1:]
            continue
        error: Exception = ValueError(f"one of {expected!r} is missing")
        if rest and not expected:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError) as failed:
                error = failed
            else:
                number, size, expected, rest = number + 1, BLOCK_BYTES, ",]", rest[end:]
                yield value
                continue
        more = "" if len(rest) > LONGEST_RECORD or (rest and expected) else text.read(size)
        if not more:
            raise UserError(f"{name}, record {number + 1} is not JSON: {error}.")
        rest, size = rest + more, 2 * size


def _require_end(rest: str, text: io.TextIOWrapper, name: str) -> None:
    """Raise `UserError` if more than white space follows an array, such as a second one."""
    while not rest.strip():
        if not (rest := text.read(BLOCK_BYTES)):
            return
    raise UserError(f"{name} goes on after its array ({rest.strip()[:20]!r}); give one array, or JSON lines.")


def _parquet(raw: BinaryIO, name: str, text_field: str) -> Iterator[Passage]:
    with pyarrow.parquet.ParquetFile(raw, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
        columns = file.schema_arrow.names
        if text_field not in columns and not {"messages", "conversations"} & set(columns):
            raise UserError(f"{name} has no field {text_field!r}; its fields are {', '.join(columns)}.")
        number = 0
        known = (text_field, "messages", "conversations", "section", "kind")
        wanted = [column for column in dict.fromkeys(known) if column in columns]
        for batch in file.iter_batches(batch_size=16, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield from read_record(record, f"{name}:{number}", text_field)


def read_record(record: Mapping[str, Any], document: str, text_field: str) -> Iterator[Passage]:
    """A record is a document; its fields `section` and `kind`, if they are strings, tag it. One without the text's
    field, but with messages, is a conversation."""
    if has_messages(record) and not isinstance(record.get(text_field), str | bytes):
        section = _tags(record).get("section", "")
        content = as_json(messages_of(record, document))
        if len(content) > LONGEST_RECORD:
            raise UserError(f"{document} holds more than {LONGEST_RECORD >> 20} MiB of text; divide it.")
        yield Passage(document, content, section, CONVERSATION)
        return
    if text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise UserError(f"{document} has no field {text_field!r} (its fields: {fields}); name the text's field.")
    text = record[text_field]
    if not isinstance(text, str | bytes):
        raise UserError(f"{document}: the field {text_field!r} is no text but {type(text).__name__}.")
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(content) > LONGEST_RECORD:
        raise UserError(f"{document} holds more than {LONGEST_RECORD >> 20} MiB of text; divide it.")
    tags = _tags(record)
    if tags.get("kind", "").startswith(RESERVED):
        raise UserError(f"{document} is of the kind {tags['kind']!r}, but {RESERVED}… is kept for conversations.")
    yield from split_text(io.BytesIO(content), Passage(document, b"", **tags))


def _tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Section and kind of a record. Halves of surrogate pairs, which JSON can spell and files cannot, are escaped."""
    tags = {tag: record[tag] for tag in ("section", "kind") if isinstance(record.get(tag), str)}
    return {tag: name.encode(errors="backslashreplace").decode() for tag, name in tags.items()}
