"""Writing: all or nothing, never over what is there, one process at a time."""

import os

import pytest

from dyadlm import files
from dyadlm.errors import UserError
from dyadlm.files import locked, require_new, staged_folder, write_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_atomically(path, "first")
    write_atomically(path, b"second")
    assert path.read_text() == "second"
    umask = os.umask(0o027)
    try:
        write_atomically(path, "second")
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "third")
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"

    def fail():
        with staged_folder(path) as staging:
            (staging / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(path.parent.iterdir())
    path.mkdir()  # an empty folder may be there
    with staged_folder(path) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("whole")
        assert not any(path.iterdir())
    assert [file.name for file in path.parent.iterdir()] == ["folder"]
    assert (path / "inner" / "file").read_text() == "whole"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "folder"

    def too_late():
        with staged_folder(path) as staging:
            (staging / "file").write_text("ours")
            path.mkdir()
            (path / "file").write_text("theirs")

    with pytest.raises(UserError, match="already exists"):
        too_late()
    assert (path / "file").read_text() == "theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_place_where_nothing_can_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        require_new(file, "it")
    with pytest.raises(UserError, match="There can be no folder"), staged_folder(file / "folder"):
        pytest.fail("there is no such place")
    with pytest.raises(UserError, match="There can be no folder"), locked(file):
        pytest.fail("there is no such place")
    assert file.read_text() == "mine"


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE_SECONDS", 0.0)
    folder = tmp_path / "folder"
    with locked(folder), pytest.raises(UserError, match="Another process is at work"), locked(folder):
        pytest.fail("two at once")
    assert not folder.exists()  # it stayed empty
    with locked(folder):
        (folder / "file").write_text("kept")
    with locked(folder):
        assert [file.name for file in folder.iterdir()] == ["file"]
