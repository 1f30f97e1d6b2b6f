"""What the routes share: the models, the sessions, and who may continue one."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from dyadlm.serve.errors import ApiError
from dyadlm.serve.metrics import Metrics
from dyadlm.serve.rows import Row
from dyadlm.serve.served import ServedModel
from dyadlm.serve.sessions import ServedSession, SessionStore
from dyadlm.serve.settings import Limits


class Server:
    """What the routes share. models: by name; the first answers requests that name none.

    Routes of other parts are added in `create_app`, with `app.include_router`.
    """

    def __init__(self, models: Mapping[str, ServedModel], store: SessionStore, limits: Limits):
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

    def session_of(self, key: str, model: str | None = None) -> ServedSession:
        """The session that a request names, if it is of the model that it names, if it names one."""
        session = self.store.find(key)
        if model is not None and session.model is not self.model_of(model):
            message = f"The session is of the model {session.model.name}; ask for that one."
            raise ApiError(400, message, param="model")
        return session

    @asynccontextmanager
    async def continuing(self, session: ServedSession) -> AsyncIterator[Row]:
        """Where a session stands, while no other request may move it. Raises `ApiError` while another does."""
        if session.busy:
            message = "Another request continues this session; wait for it, or fork the session."
            raise ApiError(409, message, param="session", code="session_busy", retry_after=1)
        session.busy = True
        try:
            yield await self.store.row_of(session)
        finally:
            session.busy = False


def require_sessions(model: ServedModel) -> None:
    """Raise `ApiError` for a model whose state grows."""
    if not model.sessions:
        message = f"The model {model.name} has no state of constant size, so it has no sessions; send the whole text."
        raise ApiError(400, message, param="session", code="no_sessions")
