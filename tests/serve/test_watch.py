"""`/v1/watch` over HTTP: what it tells, how sessions move with it, what it refuses, and the page's files."""

import asyncio
import json
import socket
import threading
import time

import pytest

from dyadlm.data.encoding import ByteTokenizer
from dyadlm.generate import Sampling, Session

pytest.importorskip("fastapi", reason="needs the extra serve")

from dyadlm.serve.watching import Watcher

TEXT = "To be, or not to be: that is the question.\n"


def watch(live, **body):
    """All events but the last, and the last."""
    found = []
    with live.http.stream("POST", "/v1/watch", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
    return found[:-1], found[-1]


def session(live, **fields):
    answer = live.http.post("/v1/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def distances(events):
    return [[slot["distance"] for slot in event["slots"]] for event in events]


def test_it_tells_what_a_watcher_tells(shared, weights):
    events, last = watch(shared, model="small", text=TEXT, max_tokens=20, seed=4, top=5)
    watcher = Watcher(weights["small"][0], ByteTokenizer(), top=5)
    chunks = [*watcher.read(list(TEXT.encode())), *watcher.write(20, Sampling(seed=4))]
    slow = [moment for chunk in chunks for moment in chunk]
    assert len(events) == len(TEXT) + 20
    expected = [json.loads(json.dumps(moment.as_json())) for moment in slow]
    exact = ("index", "token", "text", "name", "read", "segments", "slots", "state_bytes")
    for event, own in zip(events, expected, strict=True):
        assert {key: event[key] for key in exact} == {key: own[key] for key in exact}
        assert event["bits"] == (None if own["bits"] is None else pytest.approx(own["bits"], abs=1e-3))
        assert event["entropy"] == pytest.approx(own["entropy"], abs=1e-3)
        assert [p for _, p in event["top"]] == pytest.approx([p for _, p in own["top"]], abs=1e-4)
        assert [level["name"] for level in event["levels"]] == [level["name"] for level in own["levels"]]
        norms = [[level["norm"] for level in one["levels"]] for one in (event, own)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        assert event["ms"] > 0
    assert last["done"]
    assert last["session"] is None
    assert last["tokens_per_second"] > 0


def test_a_session_moves_with_it(shared, weights):
    own = session(shared, model="small", text=TEXT)
    first, last = watch(shared, session=own, text="Whether ", max_tokens=9, seed=2)
    assert last["session"]["tokens"] == len(TEXT) + 17
    assert last["session"]["tail"].endswith("".join(event["text"] for event in first))
    assert first[0]["index"] == len(TEXT)
    assert first[0]["bits"] is not None, "what the session read predicts it"
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT + "Whether ")
    assert "".join(alone.write(9, Sampling(seed=2))) == "".join(event["text"] for event in first[8:])
    body = {"prompt": "", "session": own, "max_tokens": 12, "seed": 5}
    answer = shared.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert answer == "".join(alone.write(12, Sampling(seed=5)))


def test_distances_go_on_in_sessions_and_their_forks(shared):
    whole, _ = watch(shared, model="small", text=TEXT * 2)
    own = session(shared, model="small")
    first, _ = watch(shared, session=own, text=TEXT)
    fork = shared.http.post(f"/v1/sessions/{own}/fork", json={}).json()["id"]
    for one in (own, fork):
        rest, _ = watch(shared, session=one, text=TEXT)
        assert distances(first + rest) == distances(whole)
        assert [e["segments"] for e in first + rest] == [e["segments"] for e in whole]


def test_a_restored_session_knows_no_distance_of_what_it_did_not_see(shared):
    own = session(shared, model="small", text=TEXT)
    rest, _ = watch(shared, session=own, text=TEXT)
    hits = [slot for event in rest for slot in event["slots"] if slot["hit"]]
    assert any(slot["distance"] is None for slot in hits)
    assert all(slot["distance"] is None or slot["distance"] <= len(TEXT) for slot in hits)


def test_quiet_reading_leaves_the_same_session(shared):
    loud, quiet = session(shared, model="small"), session(shared, model="small")
    watch(shared, session=loud, text=TEXT)
    events, last = watch(shared, session=quiet, tokens=list(TEXT.encode()), quiet=True)
    assert events == []
    assert last["session"]["tokens"] == len(TEXT)
    one, other = (watch(shared, session=own, text=TEXT, max_tokens=10, seed=1)[0] for own in (loud, quiet))
    assert [event["token"] for event in one] == [event["token"] for event in other]
    assert distances(one) == distances(other)


def test_a_model_writes_from_nothing(shared):
    events, _ = watch(shared, model="small", max_tokens=5, seed=1)
    assert [event["read"] for event in events] == [True] + [False] * 5
    assert events[0]["name"] == "<|begin|>"


def test_a_model_of_others_is_watched(shared):
    events, _ = watch(shared, model="llama", text="abc", max_tokens=3, seed=1)
    assert len(events) == 6
    assert not any(event["levels"] or event["segments"] or event["slots"] for event in events)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"text": "a", "tokens": [1]}, 400, "either text or tokens"),
        ({"tokens": [259]}, 400, "259 tokens"),
        ({"tokens": [-1]}, 400, ""),
        ({"text": "a", "max_tokens": 10**9}, 400, "at most"),
        ({"text": "a", "temperature": -1}, 400, ""),
        ({"text": "a", "top": 0}, 400, ""),
        ({"text": "\ud800"}, 400, ""),
        ({"text": "a", "wrong": 1}, 400, ""),
        ({"model": "none", "text": "a"}, 404, "none"),
        ({"session": "none", "text": "a"}, 404, "none"),
        ({"model": "llama", "session": "none", "text": "a"}, 400, "no sessions"),
    ],
)
def test_what_is_refused(shared, body, status, words):
    content = json.dumps(body).encode()
    answer = shared.http.post("/v1/watch", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_session_is_watched_by_one_at_a_time_and_free_when_the_client_leaves(shared, weights):
    own = session(shared, model="small", text=TEXT)
    body = {"session": own, "max_tokens": 50_000, "seed": 3}
    with shared.http.stream("POST", "/v1/watch", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = shared.http.post("/v1/watch", json={"session": own, "text": "a"})
        assert busy.status_code == 409
    until = time.monotonic() + 20
    while (again := shared.http.post("/v1/watch", json={"session": own, "max_tokens": 0})).status_code == 409:
        assert time.monotonic() < until, "the session is free again"
        time.sleep(0.05)
    record = json.loads(again.text.split("data: ")[1])["session"]
    read = record["tokens"] - len(TEXT)
    assert 0 < read < 50_000
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT)
    assert record["tail"].endswith("".join(alone.write(read, Sampling(seed=3)))[-100:])
    rest = shared.http.post("/v1/completions", json={"prompt": "", "session": own, "max_tokens": 8, "seed": 1}).json()
    assert rest["choices"][0]["text"] == "".join(alone.write(8, Sampling(seed=1)))


def test_too_many_at_once_are_refused_with_when_to_come_again(shared, monkeypatch):
    monkeypatch.setattr("dyadlm.serve.watch.MOST", 1)
    with shared.http.stream("POST", "/v1/watch", json={"text": "a", "max_tokens": 50_000, "temperature": 0}) as answer:
        next(answer.iter_lines())
        refused = shared.http.post("/v1/watch", json={"text": "a"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
    until = time.monotonic() + 20
    while shared.http.post("/v1/watch", json={"text": "a"}).status_code == 429:
        assert time.monotonic() < until, "there is room again"
        time.sleep(0.05)


def test_a_deadline_ends_a_stream_in_an_event(serve):
    from dyadlm.serve import Limits

    live = serve(limits=Limits(deadline=0.2))
    _, last = watch(live, text="a", max_tokens=50_000, temperature=0)
    assert last["error"]["code"] == "deadline_exceeded"


def test_the_page_answers_while_64_texts_are_written(shared):
    """And it can be watched meanwhile."""
    running, done = threading.Event(), []

    async def stream(client):
        body = {"prompt": TEXT, "model": "small", "max_tokens": 300, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                running.set()
        done.append(answer.status_code)

    async def load():
        import httpx

        async with httpx.AsyncClient(base_url=shared.url, timeout=120) as client:
            await asyncio.gather(*(stream(client) for _ in range(64)))

    loading = threading.Thread(target=lambda: asyncio.run(load()))
    loading.start()
    assert running.wait(60)
    began = time.monotonic()
    assert shared.http.get("/").status_code == 200
    assert shared.http.get("/page/app.js").status_code == 200
    page = time.monotonic() - began
    events, last = watch(shared, model="small", text=TEXT, max_tokens=5)
    watched = time.monotonic() - began
    meanwhile = len(done) < 64
    loading.join()
    assert done == [200] * 64
    assert meanwhile, "the texts were still written"
    assert last["done"]
    assert len(events) == len(TEXT) + 5
    print(f"page {page:.3f} s, watched {watched:.3f} s beside 64 streams")


def test_the_files_of_the_page_are_served_under_a_strict_policy(shared):
    for path in ("/", "/page/app.js", "/page/client.js", "/page/future.js", "/page/pictures.js", "/page/style.css"):
        answer = shared.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text
        assert "innerHTML" not in answer.text
    assert shared.http.get("/page/nothing.js").status_code == 404
    assert shared.http.get("/page/..%2fapp.py").status_code == 404


def test_a_session_stands_where_it_stood_when_reading_fails(serve, monkeypatch):
    from dyadlm.errors import RunFailed
    from dyadlm.serve import watching

    live = serve()
    own, calls, require_numbers = session(live, text=TEXT), [], watching.require_numbers

    def fails_at_the_second(logits):
        calls.append(1)
        if len(calls) == 2:
            raise RunFailed("Not numbers.")
        return require_numbers(logits)

    monkeypatch.setattr(watching, "require_numbers", fails_at_the_second)
    events, last = watch(live, session=own, text="a" * 300)
    assert len(events) == 128
    assert last["error"]["code"] == "model_failed"
    assert live.http.get(f"/v1/sessions/{own}").json()["tokens"] == len(TEXT)
    monkeypatch.undo()
    events, _ = watch(live, session=own, text="Whether ")
    assert events[0]["index"] == len(TEXT)


def test_a_client_that_does_not_read_loses_its_place(serve, monkeypatch):
    monkeypatch.setattr("dyadlm.serve.security.SEND_SECONDS", 0.5)
    monkeypatch.setattr("dyadlm.serve.watch.MOST", 1)
    live = serve()
    live.server_state.models["small"].end_tokens = frozenset()
    own = session(live, text=TEXT)
    long = {"prompt": "a", "session": own, "max_tokens": 60_000, "stream": True, "logprobs": 20}
    with (
        stalled(live, "/v1/watch", {"text": "a" * 100_000, "top": 100}),
        stalled(live, "/v1/completions", long),
    ):
        wait_for(lambda: scheduler_of(live).live == 1)
        wait_for(lambda: live.http.post("/v1/watch", json={"text": "a"}).status_code == 429)
        wait_for(lambda: live.http.post("/v1/watch", json={"text": "a"}).status_code == 200)
        wait_for(lambda: scheduler_of(live).live == 0)
        assert live.http.post("/v1/completions", json={"session": own, "max_tokens": 1}).status_code == 200


def scheduler_of(live):
    return live.server_state.models["small"].scheduler


def stalled(live, path, body):
    """A client that sends a request and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(live.url.rpartition(":")[2])))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
