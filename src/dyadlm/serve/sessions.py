"""Sessions: what a model has read, kept under an id between requests, in memory and on disk.

    create ──► memory ◄──────────── used again ────────────┐
                 │  changed for some seconds, or asked for │
                 └──► written to disk ──► memory is short ─┴► on disk alone ──► unused for its time to live: deleted

A session is one file, written atomically: the state of the model, the logits of the next token, and what is known of
the session. Names are never part of a path. All methods belong to the thread of the event loop; files are read and
written in other threads.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from dyadlm.errors import UserError
from dyadlm.files import collect_leftovers
from dyadlm.serve.errors import ApiError
from dyadlm.serve.rows import Row
from dyadlm.serve.served import ServedModel
from dyadlm.serve.session_record import (
    ID,
    ID_PREFIX,
    SUFFIX,
    TAIL,
    ServedSession,
    is_text,
    known_of,
    name_taken,
    not_found,
    require_valid_name,
    session_busy,
)
from dyadlm.serve.settings import Limits

log = logging.getLogger("dyadlm.serve")


class SessionStore:
    """All sessions of a server. folder: where they are written; what is there at first is taken up again."""

    def __init__(self, folder: Path, models: Mapping[str, ServedModel], limits: Limits):
        self._folder, self._models, self._limits = folder, models, limits
        self._sessions: dict[str, ServedSession] = {}
        self._names: dict[str, str] = {}
        self.memory_bytes = self.disk_bytes = 0
        self._stuck = False  # a session that had to leave memory could not be written
        self._recover()

    def __len__(self) -> int:
        return len(self._sessions)

    async def all(self) -> list[ServedSession]:
        """Those that have not expired, the one used last at first."""
        self._expire()
        return sorted(self._sessions.values(), key=lambda session: -session.used)

    async def find(self, key: str) -> ServedSession:
        """By id or name. Raises `ApiError` if there is none."""
        self._expire()
        session = self._sessions.get(self._names.get(key, key))
        if session is None:
            raise not_found(key)
        return session

    async def require_name(self, name: str | None) -> None:
        """Raise `ApiError` for a name that is taken, or is none."""
        if name is None:
            return
        require_valid_name(name)
        if name in self._names:
            raise name_taken(name)

    async def require_room(self) -> None:
        """Raise `ApiError` if no session can be added."""
        self._expire()
        if len(self._sessions) >= self._limits.sessions:
            message = "The server keeps no more sessions; delete some, or start it with a larger --max-sessions."
            raise ApiError(503, message, code="too_many_sessions")
        if self.disk_bytes + self.memory_bytes >= self._limits.session_disk + self._limits.session_memory:
            message = "The server has no room for more sessions; delete some, or start it with a larger --session-disk."
            raise ApiError(503, message, code="sessions_full")
        if self._stuck and self.memory_bytes > self._limits.session_memory:
            message = "The memory of sessions is full, and they cannot be written to disk; delete some."
            raise ApiError(503, message, code="sessions_full")

    async def add(
        self, model: ServedModel, row: Row, name: str | None, parent: str | None, tail: str, ttl: float | None = None
    ) -> ServedSession:
        """A new session that stands where the row stands. Raises `ApiError` as the methods above do."""
        await self.require_room()
        await self.require_name(name)
        now = time.time()
        nbytes = model.rows.nbytes(row)
        ttl = self._limits.ttl if ttl is None else min(ttl, self._limits.ttl)
        key = ID_PREFIX + secrets.token_urlsafe(16)
        session = ServedSession(key, model, name, parent, row, row.tokens, nbytes, tail[-TAIL:], now, now, ttl)
        session.changed = time.monotonic()
        self._enter(session)
        self.memory_bytes += nbytes
        return session

    @asynccontextmanager
    async def continuing(self, session: ServedSession) -> AsyncIterator[Row]:
        """Where a session stands, while no other request may move it. Raises `ApiError` while another does."""
        if session.busy:
            raise session_busy()
        session.busy = True
        try:
            yield await self.row_of(session)
        finally:
            session.busy = False

    async def row_of(self, session: ServedSession) -> Row:
        """Where a session stands; copy it to read on. Raises `ApiError` if its file is damaged."""
        async with session.lock:
            self._require_alive(session)
            if session.row is None:
                try:
                    row = await asyncio.to_thread(session.model.rows.load, self._path(session))
                except (UserError, OSError) as error:
                    message = "The file of this session is damaged or gone; delete the session."
                    raise ApiError(409, message, param="session", code="session_damaged") from error
                self._require_alive(session)
                row.tokens, session.row = session.tokens, row
                self.memory_bytes += session.nbytes
            session.used = time.time()
            if session.file_bytes:
                with suppress(OSError):
                    os.utime(self._path(session))  # the file tells a new server of a use that changed nothing
            return session.row

    async def commit(self, session: ServedSession, row: Row, text: str) -> None:
        """Let a session stand where the row stands. text: what was read since."""
        if session.deleted:
            return
        if session.row is not None:
            self.memory_bytes -= session.nbytes
        session.row, session.tokens, session.nbytes = row, row.tokens, session.model.rows.nbytes(row)
        self.memory_bytes += session.nbytes
        session.tail = (session.tail + text)[-TAIL:]
        session.saved, session.used, session.changed = False, time.time(), time.monotonic()

    async def save(self, session: ServedSession) -> None:
        """Write a session to disk, where it is not there as it is. Raises `ApiError` if the disk is full."""
        async with session.lock:
            self._require_alive(session)
            row = session.row
            if session.saved or row is None:
                return
            path, about = self._path(session), session.about()
            # A state keeps its size, and the new file takes the place of the one before.
            expected = session.file_bytes or session.nbytes
            if self.disk_bytes - session.file_bytes + expected > self._limits.session_disk:
                message = "The server has no room on disk for more sessions; delete some, or raise --session-disk."
                raise ApiError(503, message, code="disk_full")
            try:
                await asyncio.to_thread(session.model.rows.save, row, path, about)
            except OSError as error:
                raise ApiError(503, f"The session cannot be written ({error.strerror}).", code="disk_full") from error
            if session.deleted:
                path.unlink(missing_ok=True)
                return
            self.disk_bytes -= session.file_bytes
            session.file_bytes = path.stat().st_size
            self.disk_bytes += session.file_bytes
            session.saved = session.row is row

    async def delete(self, session: ServedSession) -> None:
        """Forget a session, and remove its file."""
        self._forget(session)

    def _forget(self, session: ServedSession) -> None:
        if session.deleted:
            return
        session.deleted = True
        self._sessions.pop(session.id, None)
        if session.name is not None:
            self._names.pop(session.name, None)
        if session.row is not None:
            self.memory_bytes -= session.nbytes
            session.row = None
        self.disk_bytes -= session.file_bytes
        self._path(session).unlink(missing_ok=True)

    async def tidy(self) -> None:
        """Write what changed some time ago, let memory go down to its bound, delete what has expired."""
        self._expire()
        old = time.monotonic() - self._limits.autosave
        for session in list(self._sessions.values()):
            if self._limits.autosave and not session.saved and session.changed < old:
                await self._try_to_save(session)
        if self.memory_bytes <= self._limits.session_memory:
            return
        failed = False
        for session in sorted(self._sessions.values(), key=lambda session: session.used):
            if session.row is not None and not session.busy:
                failed |= not await self._try_to_save(session)
                if session.saved and session.row is not None:  # both may have changed meanwhile
                    session.row = None
                    self.memory_bytes -= session.nbytes
            if self.memory_bytes <= self._limits.session_memory:
                break
        self._stuck = failed

    async def close(self) -> None:
        """Write all that is not on disk."""
        for session in list(self._sessions.values()):
            await self._try_to_save(session)

    def staging(self) -> Path:
        """A path for a file that is being received."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"received-{secrets.token_hex(16)}"

    async def _try_to_save(self, session: ServedSession) -> bool:
        """Whether it did not fail."""
        try:
            await self.save(session)
        except ApiError as error:
            if error.status != 404:
                log.warning("A session was not saved: %s", error.message)
                session.changed = time.monotonic()  # try again later
                return False
        return True

    def _require_alive(self, session: ServedSession) -> None:
        if session.deleted:
            raise ApiError(404, "The session was deleted.", param="session", code="session_not_found")

    def _expire(self) -> None:
        now = time.time()
        for session in [one for one in self._sessions.values() if one.expires < now and not one.busy]:
            self._forget(session)

    def _enter(self, session: ServedSession) -> None:
        self._sessions[session.id] = session
        if session.name is not None:
            self._names[session.name] = session.id

    def _path(self, session: ServedSession) -> Path:
        assert ID.fullmatch(session.id)
        return self._folder / session.id[5:7] / (session.id + SUFFIX)

    def _recover(self) -> None:
        """Take up the sessions of an earlier server, for the models that are served now."""
        for folder in self._folder.glob("??"):
            collect_leftovers(folder)
        for received in self._folder.glob("received-*"):
            received.unlink(missing_ok=True)
        lost = 0
        own = [model for model in self._models.values() if model.sessions]
        by_identity = {model.identity: model for model in reversed(own)}
        by_both = {(model.name, model.identity): model for model in own}
        for path in self._folder.glob(f"??/{ID_PREFIX}*{SUFFIX}"):
            known = known_of(path)
            if known is None or known["id"] + SUFFIX != path.name or not is_text(known["tail"]):
                log.warning("%s is no session that can be read; it is passed over.", path)
                continue
            model = by_both.get((known["model"], known["identity"]), by_identity.get(known["identity"]))
            if model is None:
                lost += 1
                continue
            name = known["name"] if known["name"] not in self._names else None
            used = max(known["used"], path.stat().st_mtime)
            numbers = (known["tokens"], known["nbytes"], known["tail"], known["created"], used, known["ttl"])
            session = ServedSession(known["id"], model, name, known["parent"], None, *numbers, saved=True)
            session.file_bytes = path.stat().st_size
            self.disk_bytes += session.file_bytes
            self._enter(session)
        if lost:
            log.warning("%d saved sessions are of models that are not served now; they stay on disk.", lost)
