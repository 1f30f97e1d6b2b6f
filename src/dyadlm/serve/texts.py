"""Routes for texts: their tokens, and how surprising they are."""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from dyadlm.data.encoding import TextEncoder, prefix_token
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
        model, content = server.model_of(body.model), body.text.encode()
        if not content:
            return JSONResponse({"unit": "bits", "items": []})
        ids, starts = await away(len(content), TextEncoder(model.tokenizer).encode, content)
        begins = _begins(content, starts, body.per)
        if len(begins) > MOST_TOLD:
            message = f"The text has {len(begins)} parts, and at most {MOST_TOLD} are scored at once; send less text."
            raise ApiError(400, message, param="text")
        bits = await until_gone(request, _bits(model, ids.astype(np.int64), server.limits.deadline))
        return await json_of(len(content), _scored, content, begins, starts, bits)

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


def _scored(content: bytes, begins: np.ndarray, starts: np.ndarray, bits: np.ndarray) -> dict[str, Any]:
    """The answer for units that begin at bytes (U,) of a text, whose tokens begin at bytes (T,) and cost bits (T,)."""
    sums = np.add.reduceat(bits, np.searchsorted(starts, begins)) if len(bits) else np.zeros(len(begins))
    items = []
    for begin, end, total in zip(begins, [*begins[1:], len(content)], sums.tolist(), strict=True):
        text = content[begin:end].decode(errors="replace")
        per_byte = total / max(end - begin, 1)
        items.append({"text": text, "bits": total, "bytes": int(end - begin), "bits_per_byte": per_byte})
    return {"unit": "bits", "items": items}


async def _bits(model: ServedModel, ids: np.ndarray, seconds: float) -> np.ndarray:
    """The surprise at each token of a text that begins a document, float64 (T,)."""

    def work(job: Job) -> Work:
        told = yield Read(np.concatenate([[prefix_token(model.tokenizer)], ids]), nats=True)
        job.emit(told.nats[1:].astype(np.float64) / np.log(2))

    async with running(model, seconds) as jobs:
        jobs.start([work], [None])
        ((_, bits),) = await jobs.take_all()
    return np.asarray(bits)


def _begins(content: bytes, starts: np.ndarray, per: str) -> np.ndarray:
    """Where the units begin: at the first token of each line, or at each token, or at the beginning alone."""
    if per == "document" or not len(starts):
        return np.zeros(1, np.int64)
    first = starts.copy()
    first[0] = 0
    if per == "token":
        return first
    lines = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    places = np.searchsorted(first, lines[lines < len(content)])
    return np.unique(np.concatenate([[0], first[places[places < len(first)]]]))
