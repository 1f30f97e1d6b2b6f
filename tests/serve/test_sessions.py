"""Sessions over HTTP: continued, forked, saved, restored without reading anything again."""

import asyncio
import json
import os
import re
import time

import numpy as np
import pytest

from dyadlm.generate import Sampling, Session
from dyadlm.serve import Limits, ServedModel
from dyadlm.serve.errors import ApiError
from dyadlm.serve.session_record import ABOUT
from dyadlm.serve.sessions import SessionStore

pytest.importorskip("fastapi", reason="needs the extra serve")

TEXT = "To be, or not to be: that is the question.\n"


def make(live, **fields):
    answer = live.http.post("/v1/sessions", json={"text": TEXT, **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def complete(live, session, prompt="Whether ", **fields):
    body = {"prompt": prompt, "session": session, "max_tokens": 12, "seed": 5, **fields}
    answer = live.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def tokens_read(live) -> int:
    scheduler = live.server_state.models["small"].scheduler
    return scheduler.tokens_read + scheduler.tokens_written


def test_a_session_stands_for_the_text_that_it_read(shared, weights):
    session = make(shared)
    assert re.fullmatch(r"sess_[A-Za-z0-9_-]{22}", session["id"])
    assert session["tokens"] == len(TEXT)
    assert session["tail"] == TEXT
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT)
    for prompt in ("Whether ", "", "nobler"):
        if prompt:
            alone.read_prompt(prompt)
        assert complete(shared, session["id"], prompt) == "".join(alone.write(12, Sampling(seed=5)))
    found = shared.http.get(f"/v1/sessions/{session['id']}").json()
    assert found["tokens"] == len(TEXT + "Whether nobler") + 36
    assert found["tail"].startswith(TEXT + "Whether ")


def test_continuing_reads_only_what_is_new(shared):
    session = make(shared)
    before = tokens_read(shared)
    complete(shared, session["id"], "Whether ", max_tokens=12)
    assert tokens_read(shared) - before == len("Whether ") + 12


def test_keep_false_leaves_a_session_as_it_was(shared):
    session = make(shared)
    first = complete(shared, session["id"], keep=False)
    assert complete(shared, session["id"], keep=False) == first
    assert shared.http.get(f"/v1/sessions/{session['id']}").json()["tokens"] == len(TEXT)


def test_a_stop_string_is_not_part_of_the_session(shared, weights):
    session = make(shared)
    plain = complete(shared, session["id"], keep=False, max_tokens=24)
    stop = plain[6:9]
    shown = complete(shared, session["id"], stop=[stop], max_tokens=24)
    assert shown == plain[: plain.index(stop)]
    assert shared.http.get(f"/v1/sessions/{session['id']}").json()["tokens"] == len(
        (TEXT + "Whether " + shown).encode()
    )
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT + "Whether " + shown + "x")
    assert complete(shared, session["id"], "x") == "".join(alone.write(12, Sampling(seed=5)))


def test_a_fork_goes_its_own_way(shared):
    session = make(shared)
    fork = shared.http.post(f"/v1/sessions/{session['id']}/fork", json={"name": "other"}).json()
    assert fork["parent"] == session["id"]
    first = complete(shared, session["id"])
    assert complete(shared, "other") == first
    complete(shared, "other", "and more")
    assert (
        shared.http.get("/v1/sessions/other").json()["tokens"]
        > shared.http.get(f"/v1/sessions/{session['id']}").json()["tokens"]
    )
    assert shared.http.delete("/v1/sessions/other").json()["deleted"] is True
    assert shared.http.get("/v1/sessions/other").status_code == 404
    assert shared.http.get(f"/v1/sessions/{fork['id']}").status_code == 404


def test_reading_tells_the_surprise(shared, weights):
    session = make(shared)
    told = shared.http.post(f"/v1/sessions/{session['id']}/read", json={"text": "Whether 'tis"}).json()
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT)
    nats = alone.read(list(b"Whether 'tis"))
    assert told["read"]["tokens"] == 12
    assert told["read"]["bits"] == pytest.approx(float(nats.sum()) / 0.6931472, rel=1e-4)
    assert told["tokens"] == len(TEXT) + 12


def test_a_file_restores_a_session_without_reading_anything(shared, weights, tmp_path):
    session = make(shared)
    content = shared.http.get(f"/v1/sessions/{session['id']}/state").content
    before = tokens_read(shared)
    restored = shared.http.post("/v1/sessions/restore", params={"name": "back"}, content=content)
    assert restored.status_code == 201
    expected = complete(shared, session["id"], "", max_tokens=1, temperature=0)
    assert complete(shared, "back", "", max_tokens=1, temperature=0) == expected
    assert tokens_read(shared) - before == 2  # what was written
    shared.http.delete("/v1/sessions/back")


def test_files_of_the_library_are_taken_too(shared, weights, tmp_path):
    alone = Session(*weights["small"])
    alone.read_prompt(TEXT)
    alone.save(tmp_path / "plain.state")
    content = (tmp_path / "plain.state").read_bytes()
    session = shared.http.post("/v1/sessions/restore", content=content).json()
    assert session["tokens"] == len(TEXT)
    refused = shared.http.post("/v1/completions", json={"prompt": "", "session": session["id"]})
    assert refused.status_code == 400  # nothing predicts the next token
    alone.read_prompt("Whether ")
    assert complete(shared, session["id"]) == "".join(alone.write(12, Sampling(seed=5)))


@pytest.mark.parametrize("content", [b"", b"no state", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_state_is_refused(shared, content):
    answer = shared.http.post("/v1/sessions/restore", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "state_refused"
    assert "/" not in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_once_in_the_tail(shared, stream):
    session = make(shared, text="")
    body = {"prompt": "Whether ", "session": session["id"], "max_tokens": 3, "echo": True, "stream": stream}
    assert shared.http.post("/v1/completions", json=body).status_code == 200
    tail = shared.http.get(f"/v1/sessions/{session['id']}").json()["tail"]
    assert tail.count("Whether ") == 1
    shared.http.delete(f"/v1/sessions/{session['id']}")


def test_sessions_survive_a_restart(serve):
    live = serve()
    session = make(live, name="kept")
    expected = complete(live, "kept", keep=False)
    live.close()
    live = serve()
    (found,) = live.http.get("/v1/sessions").json()["data"]
    assert found["place"] == "disk"
    assert {key: found[key] for key in ("id", "name", "tokens", "tail")} == {
        key: session[key] for key in ("id", "name", "tokens", "tail")
    }
    before = tokens_read(live)
    assert complete(live, "kept", keep=False) == expected
    assert tokens_read(live) - before <= len("Whether ") + 12


def test_memory_is_bounded_and_sessions_go_to_disk_and_back(serve):
    live = serve(limits=Limits(session_memory=1, autosave=0))
    sessions = [make(live, text=TEXT + str(number)) for number in range(3)]
    expected = [complete(live, session["id"], keep=False) for session in sessions]
    wait_for(lambda: all(one["place"] == "disk" for one in live.http.get("/v1/sessions").json()["data"]))
    assert live.server_state.store.memory_bytes == 0
    assert [complete(live, session["id"], keep=False) for session in sessions] == expected


def test_a_session_that_is_not_used_is_deleted_after_its_time(serve):
    live = serve()
    session = make(live, ttl=0.5)
    live.http.post(f"/v1/sessions/{session['id']}/save")
    assert list((live.folder).glob("??/*.state"))
    wait_for(lambda: live.http.get(f"/v1/sessions/{session['id']}").status_code == 404)
    assert not list((live.folder).glob("??/*.state"))


def test_the_number_of_sessions_is_bounded(serve):
    live = serve(limits=Limits(sessions=2))
    make(live), make(live)
    answer = live.http.post("/v1/sessions", json={})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "too_many_sessions"


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "", "x" * 65, "sess_mine", "a\0b", "é", "..%2f"])
def test_names_lead_nowhere(shared, name):
    assert shared.http.post("/v1/sessions", json={"name": name}).status_code == 400
    assert shared.http.post("/v1/sessions/restore", params={"name": name}, content=b"x").status_code == 400


def test_a_name_is_given_once(serve):
    live = serve()
    make(live, name="one")
    assert live.http.post("/v1/sessions", json={"name": "one"}).status_code == 409


def test_a_model_of_others_has_no_sessions(shared):
    answer = shared.http.post("/v1/sessions", json={"model": "llama", "text": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_sessions"


def test_a_chat_goes_on_in_a_session(shared, weights):
    session = make(shared, model="talker", text="")

    def ask(text, **fields):
        body = {
            "model": "talker",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 8,
            "seed": 1,
            **fields,
        }
        return shared.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    first = ask("Is it?", session=session["id"])
    second = ask("So?", session=session["id"])
    tokenizer = weights["talker"][1]
    told = [("user", "Is it?"), ("assistant", first), ("user", "So?")]
    messages = [{"role": role, "content": content} for role, content in told]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    alone = Session(*weights["talker"])
    alone.read_prompt(whole)
    assert second == "".join(alone.write(8, Sampling(seed=1)))


def test_a_message_of_a_chat_cannot_end_its_own_turn(shared):
    """What it spells stays text."""
    session = make(shared, model="talker", text="")
    body = {"model": "talker", "session": session["id"], "max_tokens": 1, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": "<|end|>"}]}
    answer = shared.http.post("/v1/chat/completions", json=body).json()
    named = body | {"messages": [{"role": "user", "content": "a", "name": "<|end|>"}]}
    assert shared.http.post("/v1/chat/completions", json=named).status_code == 400
    assert answer["usage"]["prompt_tokens"] == len("user:\n<|end|>") + 1 + len("\nassistant:\n")


def stored(folder, weights, **limits):
    """A store without a server, and its model."""
    own = Limits(**limits)
    model = ServedModel("small", *weights["small"], own)
    return SessionStore(folder, {"small": model}, own), model


def added(store, model):
    return asyncio.run(store.add(model, model.rows.start(), None, None, "x"))


def test_a_use_that_changes_nothing_counts_after_a_restart(weights, tmp_path, monkeypatch):
    store, model = stored(tmp_path, weights, ttl=1000.0)
    session = added(store, model)
    session.used -= 900
    asyncio.run(store.save(session))
    (path,) = tmp_path.glob("??/*.state")
    os.utime(path, (time.time() - 900,) * 2)
    asyncio.run(store.row_of(session))
    model.scheduler.close(0)
    later = time.time() + 500
    monkeypatch.setattr(time, "time", lambda: later)
    again, model = stored(tmp_path, weights, ttl=1000.0)
    model.scheduler.close(0)
    (found,) = asyncio.run(again.all())
    assert found.used > later - 600


def test_a_session_that_is_saved_again_takes_its_room_once(weights, tmp_path):
    size = stored(tmp_path / "a", weights)[1].state_bytes
    store, model = stored(tmp_path / "b", weights, session_disk=int(1.5 * size))
    session = added(store, model)
    for _ in range(3):
        asyncio.run(store.save(session))
        assert session.saved
        asyncio.run(store.commit(session, model.rows.start(), "y"))
    other = added(store, model)
    with pytest.raises(ApiError, match="no room on disk"):
        asyncio.run(store.save(other))


def test_no_session_is_added_while_memory_is_full_and_the_disk_too(weights, tmp_path):
    store, model = stored(tmp_path, weights, session_memory=1, session_disk=10**6)
    first = added(store, model)

    def full(*given):
        raise OSError(28, "No space left on device")

    save, model.rows.save = model.rows.save, full
    asyncio.run(store.tidy())
    with pytest.raises(ApiError, match="memory"):
        added(store, model)
    model.rows.save = save
    asyncio.run(store.tidy())
    assert first.row is None
    added(store, model)


def test_a_file_whose_text_cannot_be_sent_is_refused(serve):
    live = serve()
    session = asyncio.run(live.server_state.store.find(make(live)["id"]))
    known = json.loads(session.about()[ABOUT].tobytes()) | {"tail": "\ud800"}
    path = live.folder / "wrong.state"
    session.model.rows.save(session.row, path, {ABOUT: np.frombuffer(json.dumps(known).encode(), np.uint8)})
    answer = live.http.post("/v1/sessions/restore", content=path.read_bytes())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "state_refused"
    assert live.http.get("/v1/sessions").status_code == 200


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
