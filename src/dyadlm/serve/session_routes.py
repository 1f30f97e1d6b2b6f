"""Routes for sessions: created, read on, forked, saved, restored, deleted."""

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from dyadlm.errors import UserError
from dyadlm.serve.answers import LARGE, away, body_of, json_of, running, until_gone
from dyadlm.serve.errors import ApiError
from dyadlm.serve.openai_api import Fork, NewSession, ReadText
from dyadlm.serve.rows import Row
from dyadlm.serve.scheduler import Job, Read, Work
from dyadlm.serve.served import ServedModel
from dyadlm.serve.server import Server, require_sessions
from dyadlm.serve.session_record import tail_of

RESTORE = "/v1/sessions/restore"
MANY = 500  # sessions, whose list is written in another thread


def routes(server: Server) -> APIRouter:
    """All under `/v1/sessions`."""
    router = APIRouter()
    store, limits = server.store, server.limits

    async def reading(model: ServedModel, ids: np.ndarray, row: Row | None) -> tuple[Row, float]:
        """A row that has read some tokens, and the bits of those that something predicted."""

        def work(job: Job) -> Work:
            told = yield Read(ids, nats=True)
            job.emit(float(np.nansum(told.nats, dtype=np.float64) / np.log(2)))

        async with running(model, limits.deadline) as jobs:
            jobs.start([work], [row], keep=True)
            ((_, bits),) = await jobs.take_all()
            return jobs.jobs[0].row, bits

    @router.post("/v1/sessions", status_code=201)
    async def create(request: Request) -> dict[str, Any]:
        body = await body_of(NewSession, request)
        model = server.model_of(body.model)
        require_sessions(model)
        await store.require_name(body.name)
        await store.require_room()
        row = model.rows.start()
        if body.text:
            ids = await away(len(body.text), model.prompt_ids, body.text, True)
            row, _ = await until_gone(request, reading(model, ids, None))
        return (await store.add(model, row, body.name, None, body.text, body.ttl)).described()

    @router.get("/v1/sessions")
    async def all_sessions() -> Response:
        found = [session.described() for session in await store.all()]
        return await json_of(LARGE * (len(found) > MANY), lambda: {"object": "list", "data": found})

    @router.post(RESTORE, status_code=201)
    async def restore(request: Request, name: str | None = None, model: str | None = None) -> dict[str, Any]:
        served = server.model_of(model)
        require_sessions(served)
        await store.require_name(name)
        await store.require_room()
        content, staged = await request.body(), store.staging()

        def load() -> tuple[Row, str]:
            staged.write_bytes(content)
            try:
                return served.rows.load(staged), tail_of(staged)
            finally:
                staged.unlink(missing_ok=True)

        try:
            row, tail = await asyncio.to_thread(load)
        except UserError as error:
            message = str(error).replace(str(staged), "The file").split(";")[0] + "."
            raise ApiError(400, message.replace("..", "."), code="state_refused") from error
        return (await store.add(served, row, name, None, tail)).described()

    @router.get("/v1/sessions/{key}")
    async def one_session(key: str) -> dict[str, Any]:
        return (await store.find(key)).described()

    @router.delete("/v1/sessions/{key}")
    async def delete(key: str) -> dict[str, Any]:
        session = await store.find(key)
        await store.delete(session)
        return {"id": session.id, "object": "session", "deleted": True}

    @router.post("/v1/sessions/{key}/read")
    async def read(key: str, request: Request) -> dict[str, Any]:
        body, session = await body_of(ReadText, request), await store.find(key)
        async with store.continuing(session) as row:
            ids = np.empty(0, np.int64)
            if body.text:
                ids = await away(len(body.text), session.model.prompt_ids, body.text, row.begins)
            row, bits = await until_gone(request, reading(session.model, ids, row))
            await store.commit(session, row, body.text)
        return session.described() | {"read": {"tokens": len(ids), "bits": bits}}

    @router.post("/v1/sessions/{key}/fork", status_code=201)
    async def fork(key: str, request: Request) -> dict[str, Any]:
        body, session = await body_of(Fork, request), await store.find(key)
        await store.require_name(body.name)
        await store.require_room()
        row = await store.row_of(session)  # never changed, so that both may have it
        ttl = session.ttl if body.ttl is None else body.ttl
        return (await store.add(session.model, row, body.name, session.id, session.tail, ttl)).described()

    @router.post("/v1/sessions/{key}/save")
    async def save(key: str) -> dict[str, Any]:
        session = await store.find(key)
        await store.save(session)
        return session.described()

    @router.get("/v1/sessions/{key}/state")
    async def state(key: str) -> Response:
        session = await store.find(key)
        row, staged = await store.row_of(session), store.staging()

        def content() -> bytes:
            try:
                session.model.rows.save(row, staged, session.about())
                return staged.read_bytes()
            finally:
                staged.unlink(missing_ok=True)

        return Response(await asyncio.to_thread(content), media_type="application/octet-stream")

    return router
