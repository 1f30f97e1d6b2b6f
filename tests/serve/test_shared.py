"""Replicas: several servers on one folder, or one Redis, of which any continues any session."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dyadlm.errors import UserError
from dyadlm.files import locked
from dyadlm.generate import Sampling, Session
from dyadlm.serve import Limits, ServedModel
from dyadlm.serve.errors import ApiError
from dyadlm.serve.session_record import fits
from dyadlm.serve.session_storage import FileClaim, FolderStorage, shared_storage
from dyadlm.serve.sessions import SessionStore
from dyadlm.serve.shared_sessions import SharedSessions

pytest.importorskip("fastapi", reason="needs the extra serve")

TEXT = "To be, or not to be: that is the question.\n"


@pytest.fixture(params=["folder", "redis"])
def place(request, tmp_path):
    """Where sessions are shared."""
    if request.param == "folder":
        return tmp_path / "shared"
    url = request.getfixturevalue("redis_url")  # which skips the test where there is no Redis
    import redis

    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def pair(serve, place):
    """Two replicas."""
    return tuple(serve(folder=place, shared=True) for _ in range(2))


def make(live, **fields):
    answer = live.http.post("/v1/sessions", json={"text": TEXT, **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def complete(live, session, prompt="Whether ", **fields):
    body = {"prompt": prompt, "session": session, "max_tokens": 12, "seed": 5, **fields}
    answer = live.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def told(live, session):
    return live.http.get(f"/v1/sessions/{session}").json()


def test_any_replica_continues_any_session(pair, weights):
    session = make(pair[0])
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT)
    for number, prompt in enumerate(("Whether ", "'tis ", "nobler ", "in")):
        alone.read_prompt(prompt)
        assert complete(pair[(number + 1) % 2], session["id"], prompt) == "".join(alone.write(12, Sampling(seed=5)))
    one, other = (told(live, session["id"]) for live in pair)
    assert one["tokens"] == other["tokens"] == len(TEXT + "Whether 'tis nobler in") + 48
    assert (one["tail"], one["place"]) == (other["tail"], "shared")
    assert all(live.server_state.store.memory_bytes > 0 for live in pair)


def test_forks_names_and_deletions_are_seen_by_all(pair):
    session = make(pair[0], name="mine")
    fork = pair[1].http.post("/v1/sessions/mine/fork", json={"name": "other"}).json()
    assert fork["parent"] == session["id"]
    assert complete(pair[0], "other") == complete(pair[1], "mine")
    assert {one["id"] for one in pair[1].http.get("/v1/sessions").json()["data"]} >= {session["id"], fork["id"]}
    assert pair[1].http.post("/v1/sessions", json={"name": "mine"}).json()["error"]["code"] == "name_taken"
    content = pair[1].http.get("/v1/sessions/mine/state").content
    expected = complete(pair[1], "mine", keep=False)
    assert pair[0].http.delete("/v1/sessions/mine").status_code == 200
    assert pair[1].http.get("/v1/sessions/mine").status_code == 404
    assert pair[1].http.post("/v1/sessions/restore", params={"name": "mine"}, content=content).status_code == 201
    assert complete(pair[0], "mine") == expected


@pytest.mark.parametrize("name", ["../up", "", "a/b", "x" * 300, "\\ud800", "*", "sess_mine"])
def test_names_lead_nowhere(pair, name):
    body = b'{"prompt": "a", "session": "%s"}' % name.encode()
    answer = pair[0].http.post("/v1/completions", content=body)
    assert answer.status_code in (400, 404), answer.text
    assert pair[0].http.post("/v1/sessions", content=b'{"name": "%s"}' % name.encode()).status_code == 400


def test_one_replica_at_a_time_changes_a_session(pair):
    """Reading it is always possible."""
    for live in pair:
        live.server_state.models["small"].end_tokens = frozenset()  # it writes as long as it is asked to
    session = make(pair[0])["id"]
    before = told(pair[1], session)
    body = {"prompt": "a", "session": session, "max_tokens": 60_000, "stream": True}
    refused = {"prompt": "b", "session": session, "max_tokens": 1}
    with pair[0].http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        for live in pair:
            answer = live.http.post("/v1/completions", json=refused)
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == "session_busy"
            assert answer.headers["Retry-After"]
            assert live.http.delete(f"/v1/sessions/{session}").status_code == 409
        assert complete(pair[1], session, keep=False)
        assert pair[1].http.post(f"/v1/sessions/{session}/fork", json={}).json()["tokens"] == before["tokens"]
    until(lambda: pair[1].http.post("/v1/completions", json=refused).status_code == 200)
    assert told(pair[0], session)["tokens"] == before["tokens"] + 2  # nothing of what the client left


def test_nothing_is_lost_where_many_write_to_one_session(pair, weights):
    session = make(pair[0])["id"]
    accepted: list[str] = []
    counting = threading.Lock()

    def write(number):
        for step in range(6):
            live, letter = pair[(number + step) % 2], chr(97 + number)
            answer = live.http.post(f"/v1/sessions/{session}/read", json={"text": letter})
            assert answer.status_code in (200, 409), answer.text
            if answer.status_code == 200:
                with counting:
                    accepted.append(letter)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert accepted
    found = told(pair[1], session)
    assert found["tokens"] == len(TEXT) + len(accepted)
    assert found["tail"].startswith(TEXT)
    order = found["tail"][len(TEXT) :]
    assert sorted(order) == sorted(accepted)
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT + order + "x")
    assert complete(pair[0], session, "x") == "".join(alone.write(12, Sampling(seed=5)))


def test_a_name_is_given_once_where_all_ask_at_once(pair):
    def ask(number):
        return pair[number % 2].http.post("/v1/sessions", json={"name": "one"}).status_code

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(ask, range(8)))
    assert sorted(codes) == [201] + [409] * 7


def test_a_session_that_is_not_used_is_deleted_everywhere(pair):
    session = make(pair[0], name="short", ttl=0.3)["id"]
    until(lambda: pair[1].http.get(f"/v1/sessions/{session}").status_code == 404)
    assert pair[0].http.post("/v1/completions", json={"prompt": "a", "session": "short"}).status_code == 404
    for live in pair:
        live.server_state.store._counted = 0.0  # count now
    until(lambda: len(pair[0].server_state.store) == 0)
    if isinstance(pair[0].folder, str):
        return
    until(lambda: not [path for path in pair[0].folder.rglob("*") if path.is_file()])


def test_the_number_of_sessions_is_bounded(serve, place):
    live = serve(folder=place, shared=True, limits=Limits(sessions=2))
    store = live.server_state.store
    until(lambda: store._counted)
    make(live), make(live)
    answer = live.http.post("/v1/sessions", json={})
    assert answer.json()["error"]["code"] == "too_many_sessions"


def stored(place, weights, **limits):
    """Sessions without a server, and their model."""
    own = Limits(**limits)
    model = ServedModel("small", *weights["small"], own)
    return SharedSessions(shared_storage(place), {"small": model}, own), model


def test_a_state_is_read_once_while_nobody_changes_it(place, weights, monkeypatch):
    sessions, model = stored(place, weights)
    loads = []
    load = model.rows.load
    monkeypatch.setattr(model.rows, "load", lambda path: loads.append(path) or load(path))

    async def use():
        session = await sessions.add(model, model.rows.start(), None, None, "")
        for _ in range(3):
            await sessions.row_of(await sessions.find(session.id))
        assert not loads
        sessions._drop(session.id)
        await sessions.row_of(await sessions.find(session.id))
        assert len(loads) == 1
        await sessions.delete(session)
        assert sessions.memory_bytes == 0
        await sessions.close()

    asyncio.run(use())
    model.scheduler.close(0)


def test_a_claim_that_nobody_waits_for_any_more_is_let_go(tmp_path, weights, monkeypatch):
    """Apart from the thread that answers all requests, for storage may take its time."""
    sessions, model = stored(tmp_path, weights)
    storage, asked, threads = sessions._storage, threading.Event(), []
    claim, release = storage.claim, FileClaim.release

    def slow(key):
        asked.wait(20)
        return claim(key)

    def released(own):
        release(own)
        threads.append(threading.current_thread())

    async def use():
        session = await sessions.add(model, model.rows.start(), None, None, "")
        monkeypatch.setattr(FileClaim, "release", released)
        monkeypatch.setattr(storage, "claim", slow)
        request = asyncio.create_task(sessions.delete(session))
        await asyncio.sleep(0.05)
        request.cancel()
        asked.set()
        while not threads:
            await asyncio.sleep(0.01)
        monkeypatch.undo()
        assert threads != [threading.current_thread()]
        await sessions.delete(session)
        await sessions.close()

    asyncio.run(use())
    model.scheduler.close(0)


def test_a_claim_that_ran_out_writes_nothing(redis_url, weights):
    """As of a server that was stopped for longer than its lease."""
    sessions, model = stored(redis_url, weights)

    async def use():
        session = await sessions.add(model, model.rows.start(), None, None, "before")
        other = await sessions.find(session.id)
        async with sessions.continuing(session) as row:
            sessions._storage._client.delete(f"dyadlm:{session.id}:lock")
            async with others.continuing(other):
                with pytest.raises(ApiError, match="stopped for too long"):
                    await sessions.commit(session, row, "lost")
        assert (await sessions.find(session.id)).tail == "before"
        await sessions.delete(other)
        await sessions.close()
        await others.close()

    others, second = stored(f"{redis_url}?decode_responses=true", weights)  # which bytes of a state are not for
    asyncio.run(use())
    for one in (model, second):
        one.scheduler.close(0)


def test_redis_that_cannot_be_reached_is_told(weights):
    pytest.importorskip("redis", reason="needs the extra redis")
    with pytest.raises(UserError, match="--sessions") as refused:
        shared_storage("redis://:secret@127.0.0.1:1/0")
    assert "secret" not in str(refused.value)


def test_a_storage_that_fails_answers_503(serve, tmp_path, monkeypatch):
    live = serve(folder=tmp_path / "shared", shared=True)
    session = make(live)["id"]

    def full(*given):
        raise OSError(28, "No space left on device")

    rows = live.server_state.models["small"].rows
    with monkeypatch.context() as patched:
        patched.setattr(rows, "save", full)
        answer = live.http.post(f"/v1/sessions/{session}/read", json={"text": "lost"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "sessions_unavailable"
    assert told(live, session)["tokens"] == len(TEXT)
    assert live.http.post(f"/v1/sessions/{session}/read", json={"text": "kept"}).status_code == 200


def test_a_folder_is_shared_by_all_or_by_none(tmp_path, weights):
    storage = FolderStorage(tmp_path)
    with pytest.raises(UserError), locked(tmp_path, patience=0.0):
        pass
    storage.close()
    with locked(tmp_path), pytest.raises(UserError, match="--shared"):
        FolderStorage(tmp_path)


def test_sessions_of_a_server_by_itself_are_taken_up(tmp_path, weights):
    """And go back."""
    model = ServedModel("small", *weights["small"], Limits())
    own = SessionStore(tmp_path, {"small": model}, Limits())

    async def use():
        session = await own.add(model, model.rows.start(), "mine", None, "before")
        await own.close()
        sessions = SharedSessions(FolderStorage(tmp_path), {"small": model}, Limits())
        found = await sessions.find(session.id)
        async with sessions.continuing(found) as row:
            await sessions.commit(found, model.rows.copy(row), ", after")
        await sessions.close()
        again = SessionStore(tmp_path, {"small": model}, Limits())
        assert (await again.find("mine")).tail == "before, after"

    asyncio.run(use())
    model.scheduler.close(0)


def test_a_lock_whose_file_was_removed_is_not_taken_for_one(tmp_path):
    storage = FolderStorage(tmp_path)
    key = "sess_" + "a" * 22
    first = storage.claim(key)
    assert storage.claim(key) is None
    first.release()  # there is no session, so that the file goes
    assert not list(tmp_path.glob("??/*.lock"))
    second = storage.claim(key)
    assert second is not None
    second.release()
    storage.close()


def test_a_name_that_is_asked_for_while_its_session_ends_is_given_once(tmp_path, monkeypatch):
    storage, other = FolderStorage(tmp_path), FolderStorage(tmp_path)
    ids = ["sess_" + letter * 22 for letter in "abc"]
    known = {"id": ids[0], "name": "mine"}
    assert storage.take_name("mine", ids[0])
    path = storage._name("mine")
    os.utime(path, (0, 0))  # long ago
    find = storage.find
    with monkeypatch.context() as patched:
        patched.setattr(storage, "find", lambda key: other.delete(known) or find(key))
        assert storage.take_name("mine", ids[1])
    assert path.read_text() == ids[1]
    assert not other.take_name("mine", ids[2])
    other.delete({"id": ids[1], "name": "mine"})
    assert not path.exists()
    for one in (storage, other):
        one.close()


def until(found, seconds=20.0):
    """Wait for something."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "change",
    [{"ttl": float("inf")}, {"used": float("nan")}, {"created": 10**400}, {"tokens": -5}, {"parent": "\ud800"},
     {"version": 7}],
)  # fmt: skip
def test_a_file_that_tells_what_cannot_be_sent_is_no_session(change):
    """One such file in the folder would fail the list of all sessions."""
    known = dict.fromkeys(("model", "identity", "tail"), "a") | {"id": f"sess_{'A' * 22}", "name": None, "parent": None}
    known |= dict.fromkeys(("tokens", "nbytes", "created", "used", "ttl"), 1) | {"version": "a"}
    assert fits(known)
    assert not fits(known | change)
