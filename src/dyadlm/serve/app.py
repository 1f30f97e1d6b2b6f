"""The application: all routes behind one gate, errors in the form of OpenAI's API, and a good end."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dyadlm.errors import RunFailed, UserError
from dyadlm.serve import completing, page_routes, session_routes, texts, watch
from dyadlm.serve.answers import ClientLeft, as_api_error
from dyadlm.serve.errors import ApiError
from dyadlm.serve.security import Gate
from dyadlm.serve.served import ServedModel
from dyadlm.serve.server import Server, Sessions
from dyadlm.serve.session_routes import RESTORE
from dyadlm.serve.session_storage import is_redis, shared_storage
from dyadlm.serve.sessions import SessionStore
from dyadlm.serve.settings import Limits
from dyadlm.serve.shared_sessions import SharedSessions
from dyadlm.version import __version__

TIDY_SECONDS = 1.0

log = logging.getLogger("dyadlm.serve")


def create_app(
    models: Mapping[str, ServedModel],
    folder: Path | str,
    limits: Limits,
    key: str | None = None,
    hosts: Iterable[str] | None = (),
    shared: bool = False,
) -> FastAPI:
    """The application (ASGI). models: by name. folder: of saved sessions, or the URL of a Redis server. key: that
    clients have to name. hosts: names that they may call the server by, in the Host header; None: any. shared: other
    servers use the sessions, too, as they always do in Redis.

    Raises `UserError` where sessions cannot be shared there.
    """
    store: Sessions
    if shared or is_redis(folder):
        store = SharedSessions(shared_storage(folder), models, limits)
    else:
        store = SessionStore(Path(folder), models, limits)
    server = Server(models, store, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy(server))
        try:
            yield
        finally:
            tidying.cancel()
            for model in server.models.values():
                await asyncio.to_thread(model.scheduler.close, 0.0)
            await server.store.close()

    app = FastAPI(title="dyadlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    _handle_errors(app)
    for router in (_models(server), *(part.routes(server) for part in (completing, session_routes, texts, watch))):
        app.include_router(router)
    app.include_router(page_routes.routes())

    def larger(path: str) -> int | None:
        if path != RESTORE:
            return None
        states = [model.state_bytes for model in models.values() if model.state_bytes is not None]
        return max(limits.body_bytes, 2 * max(states, default=0) + 2**16)

    app.add_middleware(
        Gate, key=key, hosts=hosts, body_bytes=limits.body_bytes, larger=larger, answered=server.metrics.answered
    )
    return app


async def _tidy(server: Server) -> None:
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        try:
            await server.store.tidy()
        except Exception:
            log.exception("Sessions could not be tidied up.")


def _handle_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(UserError)
    @app.exception_handler(RunFailed)
    async def of_the_library(request: Request, error: Exception) -> JSONResponse:
        return answer(as_api_error(error))

    @app.exception_handler(HTTPException)
    async def of_routes(request: Request, error: HTTPException) -> JSONResponse:
        message = f"There is nothing at {request.url.path[:200]}." if error.status_code == 404 else str(error.detail)
        return answer(ApiError(error.status_code, message))

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return answer(as_api_error(error))


def _models(server: Server) -> APIRouter:
    """`/health`, `/metrics` and `/v1/models`."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        if ended := [model.name for model in server.models.values() if not model.scheduler.alive]:
            message = f"The thread of {', '.join(ended)} has ended; start the server again."
            raise ApiError(503, message, code="model_failed")
        return {"status": "ok", "models": list(server.models), "version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.described() for model in server.models.values()]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return server.model_of(name).described()

    return router
