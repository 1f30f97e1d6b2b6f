"""Text behind a URL (fsspec), here in memory and on the disk, is read as files are."""

import gzip
import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from dyadlm.data import byte_tokenizer, open_dataset, prepare, resolve_data
from dyadlm.data.encoding import decode_bytes
from dyadlm.data.remote import RemoteFile, remote_files, remote_key
from dyadlm.data.sources import open_source
from dyadlm.errors import UserError

from .conftest import make_text

LINES = b"".join(json.dumps({"text": make_text(40, number)}).encode() + b"\n" for number in range(20))


@pytest.fixture
def bucket():
    """A folder in memory, with what a bucket may hold."""
    system = fsspec.filesystem("memory")
    system.pipe({"/bucket/a.jsonl": LINES, "/bucket/deep/b.jsonl.gz": gzip.compress(LINES), "/bucket/c.txt": b"plain"})
    yield system
    system.rm("/bucket", recursive=True)


def test_remote_text_is_read_like_files(tmp_path, bucket):
    (tmp_path / "text" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/b.jsonl.gz", "c.txt"):
        (tmp_path / "text" / name).write_bytes(bucket.cat(f"/bucket/{name}"))
    for url in ("memory://bucket", f"file://{tmp_path}/text"):
        prepare([url], tmp_path / "remote")
        prepare([tmp_path / "text"], tmp_path / "local")
        found, expected = (open_dataset(tmp_path / name).split("train") for name in ("remote", "local"))
        assert decode_bytes(found.tokens(0, len(found))) == decode_bytes(expected.tokens(0, len(expected)))
        for name in ("remote", "local"):
            (tmp_path / name).rename(tmp_path / f"{name} {len(url)}")
    by_pattern = [passage.document for passage in open_source("memory://bucket/*.jsonl").splits["train"]()]
    assert by_pattern == [f"bucket/a.jsonl:{number}" for number in range(1, 21)]


def test_the_cache_follows_what_changes(bucket):
    first = resolve_data(["memory://bucket/a.jsonl:2"], byte_tokenizer())
    assert first.train[0][1] == 2.0
    assert resolve_data(["memory://bucket/a.jsonl"]).datasets[0].path == first.datasets[0].path
    bucket.pipe("/bucket/a.jsonl", LINES + LINES)
    second = resolve_data(["memory://bucket/a.jsonl"])
    assert second.datasets[0].path != first.datasets[0].path


def test_a_file_of_the_web_that_changed_is_another_one(tmp_path, monkeypatch):
    """fsspec itself takes what has the same URL for the same."""
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url, keys = f"http://127.0.0.1:{server.server_port}/text.txt", []
        for text in ("one", "one", "three"):
            (tmp_path / "text.txt").write_text(text)
            os.utime(tmp_path / "text.txt", (1e9, 1e9))
            keys.append(open_source(url).key)
        assert keys[0] == keys[1] != keys[2]
        files = remote_files(url)
        (tmp_path / "text.txt").unlink()
        with pytest.raises(UserError, match=r"text\.txt cannot be reached"):
            remote_key(1, files)
        server.shutdown()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", "There are no files at memory://nowhere"),
        ("memory://nowhere/*.txt", "There are no files"),
        ("nosuch://bucket/a.txt", "cannot be reached .*nosuch"),
        ("sftp://127.0.0.1/a.txt", "cannot be opened: .*paramiko"),
    ],
)
def test_places_without_text_are_said(bucket, url, message):
    with pytest.raises(UserError, match=message):
        open_source(url)


def test_two_names_that_look_the_same_are_refused(bucket):
    bucket.pipe({"/bucket/twice\x1b": b"one", "/bucket/twice\\x1b": b"two"})
    with pytest.raises(UserError, match=r"Two files.*rename one"):
        open_source("memory://bucket/twice*")


def test_a_folder_is_read_as_on_the_disk(bucket, caplog, tmp_path):
    bucket.pipe({"/bucket/.git/config": b"hidden", "/bucket/picture.png": b"\x89PNG\r\n\x1a\n"})
    source = open_source("memory://bucket")
    documents = {passage.document.partition(":")[0] for passage in source.splits["train"]()}
    assert documents == {"bucket/a.jsonl", "bucket/c.txt", "bucket/deep/b.jsonl.gz"}
    assert "picture.png is not text" in caplog.text
    with pytest.raises(UserError, match=r"picture\.png is not text"):
        list(open_source("memory://bucket/picture.png").splits["train"]())
    prepare(["memory://bucket/c.txt"], tmp_path / "prepared")
    with pytest.raises(UserError, match="is prepared already"):
        open_source(f"file://{tmp_path}/prepared")


def test_text_that_changes_while_it_is_read_is_refused(bucket, tmp_path):
    (tmp_path / "file.jsonl").write_bytes(LINES)
    sources = [open_source(place) for place in ("memory://bucket/a.jsonl", "memory://bucket", tmp_path / "file.jsonl")]
    prepare(sources, tmp_path / "prepared")
    bucket.pipe("/bucket/a.jsonl", LINES + LINES)
    (tmp_path / "file.jsonl").write_bytes(LINES + LINES)
    for source in sources:
        with pytest.raises(UserError, match="has changed while it was read"):
            prepare([source], tmp_path / "changed")
    (tmp_path / "file.jsonl").unlink()
    with pytest.raises(UserError, match="has changed while it was read"):
        sources[-1].require_unchanged()
    assert not (tmp_path / "changed").exists()


def test_what_a_place_fails_with_is_said(bucket, monkeypatch):
    def fail(*given):
        raise RuntimeError("the connection was cut")

    source = open_source("memory://bucket/c.txt")
    monkeypatch.setattr(MemoryFile, "readinto", fail, raising=False)
    with pytest.raises(UserError, match=r"c\.txt cannot be read: the connection was cut; try again"):
        list(source.splits["train"]())
    monkeypatch.setattr(MemoryFileSystem, "ukey", fail)
    with pytest.raises(UserError, match=r"cannot be reached .*the connection was cut"):
        open_source("memory://bucket/c.txt")


def test_files_of_the_web_are_known_by_what_their_server_says(bucket, monkeypatch):
    """fsspec takes them for unchanging."""
    told = [{"size": 5, "ETag": "a"}, {"size": 5, "ETag": "b"}, {"size": 5}, {"size": 5}]
    files = {"c.txt": RemoteFile(bucket, "/bucket/c.txt")}
    with monkeypatch.context() as server:
        server.setattr(MemoryFileSystem, "protocol", ("http", "https"))
        server.setattr(MemoryFileSystem, "info", lambda system, path, **options: told.pop(0))
        keys = [remote_key(1, files) for _ in range(3)]
        bucket.store["/bucket/c.txt"] = MemoryFile(bucket, "/bucket/c.txt", b"white")
        assert len({*keys, remote_key(1, files)}) == 4
