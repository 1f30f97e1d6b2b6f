"""Preparation on Ray: equal to that on one machine, and going on where it was stopped."""

import json
import socket
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from dyadlm.cluster import ray_cluster
from dyadlm.data import Passage, Source, byte_tokenizer, prepare
from dyadlm.data.chat import CONVERSATION
from dyadlm.data.parts import Piece, _is_whole, kept_parts, read_part, tokenise_on_ray, write_part
from dyadlm.errors import UserError

from .conftest import make_text


def test_parts_come_back_whole_and_damage_is_seen(tmp_path):
    passages = [(0, Passage("a", b"hello", "one")), (3, Passage("a", b"", "two", "song", 5, False))]
    pieces = [
        Piece(np.array([1, 70_000, 3, 4], np.int32), np.array([1, 2, 0, 2], np.int32), passages),
        Piece(np.array([], np.int32), np.array([], np.int32), [(0, Passage("b", b""))]),
    ]
    path = tmp_path / "ab" / "part.safetensors"
    assert not _is_whole(path)
    write_part(path, pieces)
    assert _is_whole(path)
    for found, piece in zip(read_part(path), pieces, strict=True):
        for one, other in ((found.ids, piece.ids), (found.byte_lengths, piece.byte_lengths)):
            assert one.dtype == np.int32
            assert np.array_equal(one, other)
        assert [(place, p.document, p.section, p.kind, p.offset, p.starts) for place, p in found.passages] == [
            (place, p.document, p.section, p.kind, p.offset, p.starts) for place, p in piece.passages
        ]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not _is_whole(path)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    parts = tmp_path / "out.parts"
    (parts / "ab").mkdir(parents=True)
    (parts / "ab" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"), kept_parts(tmp_path / "out"):
        pass
    assert (parts / "ab" / "notes.txt").read_text() == "mine"
    (parts / "ab" / "notes.txt").unlink()
    (parts / "ab" / f"{'ab' * 32}.safetensors").write_bytes(b"half")  # as a stopped preparation may leave it
    with kept_parts(tmp_path / "out"):
        pass
    assert not parts.exists()


def test_parts_may_be_on_another_disk(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out.parts").symlink_to(tmp_path / "large disk")
    with kept_parts(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_parts_that_are_not_seen_here_are_said(tmp_path):
    """As where each machine has a disk of its own."""
    task = SimpleNamespace(remote=lambda *given: None)
    ray = SimpleNamespace(
        put=lambda value: value,
        cluster_resources=dict,
        remote=lambda **options: lambda function: task,
        get=lambda _: None,
    )
    encoder = SimpleNamespace(parts_identity="")
    with pytest.raises(UserError, match="storage that all machines share"):
        list(tokenise_on_ray(ray, encoder, lambda *given: [], tmp_path, [[Passage("a", b"text")]]))


@pytest.fixture
def one_cpu():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_what_one_machine_gives_and_goes_on_where_it_was_stopped(
    tmp_path, text_tokenizer, monkeypatch, one_cpu
):
    module = sys.modules["dyadlm.data.preparation"]  # the name in the package is the function
    monkeypatch.setattr(module, "WORK_BYTES", 5_000)
    # One cluster for all that follows, because its workers take longest to start.
    monkeypatch.setattr(module, "ray_cluster", lambda address, workers: nullcontext(one_cpu))
    fails = True
    chat = json.dumps([{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]).encode()

    def passages():
        for number in range(30):
            if fails and number == 20:
                raise OSError("the disk is gone")
            text = make_text(300, number).encode()
            yield Passage(f"text {number}", text[:900])
            yield Passage(f"text {number}", text[900:], "second part", starts=False)
            yield Passage(f"chat {number}", chat, kind=CONVERSATION)

    source = Source("made up", "CC0", "1", {"train": passages, "validation": lambda: iter([Passage("v", b"one two")])})
    output, parts = tmp_path / "out", tmp_path / "out.parts"
    with pytest.raises(OSError, match="the disk is gone"):
        prepare([source], output, text_tokenizer, engine="ray")
    assert not output.exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.rglob("*.safetensors")}
    assert len(kept) > 3
    with pytest.raises(OSError, match="the disk is gone"):
        prepare([source], output, text_tokenizer, engine="ray")
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in parts.rglob("*.safetensors")}.items()

    fails = False
    on_ray = prepare([source], output, text_tokenizer, engine="ray")
    alone = prepare([source], tmp_path / "alone", text_tokenizer)
    assert on_ray == alone
    assert (output / "tokenizer" / "chat_template.jinja").read_text() == (
        tmp_path / "alone" / "tokenizer" / "chat_template.jinja"
    ).read_text()
    assert not parts.exists()

    bad = Source("bad", "CC0", "2", {"train": lambda: iter([Passage("bad", b"\xff\xfe\xff" * 9)])})
    with pytest.raises(UserError, match="bad is not UTF-8 text"):
        prepare([bad], tmp_path / "bad", text_tokenizer, engine="ray")


def test_ray_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("dyadlm.cluster.find_spec", lambda name: None)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 20)
    with pytest.raises(UserError, match=r"pip install 'dyadlm\[cluster\]'"):
        prepare([tmp_path / "text.txt"], tmp_path / "out", byte_tokenizer(), engine="ray")
    assert not (tmp_path / "out.parts").exists()


def test_a_cluster_that_does_not_answer_is_said_at_once():
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given in (address, f"ray://{address}", "127.0.0.1:x", "127.0.0.1:99999"):
            with pytest.raises(UserError, match=f"no Ray cluster at {given} "), ray_cluster(given, 1):
                pass
