"""The requests of OpenAI's API that are served, checked, and the shapes of its answers.

A field that would change the answer and is not supported is refused; fields that do not change it are taken and left.
"""

from codecs import getincrementaldecoder
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dyadlm.generate.sampling import Sampling
from dyadlm.generate.session import Slots
from dyadlm.serve.errors import ApiError
from dyadlm.serve.generation import Piece, TokenOdds
from dyadlm.serve.served import ServedModel

MOST_TOP = 20
# Tokens, or other parts of a text, of which one answer tells figures.
MOST_TOLD = 65_536
MOST_STOPS, LONGEST_STOP = 16, 1000
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Text = Annotated[str, Field()]
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ttl = Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False)]


class Body(BaseModel):
    """A body of JSON; unknown fields are refused, so that none is lost silently."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Generation(Body):
    """What completions and chats share."""

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    seed: Seed | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    session: Text | None = None
    keep: bool = True
    slots: Slots | None = None
    # Of OpenAI's, without effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Of OpenAI's, refused where they would change the answer.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("stop")
    @classmethod
    def _short(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if any(not 1 <= len(one) <= LONGEST_STOP for one in stops):
            raise ValueError(f"a stop string has 1 to {LONGEST_STOP} characters")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, choice: int) -> Sampling:
        """Of the answer with this number: each has a seed of its own."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
            None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
        )


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: Text | list[Token] | list[Text] | list[list[Token]] = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One for each text that is continued."""
        given: Any = self.prompt
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if one else list(given)


class ContentPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart]
    name: Text | None = None

    def told(self) -> dict[str, str]:
        """For a chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ResponseFormat(Body):
    type: Literal["text"]


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2000)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: ResponseFormat | None = None


class NewSession(Body):
    """`POST /v1/sessions`."""

    model: Text | None = None
    name: Text | None = None
    text: Text = ""
    ttl: Ttl | None = None


class ReadText(Body):
    """`POST /v1/sessions/{id}/read`."""

    text: Text


class Fork(Body):
    """`POST /v1/sessions/{id}/fork`."""

    name: Text | None = None
    ttl: Ttl | None = None


Kind = TypeVar("Kind", bound=Body)


def parsed(kind: type[Kind], content: bytes) -> Kind:
    """A body of JSON. Raises `ApiError` that names the field that is wrong."""
    try:
        return kind.model_validate_json(content or b"{}")
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = [str(part) for part in found["loc"]]
        field = place[0] if place else None
        problem = str(found["msg"]).removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            problem = "this field is not known, or not supported here"
        elif field in ("presence_penalty", "frequency_penalty", "logit_bias", "best_of", "suffix"):
            problem = "this field is not supported"
        where = f"{'.'.join(place)[:200]}: " if place else "The body is not what was expected: "
        raise ApiError(400, f"{where}{problem}.", param=None if field is None else field[:200]) from error


def usage(prompt: int, written: int) -> dict[str, int]:
    """The tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Offsets:
    """At which character of an answer each of its tokens begins, in the order of the tokens."""

    def __init__(self) -> None:
        self._decoder, self._characters = getincrementaldecoder("utf-8")(errors="ignore"), 0

    def before(self, content: bytes) -> int:
        """Whole characters before the next token. content: its bytes."""
        before = self._characters
        self._characters += len(self._decoder.decode(content))
        return before


def legacy_logprobs(model: ServedModel, odds: list[TokenOdds], offsets: Offsets) -> dict[str, Any]:
    """As `/v1/completions` tells them, with the bytes of each token. offsets: of the answer, which they go on with.

    A token that is no text by itself is written as `bytes:\\xe2`, as OpenAI did.
    """
    tokens = [_spelled(model, one.token) for one in odds]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in odds],
        "top_logprobs": [
            None if one.logprob is None else {_spelled(model, token): value for token, value in one.top} for one in odds
        ],
        "text_offset": [offsets.before(model.token_bytes.of(one.token)) for one in odds],
        "bytes": [list(model.token_bytes.of(one.token)) for one in odds],
    }


def chat_logprobs(model: ServedModel, odds: list[TokenOdds]) -> dict[str, Any]:
    """As `/v1/chat/completions` tells them."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        content = model.token_bytes.of(token)
        return {"token": _spelled(model, token), "logprob": logprob, "bytes": list(content)}

    return {
        "content": [
            told(one.token, one.logprob) | {"top_logprobs": [told(token, value) for token, value in one.top]}
            for one in odds
        ],
        "refusal": None,
    }


def _spelled(model: ServedModel, token: int) -> str:
    content = model.token_bytes.of(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def joined(pieces: list[Piece]) -> tuple[str, list[TokenOdds]]:
    """Pieces as one."""
    return "".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.odds]
