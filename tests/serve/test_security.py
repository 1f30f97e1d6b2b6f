"""Who is let in: keys, names of the server, pages of other origins, the size of bodies, hostile requests."""

import asyncio
import hmac
import random
from pathlib import Path

import pytest

from dyadlm.errors import UserError
from dyadlm.serve import Limits
from dyadlm.serve.errors import ApiError
from dyadlm.serve.security import bounded

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="needs the extra serve")

KEY = "a-long-secret"


def test_a_key_is_asked_for(serve, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    live = serve(key=KEY, hosts=None)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}):
        refused = live.http.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert KEY not in refused.text
    assert live.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert live.http.get("/health").status_code == 200
    assert (b"wrong", KEY.encode()) in compared  # in constant time


def test_a_foreign_host_name_is_refused(shared):
    assert shared.http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert shared.http.get("/v1/models", headers={"host": "evil.example:8000"}).status_code == 403
    assert shared.http.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_pages_of_other_origins_are_refused(shared, headers):
    refused = shared.http.post("/v1/sessions", json={}, headers=headers)
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_its_own_page_is_let_in(shared):
    own = {"origin": shared.url, "sec-fetch-site": "same-origin"}
    assert shared.http.get("/v1/models", headers=own).status_code == 200


def test_no_other_origin_may_read_an_answer(shared):
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = shared.http.options("/v1/completions", headers=asked)
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_bounded(serve, chunked):
    live = serve(limits=Limits(body_bytes=1000))
    content = b'{"prompt": "' + b"x" * 5000 + b'"}'
    answer = live.http.post("/v1/completions", content=iter([content]) if chunked else content)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_a_body_that_comes_byte_by_byte_is_refused(monkeypatch):
    monkeypatch.setattr("dyadlm.serve.security.BODY_SECONDS", 0.3)

    async def slow():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read():
        receive = bounded(slow, 1000)
        for _ in range(100):
            await receive()

    with pytest.raises(ApiError, match="in time"):
        asyncio.run(read())


def test_others_are_served_only_with_a_key():
    from dyadlm.serve.running import require_key

    require_key("127.0.0.1", None)
    require_key("0.0.0.0", KEY)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="give a key"):
            require_key(host, None)
    with pytest.raises(UserError, match="printable"):
        require_key("127.0.0.1", "two\nlines")


@pytest.mark.slow
def test_hostile_requests_are_answered(shared, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from hostile_requests import hostile

    chance = random.Random(0)
    for number in range(800):
        asked = hostile(chance)
        try:
            answer = shared.http.request(asked.method, asked.path, content=asked.content, headers=asked.headers)
        except (httpx.InvalidURL, httpx.LocalProtocolError):
            continue  # the client refuses to send it
        assert answer.status_code < 500, (number, asked, answer.text)
    assert shared.http.get("/health").status_code == 200
    files = [path.relative_to(shared.folder) for path in shared.folder.rglob("*") if path.is_file()]
    assert all(path.suffix == ".state" and len(path.parts) == 2 for path in files)
    for session in shared.http.get("/v1/sessions").json()["data"]:
        shared.http.delete(f"/v1/sessions/{session['id']}")
