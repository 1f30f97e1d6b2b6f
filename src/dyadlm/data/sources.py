"""Where text comes from: every source yields passages, a few at a time, whatever it is stored in."""

import bz2
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet
import zstandard

from dyadlm.errors import UserError
from dyadlm.files import sha256_of

BLOCK_BYTES = 1 << 20
TRAIN, VALIDATION, TEST = "train", "validation", "test"
MANIFEST_NAME = "manifest.json"  # of a prepared folder
_COMPRESSED = (".gz", ".bz2", ".zst")
_FILE_SUFFIXES = (*_COMPRESSED, ".txt", ".md", ".json", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<configuration>[\w.-]+))?")


@dataclass(frozen=True)
class Passage:
    """Some bytes of a document, with the tags that its tokens carry.

    offset: where content begins in the document, in bytes of (decompressed) text; starts: the document begins
    here. A document is all passages from one that starts to the next one that starts.
    """

    document: str
    content: bytes
    section: str = ""
    kind: str = "text"
    offset: int = 0
    starts: bool = True


@dataclass(frozen=True)
class Source:
    """Text under one name. splits: "train", and "validation" and "test" where the source has them by name.

    Each split may be read again and again. key: a digest of the content, which names it in the cache.
    """

    name: str
    licence: str
    key: str
    splits: Mapping[str, Callable[[], Iterator[Passage]]]


def open_source(argument: str | Path, text_field: str = "text") -> Source:
    """The source a user names: a file, a folder (all files in it), `-` or a dataset on the Hugging Face hub.

    Files may be text, JSONL or Parquet (`text_field` names the field with the text), plain or compressed
    (.gz, .bz2, .zst). Hub datasets are called `owner/name` or `owner/name:configuration`. Raises `UserError`.
    """
    path = Path(argument)
    if str(argument) == "-":
        return _standard_input()
    if path.is_dir():
        return _folder(path, text_field)
    if path.exists():
        return _file(path, text_field)
    hub_name = _HUB_NAME.fullmatch(str(argument))
    if hub_name and not str(argument).endswith(_FILE_SUFFIXES):
        return _hub_dataset(hub_name["name"], hub_name["configuration"], text_field)
    raise UserError(f"There is no file, folder or corpus {str(argument)!r}; `dyadlm data list` shows the corpora.")


def with_validation(source: Source) -> Source:
    """The source itself if it has a validation split; else its last tenth of bytes becomes one.

    The cut is moved forward to the next character of UTF-8 (at most 3 bytes). Raises `UserError` if there is
    too little text to divide.
    """
    if VALIDATION in source.splits:
        return source
    passages = source.splits[TRAIN]
    size = sum(len(passage.content) for passage in passages())
    if size < 2:
        raise UserError(f"{source.name} holds {size} bytes of text; give a source with text in it.")
    cut = size * 9 // 10
    return replace(
        source,
        splits=dict(source.splits)
        | {TRAIN: partial(_before, passages, cut), VALIDATION: partial(_after, passages, cut)},
    )


def _before(passages: Callable[[], Iterator[Passage]], cut: int) -> Iterator[Passage]:
    for passage in passages():
        if len(passage.content) > cut:
            head = passage.content[: _character_edge(passage.content, cut)]
            if head:
                yield replace(passage, content=head)
            return
        yield passage
        cut -= len(passage.content)


def _after(passages: Callable[[], Iterator[Passage]], cut: int) -> Iterator[Passage]:
    first = True
    for passage in passages():
        size = len(passage.content)
        if cut >= size:
            cut -= size
            continue
        edge = _character_edge(passage.content, cut) if first else 0
        if edge < size:
            tail, offset = passage.content[edge:], passage.offset + edge
            yield replace(passage, content=tail, offset=offset, starts=passage.starts or first)
            first = False
        cut = 0


def _character_edge(content: bytes, cut: int) -> int:
    """The first place at or after `cut` where a character of UTF-8 begins or all ends; `cut` in other bytes."""
    for edge in range(cut, cut + 4):
        if edge in (0, len(content)) or content[edge] & 0xC0 != 0x80:
            return edge
    return cut


# ---- files and folders


def _file(path: Path, text_field: str) -> Source:
    return Source(
        path.name, "unknown", _key({path.name: path}), {TRAIN: partial(read_file, path, path.name, text_field)}
    )


def _folder(path: Path, text_field: str) -> Source:
    if (path / MANIFEST_NAME).exists():
        raise UserError(f"{path} is prepared already; give the folder itself as --data.")
    files = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    if not files:
        raise UserError(f"The folder {path} holds no files; put text files into it.")

    def passages() -> Iterator[Passage]:
        for name, file in files.items():
            yield from read_file(file, name, text_field)

    return Source(path.resolve().name, "unknown", _key(files), {TRAIN: passages})


def read_file(path: Path, name: str, text_field: str) -> Iterator[Passage]:
    """The passages of one file; its documents are called `name`, or `name:number` where it holds records.

    Raises `UserError` if it cannot be read, or holds no text.
    """
    kind = Path(path.name.removesuffix(path.suffix)) if path.suffix in _COMPRESSED else path
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, name, text_field)
        else:
            with _decompressed(path) as file:
                if kind.suffix == ".jsonl":
                    yield from _json_lines(file, name, text_field)
                else:
                    yield from _text(file, name)
    except (OSError, EOFError, zstandard.ZstdError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


@contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        match path.suffix:
            case ".gz":
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]
            case ".bz2":
                with bz2.open(raw) as file:
                    yield file  # type: ignore[misc]
            case ".zst":
                yield io.BufferedReader(_ZstdFile(raw))
            case _:
                yield raw


class _ZstdFile(io.RawIOBase):
    """Decompressed zstd, frame after frame. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(1 << 14)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends before its compressed data does")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _text(file: BinaryIO, name: str) -> Iterator[Passage]:
    """One document in blocks that end with a line where possible, else with a character."""
    offset = 0
    rest = b""
    while block := file.read(BLOCK_BYTES):
        content = rest + block
        edge = content.rfind(b"\n") + 1 or _whole_characters(content)
        content, rest = content[:edge], content[edge:]
        if content:
            yield Passage(name, content, offset=offset, starts=offset == 0)
        offset += len(content)
    if rest:
        yield Passage(name, rest, offset=offset, starts=offset == 0)


def _whole_characters(content: bytes) -> int:
    """Where a character of UTF-8 that ends beyond `content` begins; else the end."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte & 0xC0 != 0x80:
            size = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) - back if size > back else len(content)
    return len(content)


def _json_lines(file: BinaryIO, name: str, text_field: str) -> Iterator[Passage]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"{name}, line {number} is no JSON object; each line must be one.")
        yield from _record(record, f"{name}:{number}", text_field)


def _parquet(path: Path, name: str, text_field: str) -> Iterator[Passage]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            raise UserError(f"{name} has no field {text_field!r}; its fields are {', '.join(columns)}.")
        number = 0
        wanted = [column for column in (text_field, "section", "kind") if column in columns]
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield from _record(record, f"{name}:{number}", text_field)


def _record(record: Mapping[str, Any], document: str, text_field: str) -> Iterator[Passage]:
    """A record is a document; its fields `section` and `kind`, if they are strings, tag it."""
    if text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise UserError(f"{document} has no field {text_field!r} (its fields: {fields}); name the text's field.")
    text = record[text_field]
    if not isinstance(text, str | bytes):
        raise UserError(f"{document}: the field {text_field!r} is no text but {type(text).__name__}.")
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    tags = {tag: record[tag] for tag in ("section", "kind") if isinstance(record.get(tag), str)}
    if content:
        yield Passage(document, content, **tags)


def _key(files: Mapping[str, Path]) -> str:
    """A digest of names and contents."""
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}\0{sha256_of(file)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# ---- standard input and the hub


def _standard_input() -> Source:
    """Standard input, kept in a temporary file, because a source is read more than once."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the source is gone
    shutil.copyfileobj(sys.stdin.buffer, spool)

    def passages() -> Iterator[Passage]:
        spool.seek(0)
        yield from _text(spool, "standard input")

    weakref.finalize(passages, spool.close)
    spool.seek(0)
    key = hashlib.file_digest(spool, "sha256").hexdigest()
    return Source("standard input", "unknown", key, {TRAIN: passages})


def _hub_dataset(name: str, configuration: str | None, text_field: str) -> Source:
    """A dataset on the hub, streamed; its own splits train, validation and test are kept."""
    title = name if configuration is None else f"{name}:{configuration}"
    try:
        builder = datasets.load_dataset_builder(name, configuration)
        stored = datasets.load_dataset(name, configuration, streaming=True)
    except Exception as error:  # the hub, the network and dataset files raise errors of many kinds
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"There is no file or folder {title!r}, and no such dataset on the hub can be reached "
            f"({reason[0] if reason else type(error).__name__})."
        ) from error
    if TRAIN not in stored:
        raise UserError(f"The dataset {title!r} has no split `train`; it has {', '.join(stored)}.")

    def passages(split: str) -> Iterator[Passage]:
        for number, record in enumerate(stored[split], start=1):
            yield from _record(record, f"{title}/{split}:{number}", text_field)

    splits = {split: partial(passages, split) for split in (TRAIN, VALIDATION, TEST) if split in stored}
    key = hashlib.sha256(f"{title}\0{text_field}\0{builder.hash}".encode()).hexdigest()
    return Source(title, builder.info.license or "unknown", key, splits)
