"""What the routes share: the models and the sessions."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from dyadlm.serve.errors import ApiError
from dyadlm.serve.metrics import Metrics
from dyadlm.serve.rows import Row
from dyadlm.serve.served import ServedModel
from dyadlm.serve.session_record import ServedSession
from dyadlm.serve.settings import Limits


class Sessions(Protocol):
    """The sessions of a server: `SessionStore`, or `SharedSessions`, where each method is described."""

    memory_bytes: int
    disk_bytes: int

    def __len__(self) -> int: ...

    async def all(self) -> list[ServedSession]: ...

    async def find(self, key: str) -> ServedSession: ...

    async def require_name(self, name: str | None) -> None: ...

    async def require_room(self) -> None: ...

    async def add(
        self, model: ServedModel, row: Row, name: str | None, parent: str | None, tail: str, ttl: float | None = None
    ) -> ServedSession: ...

    def continuing(self, session: ServedSession) -> AbstractAsyncContextManager[Row]: ...

    async def row_of(self, session: ServedSession) -> Row: ...

    async def commit(self, session: ServedSession, row: Row, text: str) -> None: ...

    async def save(self, session: ServedSession) -> None: ...

    async def delete(self, session: ServedSession) -> None: ...

    async def tidy(self) -> None: ...

    async def close(self) -> None: ...

    def staging(self) -> Path: ...


class Server:
    """What the routes share. models: by name; the first answers requests that name none.

    Routes of other parts are added in `create_app`, with `app.include_router`.
    """

    def __init__(self, models: Mapping[str, ServedModel], store: Sessions, limits: Limits):
        self.models, self.store, self.limits = models, store, limits
        self.metrics = Metrics(self)

    def model_of(self, name: str | None) -> ServedModel:
        """The model that a request names. Raises `ApiError` if it is not served."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"There is no model {name[:80]!r} here; GET /v1/models lists those there are."
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]

    async def session_of(self, key: str, model: str | None = None) -> ServedSession:
        """The session that a request names, if it is of the model that it names, if it names one."""
        session = await self.store.find(key)
        if model is not None and session.model is not self.model_of(model):
            message = f"The session is of the model {session.model.name}; ask for that one."
            raise ApiError(400, message, param="model")
        return session


def require_sessions(model: ServedModel) -> None:
    """Raise `ApiError` for a model whose state grows."""
    if not model.sessions:
        message = f"The model {model.name} has no state of constant size, so it has no sessions; send the whole text."
        raise ApiError(400, message, param="session", code="no_sessions")
