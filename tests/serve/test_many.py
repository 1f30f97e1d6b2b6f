"""Many requests at the same time: nothing is mixed up, long readings let others pass, and all bounds hold."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dyadlm.engine import Engine
from dyadlm.serve import Limits
from dyadlm.serve.rows import BatchedRows
from dyadlm.serve.scheduler import Do, Inbox, Job, Scheduler

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="needs the extra serve")

PROMPTS = ("To be", "Is it? ", "The slings and arrows", "été ", "x" * 300, "or not to be " * 30)


def complete(live, **fields):
    answer = live.http.post("/v1/completions", json={"prompt": "To be", "max_tokens": 8, "seed": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def endless(live):
    """The server, whose model never ends a text by itself."""
    live.server_state.models["small"].end_tokens = frozenset()
    return live


def scheduler(live, name="small"):
    return live.server_state.models[name].scheduler


@pytest.mark.parametrize("name", ["small", "llama"])
def test_answers_to_many_clients_equal_those_to_one(shared, name):
    requests = [
        {"model": name, "prompt": PROMPTS[i % len(PROMPTS)], "seed": i, "max_tokens": 8 + 3 * (i % 11)}
        for i in range(16)
    ]
    alone = [complete(shared, **request) for request in requests]
    steps = scheduler(shared, name).steps
    tokens = scheduler(shared, name).tokens_written
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: complete(shared, **request), requests))
    assert together == alone
    written = scheduler(shared, name).tokens_written - tokens
    assert scheduler(shared, name).steps - steps < written  # they did move on together


def test_sessions_of_many_clients_stay_apart(shared):
    def talk(number, session):
        return [complete(shared, prompt=f"{number} and ", session=session, seed=step) for step in range(4)]

    def fresh():
        return shared.http.post("/v1/sessions", json={"text": "To be "}).json()["id"]

    alone = [talk(number, fresh()) for number in range(8)]
    sessions = [fresh() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(talk, range(8), sessions))
    assert together == alone


def small_rows(weights):
    model = weights["small"][0]
    return BatchedRows(
        Engine(model.config.to_dict(), {name: part.numpy() for name, part in model.state_dict().items()})
    )


def test_rows_that_come_and_go_keep_their_own_state(weights):
    rows, random = small_rows(weights), np.random.default_rng(0)
    texts = [random.integers(0, 256, 40) for _ in range(9)]
    live = [rows.start() for _ in texts]
    at = [0] * len(texts)
    while any(at[i] < 40 for i in range(9)):
        chosen = [i for i in range(9) if at[i] < 40 and random.random() < 0.6]
        if chosen:
            rows.step([live[i] for i in chosen], [int(texts[i][at[i]]) for i in chosen])
        for i in chosen:
            at[i] += 1
        if random.random() < 0.3 and (waiting := [i for i in range(9) if at[i] < 38]):
            i = int(random.choice(waiting))
            rows.read(live[i], texts[i][at[i] : at[i] + 2], inside=False)
            at[i] += 2
    for row, text in zip(live, texts, strict=True):
        state = rows.engine.start()
        for token in text:
            logits = rows.engine.step(state, int(token))
        np.testing.assert_allclose(row.logits, logits, atol=1e-4)
        rows.release(row, keep=True)
        for name, array in state.arrays().items():
            np.testing.assert_allclose(row.state.arrays()[name], array, atol=1e-4, err_msg=name)


def test_a_long_text_is_read_to_the_state_of_single_tokens(weights):
    model = weights["small"][0]
    engine = Engine(model.config.to_dict(), {name: part.numpy() for name, part in model.state_dict().items()})
    ids = np.random.default_rng(0).integers(0, 256, 300)
    rows = BatchedRows(engine)
    one, other = rows.start(), rows.start()
    told = rows.read(one, ids, True)
    expected = [rows.read(other, ids[at : at + 1], True) for at in range(300)]
    np.testing.assert_allclose(told.nats, np.concatenate([part.nats for part in expected]), atol=1e-4)
    np.testing.assert_allclose(told.logits, np.concatenate([part.logits for part in expected]), atol=1e-3)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-3)
    assert one.tokens == other.tokens == 300
    for name, array in other.state.arrays().items():
        np.testing.assert_allclose(one.state.arrays()[name], array, atol=1e-3, err_msg=name)


def test_a_long_reading_lets_short_requests_pass(serve):
    live = serve()
    done = threading.Event()

    def read():
        live.http.post("/v1/sessions", json={"text": "To be, or not to be. " * 20_000}, timeout=300)
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    wait_for(lambda: scheduler(live).live == 1)
    complete(live, max_tokens=30)
    assert not done.is_set()
    for model in live.server_state.models.values():
        for one in model.scheduler._live:
            one.job.cancel()
    thread.join()


def test_requests_beyond_the_queue_are_sent_away(serve):
    live = endless(serve(limits=Limits(streams=1, queue=1)))
    body = {"prompt": "To be", "max_tokens": 60_000, "stream": True}
    with live.http.stream("POST", "/v1/completions", json=body) as first:
        lines = first.iter_lines()  # kept: httpx closes the answer with it
        next(lines)
        waiting = threading.Thread(target=lambda: complete(live, max_tokens=1))
        waiting.start()
        wait_for(lambda: scheduler(live).waiting == 1)
        refused = live.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
    waiting.join()
    assert complete(live, max_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_served_on(serve, stream):
    live = endless(serve())
    body = {"prompt": "To be", "max_tokens": 60_000, "stream": stream}
    with httpx.Client(base_url=live.url) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.5)
    wait_for(lambda: scheduler(live).live == 0, seconds=5)
    assert scheduler(live).tokens_written < 60_000


def test_a_client_that_leaves_leaves_its_session_as_it_was(serve):
    live = endless(serve())
    session = live.http.post("/v1/sessions", json={"text": "To be"}).json()["id"]
    body = {"prompt": ", ", "max_tokens": 60_000, "stream": True, "session": session}
    with live.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = live.http.post("/v1/completions", json={"prompt": "x", "session": session})
        assert busy.status_code == 409
        assert complete(live, session=session, keep=False, max_tokens=2)  # as it stood before
    wait_for(lambda: scheduler(live).live == 0, seconds=5)
    wait_for(lambda: not asyncio.run(live.server_state.store.find(session)).busy, seconds=5)
    assert live.http.get(f"/v1/sessions/{session}").json()["tokens"] == 5


def test_a_request_ends_at_its_deadline(serve):
    live = endless(serve(limits=Limits(deadline=0.5)))
    refused = live.http.post("/v1/completions", json={"prompt": "To be", "max_tokens": 60_000})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "deadline_exceeded"
    body = {"prompt": "To be", "max_tokens": 60_000, "stream": True}
    with live.http.stream("POST", "/v1/completions", json=body) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"


def test_memory_does_not_grow_with_requests_that_are_over(serve):
    live = endless(serve())
    for number in range(40):
        session = live.http.post("/v1/sessions", json={"text": f"To be {number}"}).json()["id"]
        complete(live, session=session)
        live.http.delete(f"/v1/sessions/{session}")
    store, rows = live.server_state.store, live.server_state.models["small"].rows
    assert (store.memory_bytes, store.disk_bytes, len(store)) == (0, 0, 0)
    assert not rows._seated
    assert rows._seats.rows <= 4


def test_a_prompt_that_is_too_long_is_refused_and_the_others_go_on(serve):
    live = serve(("llama",))
    live.server_state.models["llama"].context = 40
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(live.http.post, "/v1/completions", json={"prompt": "a", "max_tokens": 30}) for _ in "abc"]
        refused = live.http.post("/v1/completions", json={"prompt": "b" * 50, "max_tokens": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert all(other.result().status_code == 200 for other in others)


def test_a_request_that_cannot_begin_fails_alone(serve, monkeypatch):
    live = serve()
    rows = scheduler(live).rows

    def no_memory():
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(rows, "start", no_memory)
    body = {"prompt": "To be", "max_tokens": 1}
    assert live.http.post("/v1/completions", json=body, timeout=10).status_code == 500
    assert live.http.post("/v1/completions", json=body, timeout=10).status_code == 200
    assert live.http.get("/health").status_code == 200


def test_a_row_that_cannot_be_given_back_ends_its_request(serve, monkeypatch):
    live = serve()
    rows = scheduler(live).rows

    def no_memory(row, keep=False):
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(rows, "release", no_memory)
    body = {"prompt": "To be", "max_tokens": 1}
    assert live.http.post("/v1/completions", json=body, timeout=10).status_code == 500
    assert live.http.post("/v1/completions", json=body, timeout=10).status_code == 200


def test_health_tells_of_a_thread_that_has_ended(serve):
    live = serve()
    scheduler(live).close(0.0)
    answer = live.http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_failed"


def test_requests_that_were_given_up_take_no_room_in_the_queue(weights):
    async def check():
        rows, inbox, goes_on = small_rows(weights), Inbox(), threading.Event()
        served = Scheduler(rows, streams=1, queue=1)

        def work(job):
            yield Do(lambda row: goes_on.wait(20))

        jobs = [Job(work, inbox, index=index) for index in range(3)]
        served.submit(jobs[0])
        while not served.live:
            await asyncio.sleep(0.01)
        served.submit(jobs[1])
        jobs[1].cancel()
        try:
            served.submit(jobs[2])
        finally:
            goes_on.set()
            served.close(10)

    asyncio.run(check())
