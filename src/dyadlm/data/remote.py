"""Text in other places than the disk: whatever fsspec opens, such as s3://, gs://, hf://, http:// and memory://."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
from fsspec.core import has_magic

from dyadlm.data.formats import BLOCK_BYTES
from dyadlm.errors import UserError, first_line
from dyadlm.files import printable

WEB_VERSION = ("size", "ETag", "Last-Modified", "Content-MD5", "Digest")


@dataclass(frozen=True)
class RemoteFile:
    """A file of an fsspec file system, as far as reading needs one. path: as this system names it."""

    system: Any
    path: str

    def open(self, mode: str) -> BinaryIO:
        return io.BufferedReader(self.system.open(self.path, mode), BLOCK_BYTES)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def __str__(self) -> str:
        return str(self.system.unstrip_protocol(self.path))


def is_remote(argument: str) -> bool:
    """Whether a source is named by a URL."""
    return "://" in argument


def remote_files(url: str) -> dict[str, RemoteFile]:
    """The files behind a URL by their names, in order: of one file, of a folder (all below it), or of a pattern.

    Raises:
        UserError: there are none, two names look the same, the place cannot be reached, or its package is not
            installed.
    """
    try:
        system, path = fsspec.url_to_fs(url)
        if has_magic(path):
            paths = [found for found in system.glob(path) if system.isfile(found)]
        else:
            paths = [path] if system.isfile(path) else system.find(path)
    except ImportError as error:
        raise UserError(f"{url} cannot be opened: {first_line(error)}.") from error
    except Exception as error:  # each place has its own
        raise UserError(f"{url} cannot be reached ({first_line(error)}).") from error
    if not paths:
        raise UserError(f"There are no files at {url}; name a file, a folder or a pattern such as {url}/*.jsonl.")
    files = {printable(found.strip("/")): RemoteFile(system, found) for found in sorted(paths)}
    if len(files) < len(paths):
        raise UserError(f"Two files at {url} have names that look the same; rename one of them.")
    return files


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
    """What changes when a file does. fsspec takes files of the web for constant, so that their headers are asked."""
    key = str(file.system.ukey(file.path))
    if "http" not in file.system.protocol:
        return key
    told = file.system.info(file.path)
    return " ".join([key, *(str(told.get(header)) for header in WEB_VERSION)])
