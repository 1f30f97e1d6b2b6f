"""`POST /v1/watch`: what a model does at each token, as server-sent events."""

import json
from asyncio import CancelledError
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from time import monotonic, perf_counter
from typing import Any
from weakref import WeakKeyDictionary

from anyio import CancelScope
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from starlette.concurrency import iterate_in_threadpool
from torch import Tensor

from dyadlm.data.encoding import prefix_token
from dyadlm.errors import RunFailed, UserError
from dyadlm.generate.sampling import Sampling
from dyadlm.model import DyadCache
from dyadlm.serve.answers import as_api_error, body_of
from dyadlm.serve.errors import ApiError
from dyadlm.serve.openai_api import Body, Seed, Text, Token
from dyadlm.serve.rows import Row
from dyadlm.serve.server import Server, require_sessions
from dyadlm.serve.session_record import ServedSession
from dyadlm.serve.watching import Watcher

# Texts that are watched at once, each in a thread of its own.
MOST = 16

# When what the slots of a row hold was written. A row never changes, and forks of a session share it; one that was
# taken up from disk is another, of which nothing is known.
_times: "WeakKeyDictionary[Row, Tensor]" = WeakKeyDictionary()


class WatchRequest(Body):
    """What to read and how to go on. tokens: ids to read in place of a text. top: next tokens told with each. quiet:
    nothing is told of what is read."""

    model: Text | None = None
    session: Text | None = None
    text: Text = ""
    tokens: list[Token] = Field(default_factory=list)
    max_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=2**31)
    seed: Seed | None = None
    top: int = Field(default=10, ge=1, le=100)
    quiet: bool = False


def routes(server: Server) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    watched = 0

    @asynccontextmanager
    async def place() -> AsyncIterator[None]:
        nonlocal watched
        if watched >= MOST:
            message = f"The server lets {MOST} texts be watched at once; try again in a moment."
            raise ApiError(429, message, code="queue_full", retry_after=2)
        watched += 1
        try:
            yield
        finally:
            watched -= 1

    async def events(body: WatchRequest, sampling: Sampling) -> AsyncGenerator[str]:
        count, began, end = 0, perf_counter(), monotonic() + server.limits.deadline
        try:
            async with place(), _visit(server, body) as visit:
                async for tokens, told in iterate_in_threadpool(_told(visit.watcher, body, sampling)):
                    count += tokens
                    if told:
                        yield told
                    if monotonic() > end:
                        raise ApiError(
                            503, "The request took too long; ask for fewer tokens.", code="deadline_exceeded"
                        )
                record = await visit.settle()
        except (ApiError, UserError, RunFailed) as error:
            if not count:
                raise
            yield _event(as_api_error(error).body)
            return
        yield _event({"done": True, "session": record, "tokens_per_second": count / (perf_counter() - began)})

    async def watch(request: Request) -> Response:
        """One event a token (`Moment`); the last is `{"done": true, "session": …, "tokens_per_second": …}`."""
        body = await body_of(WatchRequest, request)
        if body.text and body.tokens:
            raise ApiError(400, "Give either text or tokens, not both.", param="tokens")
        if body.max_tokens > server.limits.max_tokens:
            raise ApiError(400, f"The server writes at most {server.limits.max_tokens} tokens.", param="max_tokens")
        stream = events(body, Sampling(body.temperature, body.top_k, body.top_p, body.seed))
        first = await anext(stream)  # what is refused is answered with its status, not with a stream
        return _Stream(
            _preceded(first, stream),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    router.add_api_route("/v1/watch", watch, methods=["POST"])
    return router


class _Visit:
    """A model or a session that is watched."""

    def __init__(self, server: Server, watcher: Watcher, session: ServedSession | None):
        self.watcher, self._server, self._session, self._from = watcher, server, session, watcher.tokens

    async def settle(self) -> dict[str, Any] | None:
        """Let the session stand where the watcher stands; its record, None without one."""
        if self._session is None:
            return None
        if self.watcher.tokens > self._from:
            assert isinstance(self.watcher.state, DyadCache), "only our models have sessions"
            row = self._session.model.rows.taken(self.watcher.state, self.watcher.logits, self.watcher.tokens)
            if (times := self.watcher.times) is not None:
                _times[row] = times
            await self._server.store.commit(self._session, row, self.watcher.tail)
            self._from, self.watcher.tail = self.watcher.tokens, ""
        return self._session.described()


@asynccontextmanager
async def _visit(server: Server, body: WatchRequest) -> AsyncIterator[_Visit]:
    """What the request watches. Where the client leaves, a session stands where the watcher does; where the request
    fails, it stands where it stood before."""
    if body.session is None:
        model = server.model_of(body.model)
        yield _Visit(server, Watcher(model.model, model.tokenizer, top=body.top), None)
        return
    require_sessions(server.model_of(body.model))
    session = await server.session_of(body.session, body.model)
    async with server.store.continuing(session) as row:
        rows, model = session.model.rows, session.model
        given = (rows.cache(row), row.logits, row.tokens, _times.get(row), body.top)
        watcher = Watcher(model.model, model.tokenizer, *given)
        visit = _Visit(server, watcher, session)
        try:
            yield visit
        except (GeneratorExit, CancelledError):  # the client has left
            if watcher.whole:
                with CancelScope(shield=True):
                    await visit.settle()
            raise


def _told(watcher: Watcher, body: WatchRequest, sampling: Sampling) -> Iterator[tuple[int, str]]:
    """How many tokens were read or written, and what is told of them: many at once, since to go from thread to thread
    takes longer than a token."""
    ids = body.tokens or (watcher.encode(body.text) if body.text else [])
    if not ids and not watcher.tokens and body.max_tokens:
        ids = [prefix_token(watcher.tokenizer)]
    if body.quiet:
        yield from ((tokens, "") for tokens in watcher.skip(ids))
        ids = []
    for moments in chain(watcher.read(ids), watcher.write(body.max_tokens, sampling)):
        yield len(moments), "".join(_event(moment.as_json()) for moment in moments)


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
