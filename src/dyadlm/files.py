"""Writing files so that neither a crash nor a full disk costs what was there before."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dyadlm.errors import UserError

STAGING_PREFIX = ".staging-"  # in folders that are all ours
# Anywhere: nothing of other programs may be taken for a leftover.
OWN_PREFIX = STAGING_PREFIX + "dyadlm-"
# Workers of a process that was killed hold its lock until they notice, some seconds later.
LOCK_PATIENCE_SECONDS = 10.0
LEFTOVER_SECONDS = 60.0
# Errors of the system that say that no more can be written to a disk.
FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it there: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    collect_leftovers(path.parent)
    descriptor, name = tempfile.mkstemp(prefix=OWN_PREFIX, dir=path.parent)
    staged = Path(name)
    try:
        with full_disk_named(path), os.fdopen(descriptor, "wb") as file:
            _lock(descriptor)  # until it is closed, so that nobody takes it for a leftover
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o666 & ~_umask())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a staging name beside `path`; it takes its name only when the block ends well.

    `path` must not exist, or must be an empty folder. On any error the staging folder is removed.
    Raises `UserError` if there can be no folder there.
    """
    make_folder(path.parent)
    collect_leftovers(path.parent)
    try:
        staging = Path(tempfile.mkdtemp(prefix=OWN_PREFIX, dir=path.parent))
    except OSError as error:
        raise UserError(f"Nothing can be written to {path.parent} ({error}); choose another place.") from error
    try:
        staging.chmod(0o777 & ~_umask())
        with full_disk_named(path), in_use(staging):
            yield staging
            follow_umask(staging)
            for file in staging.rglob("*"):
                sync(file)
            require_new(path, "what was written meanwhile")
            staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(path.parent)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Where the disk is full, the `OSError` of the block names the path that is written to. Libraries leave it out,
    name a staging folder, or have errors of their own."""
    try:
        yield
    except Exception as error:
        number, place = _full(error)
        if number and (not place or OWN_PREFIX in place):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _full(error: Exception) -> tuple[int, str]:
    """The number of the system's error where it is one of a full disk, else 0, and the place that it names."""
    if isinstance(error, OSError):
        return (error.errno if error.errno in FULL else 0), str(error.filename2 or error.filename or "")
    told = re.search(r"\(os error (\d+)\)", str(error))  # of libraries in Rust: tokenizers, safetensors
    return (int(told[1]) if told and int(told[1]) in FULL else 0), ""


@contextmanager
def in_use(staging: Path) -> Iterator[None]:
    """Hold the lock by which `collect_leftovers` knows that a staging folder is in use."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def follow_umask(folder: Path) -> None:
    """Give files the modes that new files of this user have; libraries write some for their owner alone."""
    mask = _umask()
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def collect_leftovers(folder: Path) -> None:
    """Remove what killed commands left in a folder under staging names. A command that lives holds a lock on its own;
    whatever is younger than `LEFTOVER_SECONDS` may be about to be locked."""
    for path in folder.glob(f"{OWN_PREFIX}*"):
        try:
            if path.is_symlink() or time.time() - path.stat().st_mtime < LEFTOVER_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file or folder, unless another process has; whether it is locked now. Some file systems cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there. Raises `UserError` if there can be none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"There can be no folder {path} ({error}); choose another place.") from error


@contextmanager
def locked(folder: Path, taken: str = "", patience: float | None = None) -> Iterator[None]:
    """Keep other processes that ask for this lock out of a folder, made if need be and removed if it stays empty.

    The lock leaves no file and ends with the process, however that ends. Raises `UserError` if another process
    has it after some seconds (patience); taken: what it says then. Where the file system knows no locks, nothing is
    locked.
    """
    made = not folder.exists()
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + (LOCK_PATIENCE_SECONDS if patience is None else patience)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    work = f"Another process is at work in {folder}; wait until it has ended, or choose another place."
                    raise UserError(taken or work) from error
                time.sleep(0.1)
            except OSError:
                break
            else:
                break
        yield
    finally:
        with suppress(FileNotFoundError):  # somebody has removed it, which is for the block to say
            if made and not any(folder.iterdir()):
                folder.rmdir()
        os.close(descriptor)


def require_new(path: Path, what: str) -> None:
    """Raise `UserError` if `path` already holds something, so that no output is overwritten silently.

    Devices, pipes and links to nothing are held by something, too.
    """
    if (path.exists() or path.is_symlink()) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another place for {what} or remove it first.")


def require_writable(path: Path, what: str) -> None:
    """Raise `UserError` unless a file can be written there, before the work whose result it is to hold.

    Folders that are not there yet are not made.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for {what}.")
    place = path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"There can be no folder {path.parent} ({place} is a file); choose another place.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"Nothing can be written to {path.parent} ({error}); choose another place.") from error


def printable(text: str) -> str:
    """A name or text of any origin as a line that can be shown and stored: what is no UTF-8, and what would move the
    cursor or change a terminal, is escaped."""
    readable = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in readable)


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
