"""Sessions that several servers share, so that any of them continues any session behind any balancer of HTTP.

    request ──► find ──► claim, or 409 ──► the state, as it is stored now ──► read and write ──► stored ──► answered

Nothing that a client was told is in the memory of one server alone: a state is stored before the answer ends. States
that were used last stay in memory, and are used again where their version is the stored one.
"""

import asyncio
import logging
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from anyio import CancelScope

from dyadlm.errors import UserError
from dyadlm.serve.errors import ApiError
from dyadlm.serve.rows import Row
from dyadlm.serve.served import ServedModel
from dyadlm.serve.session_record import (
    ID_PREFIX,
    TAIL,
    ServedSession,
    is_text,
    known_of,
    name_taken,
    not_found,
    require_valid_name,
    session_busy,
)
from dyadlm.serve.session_storage import Claim, ClaimLost, Storage, Stored
from dyadlm.serve.settings import Limits

COUNT_SECONDS = 10.0  # between two counts of all sessions
Result = TypeVar("Result")

log = logging.getLogger("dyadlm.serve")


class SharedSessions:
    """As `SessionStore`, of what other servers may change at any time: a `ServedSession` is of one request, and stands
    where the session stood when it was found."""

    def __init__(self, storage: Storage, models: Mapping[str, ServedModel], limits: Limits):
        self._storage, self._limits = storage, limits
        own = [model for model in models.values() if model.sessions]
        self._by_identity = {model.identity: model for model in reversed(own)}
        self._by_both = {(model.name, model.identity): model for model in own}
        self._rows: OrderedDict[str, tuple[str, Row, int]] = OrderedDict()  # by id: version, row, bytes
        self._claims: dict[str, Claim] = {}
        self.memory_bytes = self.disk_bytes = self._count = 0
        self._counted = 0.0
        self._received = tempfile.TemporaryDirectory(prefix="dyadlm-")

    def __len__(self) -> int:
        return self._count

    async def all(self) -> list[ServedSession]:
        """Those of models that are served here, the one used last at first."""
        found = [self._session(stored) for stored in await self._ask(self._storage.all)]
        return sorted((one for one in found if one is not None), key=lambda session: -session.used)

    async def find(self, key: str) -> ServedSession:
        """By id or name. Raises `ApiError` if there is none, or it is of a model that is not served here."""
        stored = await self._ask(self._storage.find, key)
        session = None if stored is None else self._session(stored)
        if session is None:
            raise not_found(key)
        return session

    async def require_name(self, name: str | None) -> None:
        """Raise `ApiError` for a name that is taken, or is none."""
        if name is None:
            return
        require_valid_name(name)
        if await self._ask(self._storage.find, name) is not None:
            raise name_taken(name)

    async def require_room(self) -> None:
        """Raise `ApiError` if no session can be added. All are counted every few seconds."""
        if self._count >= self._limits.sessions:
            message = "The servers keep no more sessions; delete some, or start them with a larger --max-sessions."
            raise ApiError(503, message, code="too_many_sessions")
        if self.disk_bytes >= self._limits.session_disk:
            message = "There is no room for more sessions; delete some, or start servers with a larger --session-disk."
            raise ApiError(503, message, code="sessions_full")

    async def add(
        self, model: ServedModel, row: Row, name: str | None, parent: str | None, tail: str, ttl: float | None = None
    ) -> ServedSession:
        """A new session that stands where the row stands, stored. Raises `ApiError` as the methods above do."""
        await self.require_room()
        await self.require_name(name)
        now = time.time()
        ttl = self._limits.ttl if ttl is None else min(ttl, self._limits.ttl)
        key = ID_PREFIX + secrets.token_urlsafe(16)
        numbers = (row.tokens, model.rows.nbytes(row), tail[-TAIL:], now, now, ttl)
        session = ServedSession(key, model, name, parent, row, *numbers, saved=True)
        async with self._claimed(key):
            if name is not None and not await self._ask(self._storage.take_name, name, key):
                raise name_taken(name)
            await self._write(session)
        self._count += 1
        self.disk_bytes += session.nbytes
        return session

    @asynccontextmanager
    async def continuing(self, session: ServedSession) -> AsyncIterator[Row]:
        """Where a session stands, while no other request to any server may move it. Raises `ApiError` while one does,
        or if the session has begun or ended since it was found."""
        async with self._claimed(session.id):
            stored = await self._ask(self._storage.find, session.id)
            if stored is None:
                raise not_found(session.id)
            if bool(stored.known["tokens"]) != bool(session.tokens):
                raise session_busy()  # its prompt was read as that of a session with nothing before it
            self._refresh(session, stored.known)
            yield await self.row_of(session)

    async def row_of(self, session: ServedSession) -> Row:
        """Where a session stands now; copy it to read on. Raises `ApiError` if its file is damaged."""
        kept = self._rows.get(session.id)
        if kept is None or kept[0] != session.version or not session.version:
            known, row = await self._ask(self._load, session)
            self._refresh(session, known)
            kept = (session.version, row, session.model.rows.nbytes(row))
            self._keep(session.id, kept)
        session.row = kept[1]
        if session.id in self._rows:  # unless memory is too small for it
            self._rows.move_to_end(session.id)
        session.used = time.time()
        await self._ask(self._storage.used, session.known())
        return session.row

    async def commit(self, session: ServedSession, row: Row, text: str) -> None:
        """Let a session stand where the row stands, and store it; within `continuing`. text: what was read since.
        Raises `ApiError` where it cannot be stored; it stands where it stood, then."""
        session.row, session.tokens, session.nbytes = row, row.tokens, session.model.rows.nbytes(row)
        session.tail = (session.tail + text)[-TAIL:]
        session.used = time.time()
        await self._write(session)

    async def save(self, session: ServedSession) -> None:
        """It is stored already."""

    async def delete(self, session: ServedSession) -> None:
        """Forget a session. Raises `ApiError` while a request continues it."""
        async with self._claimed(session.id):
            await to_the_end(self._ask(self._storage.delete, session.known()))
        self._drop(session.id)
        self._count = max(0, self._count - 1)

    async def tidy(self) -> None:
        """Count all sessions every few seconds, and delete those that have expired."""
        if time.monotonic() - self._counted < COUNT_SECONDS:
            return
        self._counted = time.monotonic()
        found = await self._ask(self._storage.all)
        kept = [stored for stored in found if not self._expired(stored)]
        self._count, self.disk_bytes = len(kept), sum(stored.nbytes for stored in kept)
        for expired in (stored.known["id"] for stored in found if self._expired(stored)):
            with suppress(ApiError):  # it is in use
                async with self._claimed(expired):
                    again = await self._ask(self._storage.find, expired)
                    if again is not None and self._expired(again):
                        await to_the_end(self._ask(self._storage.delete, again.known))

    async def close(self) -> None:
        """All is stored."""
        self._storage.close()
        self._received.cleanup()

    def staging(self) -> Path:
        """A path for a file that is being received."""
        return Path(self._received.name) / secrets.token_hex(16)

    @asynccontextmanager
    async def _claimed(self, session_id: str) -> AsyncIterator[None]:
        """The right to change a session. Raises `ApiError` while another request has it, here or elsewhere."""
        if session_id in self._claims:
            raise session_busy()
        claiming = asyncio.ensure_future(self._ask(self._storage.claim, session_id))
        try:
            claim = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            claiming.add_done_callback(_let_go)
            raise
        if claim is None:
            raise session_busy()
        self._claims[session_id] = claim
        renewing = None if claim.lease is None else asyncio.create_task(_renewed(claim, claim.lease / 3))
        try:
            yield
        finally:
            del self._claims[session_id]
            if renewing is not None:
                renewing.cancel()
            await to_the_end(asyncio.to_thread(claim.release))

    async def _write(self, session: ServedSession) -> None:
        claim, row = self._claims[session.id], session.row
        assert row is not None
        session.version = secrets.token_hex(8)
        about, known = session.about(), session.known()

        def write() -> None:
            with self._storage.writing(known, claim) as path:
                session.model.rows.save(row, path, about)

        try:
            await to_the_end(self._ask(write))
        except ClaimLost as error:
            message = "The server was stopped for too long, so that another one may have continued the session."
            raise ApiError(409, message, param="session", code="session_busy", retry_after=1) from error
        self._keep(session.id, (session.version, row, session.nbytes))

    async def _ask(self, work: Callable[..., Result], *given: Any) -> Result:
        """What the storage answers. Raises `ApiError` where it does not."""
        try:
            return await asyncio.to_thread(work, *given)
        except OSError as error:
            log.error("The storage of sessions failed: %s", error.__cause__ or error)
            message = f"The storage of sessions failed ({error.strerror})."
            raise ApiError(503, message, code="sessions_unavailable", retry_after=5) from error

    def _load(self, session: ServedSession) -> tuple[Mapping[str, Any], Row]:
        """What is known of a session, and its row, as they are stored now."""
        try:
            with self._storage.reading(session.id) as path:
                known, row = known_of(path), session.model.rows.load(path)
                while known != (again := known_of(path)):  # another server replaced the file meanwhile
                    known, row = again, session.model.rows.load(path)
            if known is None:
                raise UserError("The file says nothing of its session.")
        except FileNotFoundError as error:
            raise not_found(session.id) from error
        except UserError as error:
            message = "The file of this session is damaged; delete the session."
            raise ApiError(409, message, param="session", code="session_damaged") from error
        row.tokens = known["tokens"]
        return known, row

    def _session(self, stored: Stored) -> ServedSession | None:
        """None where it has expired, or is of a model that is not served here."""
        known = stored.known
        model = self._by_both.get((known["model"], known["identity"]), self._by_identity.get(known["identity"]))
        if model is None or self._expired(stored) or not is_text(known["tail"]):
            return None
        numbers = (known["tokens"], known["nbytes"], known["tail"], known["created"], stored.used, known["ttl"])
        session = ServedSession(known["id"], model, known["name"], known["parent"], None, *numbers, saved=True)
        session.version = known.get("version", "")
        return session

    def _refresh(self, session: ServedSession, known: Mapping[str, Any]) -> None:
        session.tokens, session.nbytes, session.tail = known["tokens"], known["nbytes"], known["tail"]
        session.version = known.get("version", "")

    def _expired(self, stored: Stored) -> bool:
        return bool(stored.used + stored.known["ttl"] < time.time())

    def _keep(self, session_id: str, kept: tuple[str, Row, int]) -> None:
        """Keep a row in memory, of which those used longest ago leave."""
        self._drop(session_id)
        self._rows[session_id] = kept
        self.memory_bytes += kept[2]
        while self.memory_bytes > self._limits.session_memory and self._rows:
            self._drop(next(iter(self._rows)))

    def _drop(self, session_id: str) -> None:
        if (kept := self._rows.pop(session_id, None)) is not None:
            self.memory_bytes -= kept[2]


async def to_the_end(work: Awaitable[Result]) -> Result:
    """What some work returns, which ends even where the request is given up meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with CancelScope(shield=True):
            await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("What a request that was given up had begun has failed: %s", error)
        raise


async def _renewed(claim: Claim, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        try:
            await asyncio.to_thread(claim.renew)
        except Exception as error:  # the write will tell whether the claim still holds
            log.warning("The claim of a session was not renewed: %s", error)


def _let_go(claiming: "asyncio.Future[Claim | None]") -> None:
    """Of a claim that nobody waits for any more."""
    if not claiming.cancelled() and claiming.exception() is None and (claim := claiming.result()) is not None:
        claiming.get_loop().run_in_executor(None, claim.release)  # which may wait for another machine
