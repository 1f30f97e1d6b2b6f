"""Completions and chats as OpenAI's API has them: prompts are read, answers written, streamed, and kept in sessions."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse

from dyadlm.errors import RunFailed, UserError
from dyadlm.serve.answers import Running, as_api_error, away, body_of, json_of, running, until_gone
from dyadlm.serve.errors import ApiError
from dyadlm.serve.generation import Ended, Piece, Plan, TokenOdds, read_prompt, write
from dyadlm.serve.openai_api import (
    MOST_TOLD,
    ChatRequest,
    CompletionRequest,
    Generation,
    Offsets,
    chat_logprobs,
    joined,
    legacy_logprobs,
    usage,
)
from dyadlm.serve.rows import Row
from dyadlm.serve.scheduler import Job, Read, Work
from dyadlm.serve.server import Server, require_sessions
from dyadlm.serve.session_record import ServedSession

# New tokens of an answer where the request does not say; the first as with OpenAI.
COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024


class Answer:
    """One request for text: what it asks for, and how its pieces are told.

    plans: one for each answer. prompt_tokens: of all prompts together. echoes: the prompt in front of each answer.
    end_tokens: those that end an answer.
    """

    def __init__(self, server: Server, body: Generation, session: ServedSession | None):
        self.server, self.body, self.session = server, body, session
        self.model = server.model_of(body.model) if session is None else session.model
        self.end_tokens = self.model.end_tokens
        if body.slots == "prompt" and not self.model.slots:
            raise ApiError(400, "This model has no slots; leave out slots.", param="slots")
        self.created = int(time.time())
        self.plans: list[Plan] = []
        self.prompt_tokens = 0
        self.echoes: list[str] = []
        self.keep = session is not None and body.keep
        self.prompt_texts: list[str] = []
        self._told = 0

    id_prefix = kind = chunk_kind = ""

    def begins(self) -> bool:
        """Whether the prompt begins a document."""
        return self.session is None or self.session.tokens == 0

    def add(self, prompt: np.ndarray, text: str, max_tokens: int | None, default: int, **odds: Any) -> None:
        """Ask for `n` answers to a prompt."""
        body, limits = self.body, self.server.limits
        most = default if max_tokens is None else max_tokens
        if most > limits.max_tokens:
            message = f"An answer has at most {limits.max_tokens} tokens here; ask for fewer."
            raise ApiError(400, message, param="max_tokens")
        if odds["top"] is not None:
            self._told += (body.n or 1) * (most + (len(prompt) if odds.get("prompt_odds") else 0))
        if self._told > MOST_TOLD:
            message = f"An answer tells at most {MOST_TOLD} log-probabilities; ask for fewer tokens, or none of them."
            raise ApiError(400, message, param="logprobs")
        self.prompt_tokens += len(prompt)
        self.prompt_texts.append(text)
        for choice in range(body.n or 1):
            if len(self.plans) >= limits.choices:
                raise ApiError(400, f"At most {limits.choices} answers can be asked for at once.", param="n")
            sampling, slots = body.sampling(choice), body.slots or "all"
            self.plans.append(Plan(prompt, most, sampling, body.stops, keep=self.keep, slots=slots, **odds))

    def choice(
        self, index: int, pieces: list[Piece], odds: list[TokenOdds] | None, reason: str | None
    ) -> dict[str, Any]:
        """An answer that is complete."""
        raise NotImplementedError

    def chunk(self, index: int, text: str, odds: list[TokenOdds], reason: str | None) -> dict[str, Any]:
        """A part of a streamed answer."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a streamed answer begins with."""
        return None

    def closing(self, ended: Ended) -> np.ndarray:
        """Tokens that a session reads after the answer."""
        return np.empty(0, np.int64)

    async def respond(self, request: Request) -> Response:
        metrics = self.server.metrics
        if not self.body.stream:
            with metrics.whole.time():
                return await until_gone(request, self._whole())
        events = self._events()
        try:
            with metrics.first.time():
                first = await until_gone(request, anext(events))
        except StopAsyncIteration:
            raise AssertionError("a stream has an end") from None

        async def all_events() -> AsyncIterator[dict[str, str]]:
            try:
                yield first
                async for event in events:
                    yield event
            finally:
                await events.aclose()

        grace = self.server.limits.grace
        return EventSourceResponse(all_events(), ping=15, shutdown_event=anyio.Event(), shutdown_grace_period=grace)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[Running]:
        """The jobs of all answers. Answers to one prompt start from one reading of it."""
        async with running(self.model, self.server.limits.deadline) as jobs:
            if self.session is None:
                await self._start(jobs, None)
                yield jobs
            elif not self.keep:
                await self._start(jobs, await self.server.store.row_of(self.session))
                yield jobs
            else:
                async with self.server.store.continuing(self.session) as row:
                    await self._start(jobs, row)
                    yield jobs

    async def _start(self, jobs: Running, row: Row | None) -> None:
        model, n = self.model, self.body.n or 1

        def writing(plan: Plan) -> Any:
            def work(job: Job) -> Work:
                yield from read_prompt(job, plan)
                yield from write(job, plan, model.tokenizer, self.end_tokens, model.rows.room(job.row))

            return work

        if n == 1:
            jobs.start([writing(plan) for plan in self.plans], [row] * len(self.plans), self.keep)
            return
        firsts = self.plans[::n]
        jobs.start([partial(_reading, plan) for plan in firsts], [row] * len(firsts), keep=True)
        told = await jobs.take_all()
        rows = [job.row for job in jobs.jobs for _ in range(n)]
        odds = [[item for index, item in told if index == number] for number in range(len(firsts))]

        def writing_on(plan: Plan, told: list[Any]) -> Any:
            def work(job: Job) -> Work:
                for item in told:
                    job.emit(item)
                yield from write(job, plan, model.tokenizer, self.end_tokens, model.rows.room(job.row))

            return work

        makes = [writing_on(plan, odds[number // n]) for number, plan in enumerate(self.plans)]
        jobs.start(makes, rows, self.keep)  # type: ignore[arg-type]

    async def _commit(self, jobs: Running, text: str, ended: Ended) -> None:
        """Let the session stand where the answer ends."""
        if self.session is None or not self.keep:
            return
        row, after = jobs.jobs[0].row, self.closing(ended)
        if len(after):
            row = await read_on(jobs, row, after)
        shown = self.prompt_texts[0] + text
        await self.server.store.commit(self.session, row, shown)

    async def _whole(self) -> Response:
        async with self._running() as jobs:
            told: list[list[Any]] = [[] for _ in self.plans]
            for index, item in await jobs.take_all():
                told[index].append(item)
            await self._commit(jobs, joined(_pieces(told[0]))[0], told[0][-1])
        return await json_of(self._size(sum(map(len, told))), self._told_whole, told)

    def _told_whole(self, told: list[list[Any]]) -> dict[str, Any]:
        """The answer. told: of each text, what came of it; its end is the last."""
        choices = [self.choice(number, _pieces(own), _odds(own), own[-1].reason) for number, own in enumerate(told)]
        written = sum(own[-1].written for own in told)
        return self._envelope(self.kind, choices) | {"usage": usage(self.prompt_tokens, written)}

    def _size(self, items: int) -> int:
        """Parts of an answer of so many items, each of which may tell likeliest tokens."""
        return items * (2 + max(plan.top or 0 for plan in self.plans))

    async def _events(self) -> AsyncGenerator[dict[str, str]]:
        """Events of a stream. What has come meanwhile is told in one event, so that slow clients get fewer and larger
        ones. An error after the first event is an event of its own."""
        began = False
        try:
            async with self._running() as jobs:
                written, texts = 0, [""] * len(self.plans)
                opened: set[int] = set()
                ends: dict[int, Ended] = {}
                while not jobs.is_over:
                    items = await jobs.take()
                    for number in dict.fromkeys(index for index, _ in items):
                        own = [item for index, item in items if index == number]
                        text, odds = joined(_pieces(own))
                        texts[number] += text
                        if number not in opened:
                            opened.add(number)
                            text = (self.echoes[number] if self.echoes else "") + text
                            if (opening := self.opening(number)) is not None:
                                began = True
                                yield self._event([opening])
                        odds = _odds(own) + odds
                        if text or odds:
                            began = True
                            yield await away(self._size(len(odds)), self._told_chunk, number, text, odds)
                        for item in own:
                            if isinstance(item, Ended):
                                ends[number] = item
                                written += item.written
                await self._commit(jobs, texts[0], ends[0])
                for number, ended in ends.items():
                    began = True
                    yield self._event([self.chunk(number, "", [], ended.reason)])
            if self.body.includes_usage:
                yield self._event([], {"usage": usage(self.prompt_tokens, written)})
            yield {"data": "[DONE]"}
        except (ApiError, UserError, RunFailed) as error:
            if not began:
                raise
            yield {"data": json.dumps(as_api_error(error).body)}

    def _told_chunk(self, number: int, text: str, odds: list[TokenOdds]) -> dict[str, str]:
        return self._event([self.chunk(number, text, odds, None)])

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> dict[str, str]:
        empty = {"usage": None} if self.body.includes_usage else {}
        return {"data": json.dumps(self._envelope(self.chunk_kind, choices) | empty | (more or {}))}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        if not hasattr(self, "_id"):
            self._id = self.id_prefix + secrets.token_hex(12)
        own = {} if self.session is None else {"session": self.session.id}
        return {
            "id": self._id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            **own,
        }


def _pieces(items: list[Any]) -> list[Piece]:
    return [item for item in items if isinstance(item, Piece)]


def _odds(items: list[Any]) -> list[TokenOdds]:
    """Of the prompt."""
    return [one for item in items if isinstance(item, list) for one in item]


def _reading(plan: Plan, job: Job) -> Work:
    return read_prompt(job, plan)


async def read_on(jobs: Running, row: Row, ids: np.ndarray) -> Row:
    """A row that has read some more tokens."""

    def work(job: Job) -> Work:
        yield Read(ids)

    jobs.start([work], [row], keep=True)
    await jobs.take_all()
    return jobs.jobs[0].row


class CompletionAnswer(Answer):
    """`/v1/completions`."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    body: CompletionRequest

    def __init__(self, server: Server, body: CompletionRequest, session: ServedSession | None):
        super().__init__(server, body, session)
        prompts = body.prompts
        if not prompts:
            raise ApiError(400, "Give at least one prompt.", param="prompt")
        odds = {"top": body.logprobs, "prompt_odds": bool(body.echo) and body.logprobs is not None}
        for prompt in prompts:
            if isinstance(prompt, str):
                ids, text = self.model.prompt_ids(prompt, self.begins()), prompt
            else:
                ids = self.model.checked_ids(prompt, self.begins())
                text = str(self.model.tokenizer.decode(prompt, skip_special_tokens=True))
            self.add(ids, text, body.max_tokens, COMPLETION_TOKENS, **odds)
        n = body.n or 1
        self.echoes = [text for text in self.prompt_texts for _ in range(n)] if body.echo else []
        self._offsets = [Offsets() for _ in self.plans]

    def choice(
        self, index: int, pieces: list[Piece], odds: list[TokenOdds] | None, reason: str | None
    ) -> dict[str, Any]:
        text, written_odds = joined(pieces)
        text = (self.echoes[index] if self.echoes else "") + text
        return self.chunk(index, text, [*(odds or ()), *written_odds], reason)

    def chunk(self, index: int, text: str, odds: list[TokenOdds], reason: str | None) -> dict[str, Any]:
        told = None
        if self.body.logprobs is not None:
            told = legacy_logprobs(self.model, odds, self._offsets[index])
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


class ChatAnswer(Answer):
    """`/v1/chat/completions`. With a session, its messages follow those that the session has read."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    body: ChatRequest

    def __init__(self, server: Server, body: ChatRequest, session: ServedSession | None):
        super().__init__(server, body, session)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        ids = self.model.chat_ids([message.told() for message in body.messages], after=not self.begins())
        top = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        text = self.model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.end_tokens = self.model.end_tokens | self.model.chat_template.end_tokens
        self.add(ids, str(text), most, min(CHAT_TOKENS, server.limits.max_tokens), top=top)

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(
        self, index: int, pieces: list[Piece], odds: list[TokenOdds] | None, reason: str | None
    ) -> dict[str, Any]:
        text, written_odds = joined(pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        told = chat_logprobs(self.model, written_odds) if self.body.logprobs else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": reason}

    def chunk(self, index: int, text: str, odds: list[TokenOdds], reason: str | None) -> dict[str, Any]:
        delta = {} if reason is not None else {"content": text}
        told = chat_logprobs(self.model, odds) if self.body.logprobs and reason is None else None
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}

    def closing(self, ended: Ended) -> np.ndarray:
        """What the template writes after an answer, so that the next message can follow."""
        end = [] if ended.end_token is None else [ended.end_token]
        return np.asarray(self.model.chat_template.closing or end, np.int64)


def routes(server: Server) -> APIRouter:
    """`/v1/completions` and `/v1/chat/completions`."""
    router = APIRouter()

    async def session_for(body: Generation, answers: int) -> ServedSession | None:
        if body.session is None:
            return None
        if body.keep and answers > 1:
            message = "Only one answer can become part of a session; ask for one, or set keep to false."
            raise ApiError(400, message, param="n")
        require_sessions(server.model_of(body.model))
        return await server.session_of(body.session, body.model)

    async def respond(kind: type[Answer], body: Generation, answers: int, request: Request) -> Response:
        session = await session_for(body, answers)
        size = len(await request.body())
        return await (await away(size, kind, server, body, session)).respond(request)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await body_of(CompletionRequest, request)
        return await respond(CompletionAnswer, body, (body.n or 1) * len(body.prompts), request)

    @router.post("/v1/chat/completions")
    async def chats(request: Request) -> Response:
        body = await body_of(ChatRequest, request)
        return await respond(ChatAnswer, body, body.n or 1, request)

    return router
