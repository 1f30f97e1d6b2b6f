"""Where several servers keep the same sessions: the interface, and a folder.

    FOLDER/ab/sess_ab….state    the state, and what is known of the session, in one file that is replaced as a whole
    FOLDER/ab/sess_ab….lock     locked by the server that continues the session
    FOLDER/names/SHA256         the id of the session of a name

A lock of the file system ends with the process that holds it, however that ends; so a server that was killed leaves no
session locked. All methods block; they may be called in any thread.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dyadlm.errors import UserError
from dyadlm.files import make_folder
from dyadlm.serve.session_record import ID, ID_PREFIX, NAME, SUFFIX, known_of

# A name without a session belongs to a server that is about to write it, for so many seconds at most.
NAME_SECONDS = 60.0


class Stored(NamedTuple):
    """A session as it is stored. known: as `ServedSession.known` told it. used: seconds since 1970. nbytes: stored."""

    known: Mapping[str, Any]
    used: float
    nbytes: int


class ClaimLost(Exception):
    """The claim had run out before the session was written, so that nothing was."""


class Claim(Protocol):
    """The right to change a session, which one server has at a time. lease: seconds after which it has to be renewed;
    None: it lasts as long as the process."""

    lease: float | None

    def renew(self) -> None: ...

    def release(self) -> None: ...


class Storage(Protocol):
    """What sessions are shared through. Raises `OSError` where it cannot be reached, or has no room."""

    def find(self, key: str) -> Stored | None:
        """By id or name."""
        ...

    def all(self) -> list[Stored]: ...

    def claim(self, session_id: str) -> Claim | None:
        """None while another server, or another request of this one, has the claim."""
        ...

    def take_name(self, name: str, session_id: str) -> bool:
        """Let a name stand for a session that is written within `NAME_SECONDS`; whether it was free."""
        ...

    def reading(self, session_id: str) -> AbstractContextManager[Path]:
        """A file to read the session from; `FileNotFoundError` if there is none."""
        ...

    def writing(self, known: Mapping[str, Any], claim: Claim) -> AbstractContextManager[Path]:
        """A file to write the session to; it counts when the block has ended. Raises `ClaimLost`."""
        ...

    def used(self, known: Mapping[str, Any]) -> None:
        """The session was used now, and not changed."""
        ...

    def delete(self, known: Mapping[str, Any]) -> None:
        """Delete a session that this server has the claim of."""
        ...

    def close(self) -> None: ...


class FileClaim:
    """A lock on a file of its own, which is removed with the session."""

    lease: float | None = None

    def __init__(self, descriptor: int, path: Path):
        self._descriptor, self._path = descriptor, path

    def renew(self) -> None:
        """A lock of the file system needs nothing."""

    def release(self) -> None:
        try:
            if not self._path.with_suffix(SUFFIX).exists():
                self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


class FolderStorage:
    """A folder that all servers see. Raises `UserError` where its file system knows no locks, or where a server has the
    folder to itself."""

    def __init__(self, folder: Path):
        make_folder(folder)
        self._folder, self._seen = folder, dict[Path, tuple[tuple[int, ...], Mapping[str, Any] | None]]()
        self._open = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._open, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"A server that was started without --shared keeps its sessions in {folder}; end it first."
            raise UserError(message) from error
        except OSError as error:
            message = f"The file system of {folder} knows no locks ({error.strerror}); share sessions in Redis instead."
            raise UserError(message) from error

    def find(self, key: str) -> Stored | None:
        if not ID.fullmatch(key):
            if not NAME.fullmatch(key):
                return None
            try:
                key = self._name(key).read_bytes().decode(errors="replace")
            except FileNotFoundError:
                return None
        return self._stored(self._path(key)) if ID.fullmatch(key) else None

    def all(self) -> list[Stored]:
        paths = list(self._folder.glob(f"??/{ID_PREFIX}*{SUFFIX}"))
        found = [stored for path in paths if (stored := self._stored(path)) is not None]
        seen = self._seen  # other threads may count, too
        self._seen = {path: seen[path] for path in paths if path in seen}
        return found

    def claim(self, session_id: str) -> FileClaim | None:
        path = self._path(session_id).with_suffix(".lock")
        descriptor = self._locked(path)
        return None if descriptor is None else FileClaim(descriptor, path)

    def take_name(self, name: str, session_id: str) -> bool:
        path = self._name(name)
        descriptor = self._locked(path)
        if descriptor is None:
            return False
        try:
            found = os.fstat(descriptor)
            fresh = found.st_size > 0 and time.time() - found.st_mtime < NAME_SECONDS
            if fresh or self.find(name) is not None:
                return False
            os.ftruncate(descriptor, 0)
            os.write(descriptor, session_id.encode())
            return True
        finally:
            os.close(descriptor)

    @contextmanager
    def reading(self, session_id: str) -> Iterator[Path]:
        path = self._path(session_id)
        if not path.is_file():
            raise FileNotFoundError(path)
        yield path

    @contextmanager
    def writing(self, known: Mapping[str, Any], claim: Claim) -> Iterator[Path]:
        yield self._path(known["id"])  # whoever writes states does so atomically

    def used(self, known: Mapping[str, Any]) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._path(known["id"]))

    def delete(self, known: Mapping[str, Any]) -> None:
        if known["name"] is not None:  # before the session: while there is one, nobody else takes its name
            self._release_name(known["name"], known["id"])
        self._path(known["id"]).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._open)

    def _path(self, session_id: str) -> Path:
        assert ID.fullmatch(session_id)
        return self._folder / session_id[5:7] / (session_id + SUFFIX)

    def _name(self, name: str) -> Path:
        """Names are no part of a path."""
        return self._folder / "names" / hashlib.sha256(name.encode()).hexdigest()

    def _release_name(self, name: str, session_id: str) -> None:
        """A name that somebody asks for just now stays: without its session it is free."""
        path = self._name(name)
        descriptor = self._locked(path)
        if descriptor is None:
            return
        try:
            if path.read_bytes() in (b"", session_id.encode()):
                path.unlink()
        finally:
            os.close(descriptor)

    def _locked(self, path: Path) -> int | None:
        """A file that is locked, made where it is missing; None while another one has locked it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had the lock before may have removed the file; then others would lock another one.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _stored(self, path: Path) -> Stored | None:
        try:
            found = path.stat()
        except OSError:
            return None
        sign = (found.st_ino, found.st_size, found.st_mtime_ns)
        seen = self._seen.get(path)
        if seen is None or seen[0] != sign:
            seen = self._seen[path] = sign, known_of(path)
        known = seen[1]
        if known is None or known["id"] + SUFFIX != path.name:
            return None
        return Stored(known, max(known["used"], found.st_mtime), found.st_size)


def shared_storage(place: str | Path) -> Storage:
    """A folder, or Redis where the place begins with `redis://` or `rediss://`; its password may stand in
    DYADLM_REDIS_PASSWORD. Raises `UserError` if it cannot be used."""
    if is_redis(place):
        from dyadlm.serve.redis_storage import RedisStorage

        return RedisStorage(str(place), os.environ.get("DYADLM_REDIS_PASSWORD"))
    return FolderStorage(Path(place))


def is_redis(place: str | Path) -> bool:
    """Whether sessions are in Redis there."""
    return str(place).startswith(("redis://", "rediss://"))
