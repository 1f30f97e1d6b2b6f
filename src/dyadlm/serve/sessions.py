"""Sessions: what a model has read, kept under an id between requests, in memory and on disk.

    create ──► memory ◄──────────── used again ────────────┐
                 │  changed for some seconds, or asked for │
                 └──► written to disk ──► memory is short ─┴► on disk alone ──► unused for its time to live: deleted

A session is one file, written atomically: the state of the model, the logits of the next token, and what is known of
the session. Names are never part of a path. All methods belong to the thread of the event loop; files are read and
written in other threads.
"""

import asyncio
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dyadlm.errors import UserError
from dyadlm.files import collect_leftovers
from dyadlm.serve.errors import ApiError
from dyadlm.serve.rows import Row
from dyadlm.serve.served import ServedModel
from dyadlm.serve.settings import Limits
from dyadlm.state_file import BESIDE

ID_PREFIX = "sess_"
ID = re.compile(r"^sess_[A-Za-z0-9_-]{22}$")
NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
# Beside the state in a file: what is known of the session, as the bytes of JSON.
ABOUT = "serve.session"
SUFFIX = ".state"
TAIL = 200  # characters of the text that are shown

log = logging.getLogger("dyadlm.serve")


@dataclass(eq=False)
class ServedSession:
    """row: as the session stands; None while it is on disk alone. It is never changed, only replaced. parent: the
    session that it was forked from. tail: the end of what was read. created, used: seconds since 1970. ttl: seconds for
    which it is kept unused. saved: whether the file is as the row is. busy: whether a request continues it.
    """

    id: str
    model: ServedModel
    name: str | None
    parent: str | None
    row: Row | None
    tokens: int
    nbytes: int
    tail: str
    created: float
    used: float
    ttl: float
    saved: bool = False
    busy: bool = False
    deleted: bool = False
    changed: float = 0.0
    file_bytes: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def expires(self) -> float:
        return self.used + self.ttl

    def described(self) -> dict[str, Any]:
        """For answers."""
        return {
            "id": self.id,
            "object": "session",
            "name": self.name,
            "model": self.model.name,
            "tokens": self.tokens,
            "state_bytes": self.nbytes,
            "created": round(self.created, 3),
            "used": round(self.used, 3),
            "expires": round(self.expires, 3),
            "place": "disk" if self.row is None else "memory",
            "saved": self.saved,
            "parent": self.parent,
            "tail": self.tail,
        }

    def about(self) -> dict[str, np.ndarray]:
        """What is written beside the state."""
        known = {
            "id": self.id,
            "name": self.name,
            "parent": self.parent,
            "model": self.model.name,
            "identity": self.model.identity,
            "tokens": self.tokens,
            "nbytes": self.nbytes,
            "tail": self.tail,
            "created": self.created,
            "used": self.used,
            "ttl": self.ttl,
        }
        return {ABOUT: np.frombuffer(json.dumps(known).encode(), np.uint8)}


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

    def all(self) -> list[ServedSession]:
        """Those that have not expired, the one used last at first."""
        self._expire()
        return sorted(self._sessions.values(), key=lambda session: -session.used)

    def find(self, key: str) -> ServedSession:
        """By id or name. Raises `ApiError` if there is none."""
        self._expire()
        session = self._sessions.get(self._names.get(key, key))
        if session is None:
            raise ApiError(404, f"There is no session {key[:80]!r}.", param="session", code="session_not_found")
        return session

    def require_name(self, name: str | None) -> None:
        """Raise `ApiError` for a name that is taken, or is none."""
        if name is None:
            return
        if not NAME.fullmatch(name) or name.startswith(ID_PREFIX):
            message = (
                f"A name has 1 to 64 letters, digits, dots, dashes or underscores, and does not begin with {ID_PREFIX}."
            )
            raise ApiError(400, message, param="name")
        if name in self._names:
            raise ApiError(409, f"There is a session {name!r} already.", param="name", code="name_taken")

    def require_room(self) -> None:
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

    def add(
        self, model: ServedModel, row: Row, name: str | None, parent: str | None, tail: str, ttl: float | None = None
    ) -> ServedSession:
        """A new session that stands where the row stands. Raises `ApiError` as the methods above do."""
        self.require_room()
        self.require_name(name)
        now = time.time()
        nbytes = model.rows.nbytes(row)
        ttl = self._limits.ttl if ttl is None else min(ttl, self._limits.ttl)
        key = ID_PREFIX + secrets.token_urlsafe(16)
        session = ServedSession(key, model, name, parent, row, row.tokens, nbytes, tail[-TAIL:], now, now, ttl)
        session.changed = time.monotonic()
        self._enter(session)
        self.memory_bytes += nbytes
        return session

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

    def commit(self, session: ServedSession, row: Row, text: str) -> None:
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

    def delete(self, session: ServedSession) -> None:
        """Forget a session, and remove its file."""
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

    async def save_all(self) -> None:
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
            self.delete(session)

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
            known = _about(path)
            if known is None or known["id"] + SUFFIX != path.name or not _is_text(known["tail"]):
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


KINDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "name": (str, type(None)),
    "parent": (str, type(None)),
    "model": (str,),
    "identity": (str,),
    "tokens": (int,),
    "nbytes": (int,),
    "tail": (str,),
    "created": (int, float),
    "used": (int, float),
    "ttl": (int, float),
}


def _about(path: Path) -> dict[str, Any] | None:
    """What a file says of its session, without reading the state; None if it says nothing that can be used."""
    try:
        with safe_open(str(path), framework="np") as file:
            known = json.loads(file.get_tensor(BESIDE + ABOUT).tobytes())
    except (SafetensorError, OSError, ValueError):
        return None
    if not isinstance(known, dict) or any(not isinstance(known.get(key), kinds) for key, kinds in KINDS.items()):
        return None
    fits = ID.fullmatch(known["id"]) and (known["name"] is None or NAME.fullmatch(known["name"]))
    return known if fits else None


def tail_of(path: Path) -> str:
    """The end of what was read, as a file says; empty where it does not. Raises `UserError` if it cannot be sent."""
    known = _about(path)
    if known is None:
        return ""
    if not _is_text(known["tail"]):
        raise UserError(f"{path} holds text that is not Unicode; use a file that a server wrote.")
    return str(known["tail"][-TAIL:])


def _is_text(text: str) -> bool:
    """Whether it can be sent: JSON can spell one half of a pair of surrogates, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
