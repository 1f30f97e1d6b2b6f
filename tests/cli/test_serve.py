"""`dyadlm serve` as a process: how it starts and ends, and that sessions are whole after it was killed."""

import errno
import os
import random
import re
import signal
import socket
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli import main
from dyadlm.cli.app import app
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.generate import Sampling, Session
from processes import shown_in

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "small"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "slot_entries": 64, "slot_layers": [1]}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Server:
    """A process that serves. file: for what it shows."""

    def __init__(self, forkserver, file, *arguments: str):
        command = ["serve", *arguments, "--port", "0"]
        self.process = forkserver.Process(target=shown_in, args=(file, main, command))
        self.process.start()
        while not (found := re.search(r"at (http://\S+)\s", file.read_text() if file.exists() else "")):
            assert self.process.is_alive(), file.read_text()
            time.sleep(0.02)
        self.http = httpx.Client(base_url=found[1], timeout=60)

    def end(self, number: int | None = signal.SIGTERM) -> int:
        if number is not None:
            os.kill(self.process.pid, number)
        self.process.join(60)
        self.http.close()
        return self.process.exitcode


@pytest.fixture
def start(tmp_path, forkserver):
    """`start(*arguments)`: a server."""
    servers = []

    def start(*arguments) -> Server:
        servers.append(Server(forkserver, tmp_path / f"shown-{len(servers)}", *map(str, arguments)))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.join()


def test_it_ends_in_good_order(folder, tmp_path, start):
    server = start(folder, "--sessions", tmp_path / "sessions", "--autosave", "0", "--grace", "60")
    assert server.http.post("/v1/sessions", json={"name": "kept", "text": "To be"}).status_code == 201
    body = {"prompt": "To be", "max_tokens": 300, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.terminate()
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert server.end(None) == 0
    assert len(list((tmp_path / "sessions").glob("??/*.state"))) == 1


def test_sessions_are_whole_after_a_kill(folder, tmp_path, start):
    chance = random.Random(0)
    model = DyadForCausalLM.from_pretrained(folder).eval()
    told: set[str] = set()
    for round_number in range(3):
        server = start(folder, "--sessions", tmp_path / "sessions", "--autosave", "0.1")
        sessions = {one["id"]: one for one in server.http.get("/v1/sessions").json()["data"]}
        assert told <= set(sessions)
        for one in sessions.values():
            assert one["tokens"] == len(one["tail"].encode(errors="replace"))
            answer = server.http.post(
                "/v1/completions",
                json={
                    "prompt": "",
                    "session": one["id"],
                    "keep": False,
                    "max_tokens": 1,
                    "temperature": 0,
                    "logprobs": 0,
                },
            )
            assert answer.status_code == 200, answer.text
            alone = Session(model, byte_tokenizer())
            alone.read_prompt(one["tail"])
            (written,) = answer.json()["choices"][0]["logprobs"]["bytes"]
            likeliest = int(alone.logits.argmax())  # a byte, or the end of the text, which is told as it is spelled
            assert written == ([likeliest] if likeliest < 256 else list(byte_tokenizer().decode([likeliest]).encode()))
        if round_number == 2:
            server.end()
            return

        def work(server=server, seed=round_number):
            own = random.Random(seed)
            try:
                while True:
                    text = "".join(own.choice("abc \n") for _ in range(20))
                    session = server.http.post("/v1/sessions", json={"text": text}).json()["id"]
                    server.http.post(f"/v1/sessions/{session}/save")
                    told.add(session)
                    server.http.post(f"/v1/sessions/{session}/read", json={"text": " and more"})
                    body = {"prompt": "x", "max_tokens": 500, "stream": True, "session": session}
                    with server.http.stream("POST", "/v1/completions", json=body) as answer:
                        next(answer.iter_lines())
            except (httpx.HTTPError, OSError):
                pass

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(1 + chance.random())
        server.end(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "give a key"),
        (["--api-key", "no-such-file"], "cannot be read"),
        (["--port", "70000"], "65535"),
        (["--session-days", "-1"], "0.001"),
        (["--max-body", "-1"], "0.001"),
        (["--deadline", "0"], "0.1"),
        (["--grace", "-1"], "equal to 0"),
        (["--grace", "inf"], "31536000"),
        (["--session-memory", "1e400"], "1073741824"),
        (["--max-body", "nan"], "'--max-body': "),
        (["--session-days", "nan"], "'--session-days': "),
        (["--streams", "1.5"], "integer"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.delenv("DYADLM_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["serve", "no-such-model", *arguments])
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).split())


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_a_replica_goes_on_where_another_was_killed(folder, tmp_path, request, kind, start):
    """What was answered is kept; what was being written is not."""
    url = str(tmp_path / "sessions") if kind == "folder" else request.getfixturevalue("redis_url")
    one, other = (start(folder, "--sessions", url, "--shared") for _ in range(2))
    session = one.http.post("/v1/sessions", json={"name": kind, "text": "To be"}).json()["id"]
    body = {"prompt": " or", "session": session, "max_tokens": 6, "seed": 1}
    assert one.http.post("/v1/completions", json=body).status_code == 200
    with one.http.stream("POST", "/v1/completions", json=body | {"max_tokens": 60_000, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert other.http.post("/v1/completions", json=body).json()["error"]["code"] == "session_busy"
        assert one.end(signal.SIGKILL) == -signal.SIGKILL
    if kind == "redis":  # where the claim of a server that was killed lasts for its lease
        import redis

        with redis.Redis.from_url(url) as client:
            assert 0 < client.ttl(f"dyadlm:{session}:lock") <= 30
            client.delete(f"dyadlm:{session}:lock")
    found = other.http.get(f"/v1/sessions/{kind}").json()
    assert found["tokens"] == len("To be or") + 6
    told = other.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    alone = Session(DyadForCausalLM.from_pretrained(folder).eval(), byte_tokenizer())
    for prompt in ("To be", " or", " or"):
        alone.read_prompt(prompt)
        written = "" if prompt == "To be" else "".join(alone.write(6, Sampling(seed=1)))
    assert told == written
    assert other.end() == 0


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(monkeypatch):
    monkeypatch.delenv("DYADLM_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", "no-such-model", "--port", str(taken.getsockname()[1])])
    assert "choose another --port" in str(result.exception)


def test_a_folder_that_another_server_uses_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    from dyadlm.serve.running import own_folder

    monkeypatch.delenv("DYADLM_API_KEY", raising=False)
    monkeypatch.setattr("dyadlm.serve.running.LOCK_PATIENCE", 0.0)
    with own_folder(tmp_path, shared=False):
        result = CliRunner().invoke(app, ["serve", "no-such-model", "--port", "0", "--sessions", str(tmp_path)])
    assert "Another server keeps its sessions in" in str(result.exception)
    assert "--sessions" in str(result.exception)


@pytest.mark.parametrize("more", [(), ("--shared",)])
def test_a_folder_that_cannot_be_written_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, more):
    def read_only(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.delenv("DYADLM_API_KEY", raising=False)
    monkeypatch.setattr("dyadlm.files.tempfile.TemporaryFile", read_only)
    asked = ["serve", "no-such-model", "--port", "0", "--sessions", str(tmp_path), *more]
    assert "Read-only file system" in str(CliRunner().invoke(app, asked).exception)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    result = CliRunner().invoke(app, ["serve", "no-such-model"])
    assert "pip install 'dyadlm[serve]'" in str(result.exception)


def test_the_environment_gives_the_key(monkeypatch, tmp_path):
    from dyadlm.cli.serve import read_key

    monkeypatch.setenv("DYADLM_API_KEY", "secret")
    assert read_key(None) == "secret"
    (tmp_path / "key").write_text("other\n")
    assert read_key(tmp_path / "key") == "other"
