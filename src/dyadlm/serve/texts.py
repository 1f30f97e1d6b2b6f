"""Routes for texts: their tokens, and how surprising they are."""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from dyadlm.data.encoding import prefix_token
from dyadlm.score.bits import EncodedLine, encoded_line, scored_line
from dyadlm.score.lines import Numbering, whole_lines
from dyadlm.score.units import Reading, units_of
from dyadlm.score.usual import Usual
from dyadlm.serve.answers import away, body_of, json_of, running, until_gone
from dyadlm.serve.errors import ApiError
from dyadlm.serve.openai_api import MOST_TOLD, Body, Text, Token
from dyadlm.serve.scheduler import Job, Read, Work
from dyadlm.serve.served import ServedModel
from dyadlm.serve.server import Server

MOST_TOKENS = 1_000_000  # that one answer tells, or makes a text of


class Tokenize(Body):
    """`POST /tokenize`."""

    model: Text | None = None
    text: Text


class Detokenize(Body):
    """`POST /detokenize`."""

    model: Text | None = None
    tokens: Annotated[list[Token], Field(max_length=MOST_TOKENS)]


class Score(Body):
    """`POST /score`."""

    model: Text | None = None
    text: Text
    per: Literal["token", "line", "document"] = "line"


def routes(server: Server) -> APIRouter:
    """`/tokenize`, `/detokenize` and `/score`."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await body_of(Tokenize, request)
        return await json_of(len(body.text), _tokens, server.model_of(body.model), body.text)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await body_of(Detokenize, request)
        return await json_of(len(body.tokens), _text, server.model_of(body.model), body.tokens)

    @router.post("/score")
    async def score(request: Request) -> Response:
        body = await body_of(Score, request)
        model, size = server.model_of(body.model), len(body.text)
        lines = await away(size, _encoded, model, body.text)
        parts = {"token": sum(len(line.ids) for line in lines), "line": len(lines), "document": 1}[body.per]
        if parts > MOST_TOLD:
            message = f"The text has {parts} parts, and at most {MOST_TOLD} are scored at once; send less text."
            raise ApiError(400, message, param="text")
        nats = np.empty(0)
        if lines:
            ids = np.concatenate([line.ids for line in lines]).astype(np.int64)
            nats = await until_gone(request, _nats(model, ids, server.limits.deadline))
        return await json_of(size, _scored, body, lines, nats)

    return router


def _tokens(model: ServedModel, text: str) -> dict[str, Any]:
    ids = [int(token) for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if len(ids) > MOST_TOKENS:
        message = f"The text has {len(ids)} tokens, and at most {MOST_TOKENS} are told at once; send less text."
        raise ApiError(400, message, param="text")
    return {"tokens": ids, "pieces": [model.token_bytes.text(token) for token in ids]}


def _text(model: ServedModel, tokens: list[int]) -> dict[str, Any]:
    if any(token >= model.vocabulary for token in tokens):
        raise ApiError(400, f"Tokens of this model are numbers from 0 to {model.vocabulary - 1}.", param="tokens")
    return {"text": model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)}


def _encoded(model: ServedModel, text: str) -> list[EncodedLine]:
    numbering = Numbering("The text")
    return [encoded_line(model.encoder, numbering.place(line)) for line in whole_lines(text.encode())]


async def _nats(model: ServedModel, ids: np.ndarray, seconds: float) -> np.ndarray:
    """The surprise at each token of a text that begins a document, float32 (T,)."""

    def work(job: Job) -> Work:
        told = yield Read(np.concatenate([[prefix_token(model.tokenizer)], ids]), nats=True)
        job.emit(told.nats[1:])

    async with running(model, seconds) as jobs:
        jobs.start([work], [None])
        ((_, nats),) = await jobs.take_all()
    return np.asarray(nats)


def _scored(body: Score, lines: list[EncodedLine], nats: np.ndarray) -> dict[str, Any]:
    """The answer for lines whose tokens, all together, cost nats (T,)."""
    usual, ends = Usual(), np.cumsum([len(line.ids) for line in lines])
    read = (scored_line(line, nats[end - len(line.ids) : end], usual) for line, end in zip(lines, ends, strict=True))
    items = []
    for unit in units_of(read, Reading(body.per, "mean")):
        text = body.text if body.per == "document" else unit.content.decode(errors="replace")
        items.append({"text": text, "bits": unit.bits, "bytes": unit.size, "bits_per_byte": unit.bits_per_byte})
    return {"unit": "bits", "items": items}
