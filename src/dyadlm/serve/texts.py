"""Routes for texts: their tokens, and how surprising they are."""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field

from dyadlm.data.encoding import TextEncoder, prefix_token
from dyadlm.serve.answers import away, running, until_gone
from dyadlm.serve.errors import ApiError
from dyadlm.serve.openai_api import MOST_TOLD, Body, Text, Token, parsed
from dyadlm.serve.scheduler import Job, Read, Work
from dyadlm.serve.served import ServedModel
from dyadlm.serve.server import Server

MOST_DETOKENIZED = 1_000_000


class Tokenize(Body):
    """`POST /tokenize`."""

    model: Text | None = None
    text: Text


class Detokenize(Body):
    """`POST /detokenize`."""

    model: Text | None = None
    tokens: Annotated[list[Token], Field(max_length=MOST_DETOKENIZED)]


class Score(Body):
    """`POST /score`."""

    model: Text | None = None
    text: Text
    per: Literal["token", "line", "document"] = "line"


def routes(server: Server) -> APIRouter:
    """`/tokenize`, `/detokenize` and `/score`."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = parsed(Tokenize, await request.body())
        model = server.model_of(body.model)

        def tokens() -> dict[str, Any]:
            ids = [int(token) for token in model.tokenizer(body.text, add_special_tokens=False)["input_ids"]]
            return {"tokens": ids, "pieces": [model.token_bytes.text(token) for token in ids]}

        return await away(len(body.text), tokens)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        body = parsed(Detokenize, await request.body())
        model = server.model_of(body.model)
        if any(token >= model.vocabulary for token in body.tokens):
            raise ApiError(400, f"Tokens of this model are numbers from 0 to {model.vocabulary - 1}.", param="tokens")
        return {"text": model.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)}

    @router.post("/score")
    async def score(request: Request) -> dict[str, Any]:
        body = parsed(Score, await request.body())
        model, content = server.model_of(body.model), body.text.encode()
        if not content:
            return {"unit": "bits", "items": []}
        ids, starts = await away(len(content), TextEncoder(model.tokenizer).encode, content)
        begins = _begins(content, starts, body.per)
        if len(begins) > MOST_TOLD:
            message = f"The text has {len(begins)} parts, and at most {MOST_TOLD} are scored at once; send less text."
            raise ApiError(400, message, param="text")
        bits = await until_gone(request, _bits(model, ids.astype(np.int64), server.limits.deadline))
        sums = np.add.reduceat(bits, np.searchsorted(starts, begins)) if len(ids) else np.zeros(len(begins))
        ends = [*begins[1:], len(content)]
        items = []
        for begin, end, total in zip(begins, ends, sums.tolist(), strict=True):
            text = content[begin:end].decode(errors="replace")
            per_byte = total / max(end - begin, 1)
            items.append({"text": text, "bits": total, "bytes": int(end - begin), "bits_per_byte": per_byte})
        return {"unit": "bits", "items": items}

    return router


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
