"""`POST /v1/watch`: what a model does at each token, as server-sent events; and the page at `/` that shows it."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from importlib.resources import files
from time import perf_counter
from typing import Any, Protocol

from anyio import CancelScope
from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import iterate_in_threadpool

from dyadlm.errors import RunFailed, UserError
from dyadlm.generate.sampling import Sampling
from dyadlm.serve.watching import Moment, Watcher

# Nothing but what the server itself sends is loaded or asked, and nothing runs that stands in the page's text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "client.js": "text/javascript",
    "future.js": "text/javascript",
    "pictures.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


class WatchRequest(BaseModel):
    """What to read and how to go on. tokens: ids to read in place of a text. top: next tokens told with each."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    session: str | None = None
    text: str = ""
    tokens: list[int] = Field(default_factory=list, max_length=1_000_000)
    max_tokens: int = Field(default=0, ge=0, le=100_000)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    top: int = Field(default=10, ge=1, le=100)


class Visit(Protocol):
    """A model or a session that is looked at, alone until it is left. watcher: stands where it stands."""

    watcher: Watcher

    def settle(self) -> dict[str, Any] | None:
        """The record of the session, which stands where the watcher does from now on; None where there is none.

        Leaving the visit does the same, also where the client has gone.
        """
        ...


# Gives what a request is answered with; raises what the server answers errors with.
Open = Callable[[WatchRequest], AbstractAsyncContextManager[Visit]]


def watch_router(open_visit: Open) -> APIRouter:
    """The endpoint, for a server that opens its models and sessions."""
    router = APIRouter()

    async def watch(request: WatchRequest) -> Response:
        """One event a token (`Moment`); the last is `{"done": true, "session": ..., "tokens_per_second": ...}`."""
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        events = _events(open_visit, request, sampling)
        first = await anext(events)  # what is refused is answered with its status, not with a stream
        return _Stream(
            _preceded(first, events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    router.add_api_route("/v1/watch", watch, methods=["POST"])
    return router


def page_router() -> APIRouter:
    """The page and its files."""
    router = APIRouter()

    def served(name: str) -> Response:
        return Response(
            (files("dyadlm.serve") / "page" / name).read_bytes(),
            media_type=PAGE[name],
            headers={
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )

    router.add_api_route("/", lambda: served("index.html"), include_in_schema=False)
    for name in PAGE.keys() - {"index.html"}:
        router.add_api_route(f"/page/{name}", lambda name=name: served(name), include_in_schema=False)
    return router


def _moments(watcher: Watcher, request: WatchRequest, sampling: Sampling) -> Iterator[Moment]:
    if request.text and request.tokens:
        raise UserError("Give either text or tokens, not both.")
    watcher.top = request.top
    yield from watcher.read(request.tokens or watcher.encode(request.text))
    yield from watcher.write(request.max_tokens, sampling)


async def _events(open_visit: Open, request: WatchRequest, sampling: Sampling) -> AsyncGenerator[str]:
    """The stream. Where the client leaves, the session has read what was sent, and perhaps a little more."""
    count, began = 0, perf_counter()
    async with open_visit(request) as visit:
        try:
            async for moment in iterate_in_threadpool(_moments(visit.watcher, request, sampling)):
                count += 1
                yield _event(moment.as_json())
        except (UserError, RunFailed) as error:
            if not count:
                raise
            yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            return
        record = visit.settle()
        yield _event({"done": True, "session": record, "tokens_per_second": count / (perf_counter() - began)})


async def _preceded(first: str, events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


class _Stream(StreamingResponse):  # type: ignore[misc, unused-ignore]  # where fastapi is not installed
    """A stream that ends its generator at once when the client leaves, so that the session is free again."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await self.body_iterator.aclose()  # type: ignore[attr-defined, unused-ignore]
