"""What is checked before a request is looked at: where it comes from, its key, and the size of its body.

A page of any other site can make a browser send requests to a server on this machine. Three things stop it: the Host
header has to be a name of the server (a foreign name that resolves to 127.0.0.1 is refused), the Origin header has to
be that of the server, and no answer allows other origins to read it.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from dyadlm.serve.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Paths that are served without a key: they tell nothing, and a page has to load before it can ask for the key.
OPEN_PATHS = ("/health", "/", "/favicon.ico")
OPEN_FOLDERS = ("/page/",)
BODY_SECONDS, PART_SECONDS = 600.0, 60.0  # for a client to send a body, and each part of it
SEND_SECONDS = 30.0  # for a client to take a part of an answer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientStalled(Exception):
    """The client does not take its answer; whatever the request holds is given back."""


class Gate:
    """Middleware (ASGI) in front of everything."""

    def __init__(
        self,
        app: Any,
        key: str | None,
        hosts: Iterable[str] | None,
        body_bytes: int,
        larger: Callable[[str], int | None],
        answered: Callable[[str, int], None],
    ):
        """key: that requests have to name; None: none. hosts: names that a Host header may have; None: any. larger: the
        bound of the body for a path, where it is another than body_bytes. answered: is told route and status."""
        self._app, self._key, self._body_bytes, self._larger = app, key, body_bytes, larger
        self._answered = answered
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1")] = value.decode("latin-1")
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                self._answered(getattr(scope.get("route"), "path", "other"), message["status"])
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ]
            try:
                await asyncio.wait_for(send(message), SEND_SECONDS)
            except TimeoutError:
                raise ClientStalled from None

        try:
            self._require_place(scope, headers)
            self._require_key(scope["path"], headers)
            bound = self._larger(scope["path"]) or self._body_bytes
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length[:20]) > bound:
                raise too_large(bound)
            await self._app(scope, bounded(receive, bound), sending)
        except ApiError as error:
            if began:
                raise
            await refuse(sending, error)
        except ClientStalled:
            return  # the server closes the connection

    def _require_place(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and name_of(host) not in self._hosts:
            raise ApiError(
                403,
                "The Host header names another server than this one; use the address that `dyadlm serve` printed, or "
                "start it with --allow-host.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "Requests from pages of other origins are refused.", code="origin_not_allowed")
        visits = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not visits:
            raise ApiError(403, "Requests from pages of other sites are refused.", code="origin_not_allowed")

    def _require_key(self, path: str, headers: dict[str, str]) -> None:
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time, so that the time of an answer tells nothing of the key.
        same = hmac.compare_digest(given.strip().encode(), self._key.encode())
        if scheme.lower() != "bearer" or not same:
            message = "Give the key of this server in a header: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key")


def name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def too_large(bound: int) -> ApiError:
    return ApiError(413, f"The body is larger than {bound} bytes; send less at once.", code="body_too_large")


def bounded(receive: Receive, bound: int) -> Receive:
    """The same messages; raises `ApiError` once the body is too large, or takes too long to come."""
    taken, complete, end = 0, False, asyncio.get_running_loop().time() + BODY_SECONDS

    async def receiving() -> Message:
        nonlocal taken, complete
        if complete:
            return await receive()
        try:
            left = end - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(receive(), min(PART_SECONDS, left))
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.", code="body_too_slow") from None
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > bound:
                raise too_large(bound)
        return message

    return receiving


async def refuse(send: Send, error: ApiError) -> None:
    """Answer with an error, and close the connection: the rest of its body is not read."""
    content = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
    encoded = [(name.lower().encode(), value.encode()) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})
