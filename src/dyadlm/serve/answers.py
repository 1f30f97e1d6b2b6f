"""Answers to requests: the jobs of a request are started, their items awaited, and given up when the client leaves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dyadlm.errors import RunFailed, UserError
from dyadlm.serve.errors import ApiError
from dyadlm.serve.openai_api import Kind, parsed
from dyadlm.serve.rows import Row
from dyadlm.serve.scheduler import Inbox, Job, Work
from dyadlm.serve.served import ServedModel

Result = TypeVar("Result")
# Characters, tokens or parts of an answer that are dealt with in another thread, so that the event loop does not stand
# still.
LARGE = 2**14

log = logging.getLogger("dyadlm.serve")


class ClientLeft(Exception):
    """There is nobody to answer."""


class Running:
    """Jobs of one request and the items that they make."""

    def __init__(self, model: ServedModel, seconds: float):
        self.model, self._seconds = model, seconds
        self.inbox = Inbox()
        self.jobs: list[Job] = []
        self._ended: set[int] = set()

    def start(self, makes: list[Callable[[Job], Work]], rows: list[Row | None], keep: bool = False) -> None:
        """Let jobs begin, with indices from 0. keep: their rows are used on. Raises `ApiError` if there is no room."""
        self._ended = set()
        self.jobs = []
        for index, (make, row) in enumerate(zip(makes, rows, strict=True)):
            job = Job(make, self.inbox, row, index, self._seconds)
            job.keep_row = keep
            self.jobs.append(job)
        self.model.scheduler.submit(*self.jobs)

    @property
    def is_over(self) -> bool:
        """Whether all jobs have ended."""
        return len(self._ended) == len(self.jobs)

    async def take(self) -> list[tuple[int, Any]]:
        """What was made since, as pairs of index and item. Raises `ApiError` if a job failed."""
        items = await self.inbox.take()
        for index, item in items:
            self.jobs[index].took(1)
            if item is None:
                self._ended.add(index)
                if (error := self.jobs[index].error) is not None:
                    raise as_api_error(error)
        return [(index, item) for index, item in items if item is not None]

    async def take_all(self) -> list[tuple[int, Any]]:
        """All that is made until the jobs have ended."""
        found = []
        while not self.is_over:
            found += await self.take()
        return found

    def cancel(self) -> None:
        """Give all jobs up."""
        for job in self.jobs:
            job.cancel()


@asynccontextmanager
async def running(model: ServedModel, seconds: float) -> AsyncIterator[Running]:
    """Jobs that are given up where the block is left before they have ended."""
    jobs = Running(model, seconds)
    try:
        yield jobs
    finally:
        jobs.cancel()


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error in a job."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, RunFailed):
        return ApiError(500, str(error), code="model_failed")
    log.error("A request failed.", exc_info=error)
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


async def away(size: int, work: Callable[..., Result], *given: Any) -> Result:
    """What work returns; in another thread where it is about much. size: characters, tokens or parts of an answer."""
    return work(*given) if size < LARGE else await asyncio.to_thread(work, *given)


async def body_of(kind: type[Kind], request: Request) -> Kind:
    """The body of a request. Raises `ApiError` that names the field that is wrong."""
    content = await request.body()
    return await away(len(content), parsed, kind, content)


async def json_of(size: int, work: Callable[..., Any], *given: Any) -> Response:
    """What work returns, as an answer of JSON. size: as in `away`."""
    return await away(size, lambda: JSONResponse(work(*given)))


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled when the client leaves. Raises `ClientLeft` then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
