"""Requests that no client should send: wrong types, endless nesting, broken JSON, odd text, paths that lead away."""

import json
import random
from typing import Any, NamedTuple

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/score", "/v1/sessions",
    "/v1/sessions/restore", "/v1/sessions/{}", "/v1/sessions/{}/read", "/v1/sessions/{}/fork", "/v1/sessions/{}/save",
    "/v1/sessions/{}/state", "/v1/models", "/v1/models/{}", "/health", "/metrics", "/{}",
)  # fmt: skip
FIELDS: dict[str, tuple[str, ...]] = {
    "/v1/completions": (
        "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "logprobs",
        "echo", "session", "keep", "stream_options", "best_of", "suffix", "logit_bias",
    ),
    "/v1/chat/completions": (
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n",
        "stream", "logprobs", "top_logprobs", "session", "keep", "response_format",
    ),
    "/tokenize": ("model", "text"),
    "/detokenize": ("model", "tokens"),
    "/score": ("model", "text", "per"),
    "/v1/sessions": ("model", "name", "text", "ttl"),
    "/v1/sessions/{}/read": ("text",),
    "/v1/sessions/{}/fork": ("name",),
}  # fmt: skip
NAMES = (
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", ".", "..", "a" * 300, "sess_" + "A" * 22, "nul\0", "é", "fuzz",
    "{}", "%7B%7D", "a/b", "~", "con", "\\\\host\\share", "-rf", "*", "?", "#", "%", "%zz",
)  # fmt: skip
TEXTS = (
    "", "a", "To be", "\0", "\ufeff", "\ud800", "\U0001f600", "e\u0301" * 50, "<|end|>", "<|begin|><|pad|>", "\n" * 50,
    "x" * 2000, "été €", "\u202e", "{{7*7}}", "'; DROP TABLE", "\x7f\x80\xff",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    5,
    1e308,
    -1e308,
    1e-320,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    1.5,
    float("nan"),
    float("inf"),
)


class Hostile(NamedTuple):
    method: str
    path: str
    content: bytes
    headers: dict[str, str]


def hostile(random: random.Random) -> Hostile:
    """One of them."""
    path = random.choice(PATHS)
    method = "POST" if path in FIELDS or random.random() < 0.5 else "GET"
    if random.random() < 0.1:
        method = random.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"))
    content = _content(random, FIELDS.get(path, ("text", "name")))
    headers = {}
    if random.random() < 0.1:
        headers["content-type"] = random.choice(
            ("text/plain", "multipart/form-data", "application/json; charset=utf-16", ";")
        )
    if random.random() < 0.03:
        headers[random.choice(("origin", "host", "authorization", "sec-fetch-site"))] = random.choice(
            ("null", "http://evil.example", "evil.example:80", "Bearer", "Bearer x", "cross-site", "[", ":")
        )
    name = random.choice(NAMES)
    return Hostile(method, path.format(_quoted(name)) if "{}" in path else path, content, headers)


def _quoted(name: str) -> str:
    return "".join(
        letter if letter.isascii() and letter.isprintable() and letter not in " #?" else "%41" for letter in name
    )


def _content(random: random.Random, fields: tuple[str, ...]) -> bytes:
    kind = random.random()
    if kind < 0.05:
        return random.randbytes(random.randrange(64))
    if kind < 0.08:
        return b'{"prompt":' + b"[" * random.choice((50, 5000, 100_000))
    if kind < 0.11:
        return json.dumps(_value(random, 3)).encode()
    body: dict[str, Any] = {}
    if "prompt" in fields and random.random() < 0.8:
        body["prompt"] = random.choice(TEXTS)
    if "messages" in fields and random.random() < 0.8:
        body["messages"] = [{"role": random.choice(("user", "system", "assistant")), "content": random.choice(TEXTS)}]
        body["model"] = "talker"
    if "text" in fields and random.random() < 0.8:
        body["text"] = random.choice(TEXTS)
    if "tokens" in fields:
        body["tokens"] = [random.choice((0, 65, 258, 259, -1, 2**40)) for _ in range(random.randrange(5))]
    for field in random.sample(fields, random.randrange(min(len(fields), 4) + 1)):
        body[field] = _likely(random, field) if random.random() < 0.6 else _value(random, 2)
    if not body.get("max_tokens") or not isinstance(body["max_tokens"], int) or body["max_tokens"] > 4:
        body |= {"max_tokens": random.choice((0, 1, 3))} if "max_tokens" in fields and random.random() < 0.9 else {}
    if random.random() < 0.02:
        body[random.choice(TEXTS)] = 1
    content = json.dumps(body, ensure_ascii=random.random() < 0.7).encode(errors="surrogatepass")
    if random.random() < 0.1:
        cut = random.randrange(len(content))
        content = content[:cut] + random.randbytes(random.randrange(4)) + content[cut + random.randrange(3) :]
    return content


def _likely(random: random.Random, field: str) -> Any:
    """Near what the field takes."""
    if field in ("temperature", "top_p", "ttl"):
        return random.choice((0, 0.0, 0.5, 1, 1e-30, 2, 99, 1e9))
    if field in ("max_tokens", "max_completion_tokens", "n", "logprobs", "top_logprobs", "top_k", "seed", "best_of"):
        return random.choice((0, 1, 2, 3, 20, 21, 2**31, -1))
    if field in ("stream", "echo", "keep"):
        return random.random() < 0.5
    if field == "stop":
        return random.choice(("e", ["a", "b"], "\n", "", ["x"] * 20, "é"))
    if field == "model":
        return random.choice(("small", "talker", "llama", "none", None, "../small"))
    if field in ("name", "session"):
        return random.choice((*NAMES, "fuzz", None))
    if field == "per":
        return random.choice(("token", "line", "document"))
    return random.choice(TEXTS)


def _value(random: random.Random, depth: int) -> Any:
    kind = random.randrange(7 if depth else 5)
    if kind == 0:
        return random.choice(TEXTS)
    if kind == 1:
        return random.choice(NUMBERS)
    if kind in (2, 3):
        return random.choice((None, True, False, [], {}))
    if kind == 4:
        return random.choice(NAMES)
    if kind == 5:
        return [_value(random, depth - 1) for _ in range(random.randrange(4))]
    return {str(random.choice(NAMES)): _value(random, depth - 1) for _ in range(random.randrange(4))}
