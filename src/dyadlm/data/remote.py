"""Text in other places than the disk: whatever fsspec opens, such as s3://, gs://, hf://, http:// and memory://."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.core import has_magic

from dyadlm.data.formats import BLOCK_BYTES
from dyadlm.errors import UserError, first_line
from dyadlm.files import printable

WEB = ("http", "https")
# What servers of the web say of a file, and change with it.
MARKS = ("ETag", "Content-MD5", "Digest", "Last-Modified")


@dataclass(frozen=True)
class RemoteFile:
    """A file of an fsspec file system, as far as reading needs one. path: as this system names it."""

    system: Any
    path: str

    def open(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Opened(self), BLOCK_BYTES)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def __str__(self) -> str:
        return str(self.system.unstrip_protocol(self.path))


class _Opened(io.RawIOBase):
    """A file while it is read. Whatever a place fails with is an `OSError`, as it is of a disk."""

    def __init__(self, file: RemoteFile):
        with _errors_of_a_disk():
            self._content = file.system.open(file.path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._content.seekable())

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        return int(self._content.seek(place, whence))

    def tell(self) -> int:
        return int(self._content.tell())

    def readinto(self, buffer: Any) -> int:
        with _errors_of_a_disk():
            return int(self._content.readinto(buffer))

    def close(self) -> None:
        if not self.closed:
            self._content.close()
        super().close()


@contextmanager
def _errors_of_a_disk() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each place has its own
        raise OSError(f"{first_line(error)}; try again, or download it and give the file") from error


def is_remote(argument: str) -> bool:
    """Whether a source is named by a URL."""
    return "://" in argument


def remote_files(url: str) -> dict[str, RemoteFile]:
    """The files behind a URL by their names, in order: of one file, of a folder (all below it that are not hidden), or
    of a pattern. A URL of the web is a folder where it ends with a slash.

    Raises:
        UserError: there are none, two names look the same, the place cannot be reached, or its package is not
            installed.
    """
    try:
        system, path = fsspec.url_to_fs(url)
        pattern = has_magic(path)
        if pattern:
            paths = [found for found in system.glob(path) if system.isfile(found)]
        elif system.isfile(path) and not url.endswith("/"):
            paths = [path]
        else:
            paths = [found for found in system.find(path) if not _is_hidden(found.removeprefix(path))]
    except ImportError as error:
        raise UserError(f"{url} cannot be opened: {first_line(error)}.") from error
    except Exception as error:  # each place has its own
        raise UserError(f"{url} cannot be reached ({first_line(error)}).") from error
    if not paths:
        folder, why = (url.rpartition("/")[0], "") if pattern else (url.rstrip("/"), _why_not(system, path))
        raise UserError(
            f"There are no files at {url}{why}; name a file, a folder or a pattern such as {folder}/*.jsonl."
        )
    files = {printable(found.strip("/")): RemoteFile(system, found) for found in sorted(paths)}
    if len(files) < len(paths):
        raise UserError(f"Two files at {url} have names that look the same; rename one of them.")
    return files


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _why_not(system: Any, path: str) -> str:
    """Why there is nothing, where a place hides it while it looks for files."""
    try:
        system.info(path)
    except Exception as error:
        return "" if error.__cause__ is None else f" ({first_line(error.__cause__)})"
    return ""


def remote_key(rules: int, files: dict[str, RemoteFile]) -> str:
    """A digest of the names, and of what the place itself says of each file: sizes, times or checksums.

    Raises `UserError` if the place no longer answers.
    """
    digest = hashlib.sha256(str(rules).encode())
    for name, file in files.items():
        try:
            digest.update(f"{name}\0{_version(file)}\0".encode())
        except Exception as error:  # each place has its own
            raise UserError(f"{file} cannot be reached ({first_line(error)}).") from error
    return digest.hexdigest()


def _version(file: RemoteFile) -> str:
    """What changes when a file does. fsspec takes files of the web for unchanging; of those of which their server says
    no more than the size, the content has to be read."""
    file.system.invalidate_cache()
    if not set(WEB) & {file.system.protocol, *file.system.protocol}:
        return str(file.system.ukey(file.path))
    told = file.system.info(file.path)
    marks = {name: told[name] for name in MARKS if name in told}
    if marks:
        return str([told.get("size"), marks])
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
