"""Where text comes from: every source yields passages, a few at a time, whatever it is stored in."""

import difflib
import hashlib
import logging
import os
import posixpath
import re
import shutil
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets

from dyadlm.data.chat import CONVERSATION
from dyadlm.data.formats import (
    FILE_SUFFIXES,
    MOST_DECOMPRESSED,
    NotText,
    Passage,
    read_file,
    read_record,
    require_text_name,
    split_text,
)
from dyadlm.data.progress import MEASURING, Progress, Reading
from dyadlm.data.remote import is_remote, remote_files, remote_key
from dyadlm.errors import UserError, first_line
from dyadlm.files import full_disk_named, printable, sha256_of

TRAIN, VALIDATION, TEST = "train", "validation", "test"
MANIFEST_NAME = "manifest.json"  # of a prepared folder
# It is part of every key: what was prepared by older rules of reading is prepared anew.
RULES = 2
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<configuration>[\w.-]+))?")
log = logging.getLogger("dyadlm.data")


@dataclass(frozen=True)
class Source:
    """Text under one name. splits: "train", and "validation" and "test" where the source has them by name.

    Each split may be read again and again. key: a digest of the content, which names it in the cache. files: what
    "train" is made of, one file after the other, where it is made of files. key_now: the key, of the content as it is
    now, where it may change. bytes: of text in all splits, where they were counted.
    """

    name: str
    licence: str
    key: str
    splits: Mapping[str, Callable[[], Iterator[Passage]]]
    files: Sequence[Callable[[], Iterator[Passage]]] = ()
    key_now: Callable[[], str] | None = None
    bytes: int | None = None

    @property
    def parts(self) -> Sequence[Callable[[], Iterator[Passage]]]:
        """Of "train", each of which can be read without those before it."""
        return self.files or (self.splits[TRAIN],)

    def require_unchanged(self) -> None:
        """Raise `UserError` if the content is no longer what it was when the source was opened. It is read more than
        once, so that parts of both would be mixed."""
        try:
            unchanged = self.key_now is None or self.key_now() == self.key
        except (OSError, UserError):
            unchanged = False
        if not unchanged:
            raise UserError(f"{self.name} has changed while it was read; give a copy to which nobody writes.")


def open_source(
    argument: str | Path,
    text_field: str = "text",
    most_decompressed: float = MOST_DECOMPRESSED,
    known: Collection[str] = (),
) -> Source:
    """The source a user names: a file, a folder (all files in it), `-` or a dataset on the Hugging Face hub.

    Files may be text, JSON lines, arrays of JSON objects or Parquet (`text_field` names the field with the text),
    plain, compressed (gzip, bzip2, xz, zstd) or in a zip archive; see `dyadlm.data.formats`. Links in a folder are
    followed; its hidden files are not read, and those that are no text are left out with a warning. Standard input
    is read as text, whatever it holds. Hub datasets are called `owner/name` or `owner/name:configuration`. What has a
    URL is opened through fsspec: a file, a folder or a pattern (`dyadlm.data.remote`).

    most_decompressed: how many bytes one compressed byte may stand for. known: other names that the user may have
    meant. Raises `UserError`.
    """
    path = Path(argument)
    read = partial(read_file, text_field=text_field, ratio=most_decompressed)
    if str(argument) == "-":
        return _standard_input()
    if is_remote(str(argument)):
        return _remote(str(argument), read)
    if path.is_dir():
        return _folder(path, read)
    if path.is_file():
        require_text_name(path.name)
        return _file(path, read)
    if path.exists():
        raise UserError(f"{path} is a pipe or a device, not a file; send it to standard input and give `-`.")
    hub_name = _HUB_NAME.fullmatch(str(argument))
    is_path = path.suffix.lower() in FILE_SUFFIXES or path.parts[:1] in [(".",), ("..",), ("~",)]
    if hub_name and not is_path and not path.parent.exists():
        return _hub_dataset(hub_name["name"], hub_name["configuration"], text_field)
    beside = [str(path.with_name(name)) for name in os.listdir(path.parent)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(argument), [*known, *beside], n=1)
    hint = f"the nearest is {printable(near[0])}; " if near else ""
    raise UserError(
        f"There is no file, folder or corpus {str(argument)!r}; {hint}`dyadlm data list` shows the corpora."
    )


def with_validation(source: Source, progress: Progress | None = None) -> Source:
    """The source itself if it has a validation split; else its last tenth of bytes becomes one.

    The cut is moved forward to the next character of UTF-8 (at most 3 bytes), or back to the beginning of a
    conversation. progress: told of the text that is measured for it. Raises `UserError` if there is too little text to
    divide.
    """
    if VALIDATION in source.splits:
        return source
    passages = source.splits[TRAIN]
    measured = Reading(progress, MEASURING)
    deque(measured.of(passages()), maxlen=0)
    size = measured.bytes
    if size < 2:
        raise UserError(f"{source.name} holds {size} bytes of text; give a source with text in it.")
    cut = size * 9 // 10
    return replace(
        source,
        splits=dict(source.splits)
        | {TRAIN: partial(_before, passages, cut), VALIDATION: partial(_after, passages, cut)},
        bytes=size if TEST not in source.splits else None,
    )


def _before(passages: Callable[[], Iterator[Passage]], cut: int) -> Iterator[Passage]:
    for passage in passages():
        if len(passage.content) > cut:
            if passage.kind == CONVERSATION:
                return
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
        edge = _character_edge(passage.content, cut) if first and passage.kind != CONVERSATION else 0
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


Read = Callable[[Any, str], Iterator[Passage]]


def _file(path: Path, read: Read) -> Source:
    name = printable(path.name)
    key = partial(_key, {name: path})
    return Source(name, "unknown", key(), {TRAIN: partial(read, path, name)}, key_now=key)


def _folder(path: Path, read: Read) -> Source:
    if (path / MANIFEST_NAME).exists():
        raise UserError(f"{path} is prepared already; give the folder itself as --data.")
    files = _files_below(path)
    if not files:
        raise UserError(f"The folder {path} holds no files; put text files into it.")
    return _of_files(printable(path.resolve().name), str(path), files, read, partial(_key, files))


def _remote(url: str, read: Read) -> Source:
    files = remote_files(url)
    if posixpath.join(posixpath.commonpath(files), MANIFEST_NAME) in files:
        raise UserError(f"{url} is prepared already; copy it to a disk and give that folder as --data.")
    key = partial(remote_key, RULES, files)
    if len(files) == 1:
        ((name, file),) = files.items()
        return Source(printable(url), "unknown", key(), {TRAIN: partial(read, file, name)}, key_now=key)
    return _of_files(printable(url), url, files, read, key)


def _of_files(name: str, place: str, files: Mapping[str, Any], read: Read, key: Callable[[], str]) -> Source:
    """Several files, one after the other, of which those are left out that are no text. place: for messages."""
    left_out: set[str] = set()

    def passages() -> Iterator[Passage]:
        for inner, file in files.items():
            try:
                yield from read(file, inner)
            except NotText as error:
                if inner not in left_out:
                    log.warning("Left out of %s: %s", printable(place), error)
                    left_out.add(inner)
        if len(left_out) == len(files):
            raise UserError(f"{place} holds no text; put text files into it.")

    parts = [partial(_text_of, read, file, inner) for inner, file in files.items()]
    return Source(name, "unknown", key(), {TRAIN: passages}, parts, key)


def _text_of(read: Read, file: Path, name: str) -> Iterator[Passage]:
    """The passages of one file of a folder, none where it is no text."""
    try:
        yield from read(file, name)
    except NotText as error:
        log.warning("Left out: %s", error)


def _files_below(folder: Path) -> dict[str, Path]:
    """By their path from the folder, in order; through links, but into no folder a second time."""
    files: dict[str, Path] = {}
    entered: set[tuple[int, int]] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        place = os.stat(at)
        if (place.st_dev, place.st_ino) in entered:
            log.warning("Left out: %s is a link to a folder that is read already.", printable(at))
            folders.clear()
            continue
        entered.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = Path(at, name)
            if name.startswith("."):
                continue
            if file.is_file():
                files[printable(file.relative_to(folder).as_posix())] = file
            else:
                log.warning("Left out: %s is no file, or a link to nothing.", printable(str(file)))
    return dict(sorted(files.items(), key=lambda entry: Path(entry[0])))


def _key(files: Mapping[str, Path]) -> str:
    """A digest of names and contents."""
    digest = hashlib.sha256(str(RULES).encode())
    for name, file in files.items():
        digest.update(f"{name}\0{_content_digest(file, *_version(file))}\0".encode())
    return digest.hexdigest()


def _version(file: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    at = file.stat()
    return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns


@cache
def _content_digest(file: Path, *version: int) -> str:
    """Of a file as it is now, made once: sources are looked up early, and again when they are read."""
    return sha256_of(file)


# ---- standard input and the hub


def _standard_input() -> Source:
    """Standard input, kept in a temporary file, because a source is read more than once."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the source is gone
    with full_disk_named(Path(tempfile.gettempdir())):
        shutil.copyfileobj(sys.stdin.buffer, spool)

    def passages() -> Iterator[Passage]:
        spool.seek(0)
        yield from split_text(spool, Passage("standard input", b""))

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
        raise UserError(
            f"There is no file or folder {title!r}, and no such dataset on the hub can be reached "
            f"({first_line(error)})."
        ) from error
    if TRAIN not in stored:
        raise UserError(f"The dataset {title!r} has no split `train`; it has {', '.join(stored)}.")

    def passages(split: str) -> Iterator[Passage]:
        for number, record in enumerate(stored[split], start=1):
            yield from read_record(record, f"{title}/{split}:{number}", text_field)

    def part(number: int) -> Iterator[Passage]:
        shard = stored[TRAIN].shard(shards, number)
        for place, record in enumerate(shard, start=1):
            yield from read_record(record, f"{title}/{TRAIN}/{number}:{place}", text_field)

    splits = {split: partial(passages, split) for split in (TRAIN, VALIDATION, TEST) if split in stored}
    shards = stored[TRAIN].num_shards
    key = hashlib.sha256(f"{title}\0{text_field}\0{builder.hash}".encode()).hexdigest()
    parts = [partial(part, number) for number in range(shards)]
    return Source(title, builder.info.license or "unknown", key, splits, parts)
