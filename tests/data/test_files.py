"""Writing: all or nothing, never over what is there, one process at a time."""

import errno
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from dyadlm import files
from dyadlm.errors import UserError
from dyadlm.files import full_disk_named, locked, printable, require_new, staged_folder, write_atomically


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


def test_what_ends_a_block_whose_folder_was_removed_is_told(tmp_path):
    def work(folder):
        folder.rmdir()
        raise RuntimeError("of the block")

    with pytest.raises(RuntimeError, match="of the block"), locked(tmp_path / "folder"):
        work(tmp_path / "folder")


def test_leftovers_of_dead_commands_are_removed_and_those_of_living_ones_kept(tmp_path):
    """A process that is killed leaves its staging folder; the lock on it ends with the process."""
    program = (
        "import os, pathlib, signal, sys\n"
        "from dyadlm.files import staged_folder\n"
        "with staged_folder(pathlib.Path(sys.argv[1]) / sys.argv[2]) as staging:\n"
        "    (staging / 'half').write_text('half')\n"
        "    print('there', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == 'dead' else sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    living = subprocess.Popen([*command, "alive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert living.stdout.readline() == "there\n"
    subprocess.run([*command, "dead"], stdout=subprocess.DEVNULL)
    assert len(list(tmp_path.glob(".staging-*"))) == 2
    write_atomically(tmp_path / "file", "young ones may be about to be locked")
    assert len(list(tmp_path.glob(".staging-*"))) == 2
    for path in tmp_path.glob(".staging-*"):
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "file", "content")
    assert len(list(tmp_path.glob(".staging-*"))) == 1
    living.communicate("")
    assert (tmp_path / "alive" / "half").read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive", "file"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本", "plain é 日本"),
        ("a\x1b[2Jb\n", "a\\x1b[2Jb\\n"),
        ("caf\udce9", "caf\\xe9"),
        ("\u202egnp", "\\u202egnp"),
    ],
)
def test_names_are_shown_as_one_line_that_steers_nothing(text, shown):
    assert printable(text) == shown


def test_what_others_call_alike_is_never_removed(tmp_path):
    (tmp_path / ".staging-area").mkdir()
    (tmp_path / ".staging-area" / "work").write_text("mine")
    os.utime(tmp_path / ".staging-area", (0, 0))
    write_atomically(tmp_path / "file", "content")
    assert (tmp_path / ".staging-area" / "work").read_text() == "mine"


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (OSError(errno.ENOSPC, "full"), "out"),
        (OSError(errno.EDQUOT, "full", "folder/.staging-dyadlm-1/file"), "out"),
        (OSError(errno.ENOSPC, "full", "model", None, "folder/.staging-dyadlm-1/model"), "out"),
        (OSError(errno.ENOSPC, "full", "spool"), "spool"),
        (OSError(errno.EACCES, "no", "file"), "file"),
    ],
)
def test_a_full_disk_is_named_by_where_the_result_was_to_be(tmp_path, raised, named):
    with pytest.raises(OSError, match=named) as error, staged_folder(tmp_path / "out"):
        raise raised
    assert error.value.errno == raised.errno
    assert error.value.filename == {"out": str(tmp_path / "out")}.get(named, named)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_a_full_disk_is_seen_in_errors_of_libraries_in_rust(tmp_path):
    """These say it in their text alone."""
    with pytest.raises(OSError, match="out") as error, full_disk_named(tmp_path / "out"):
        Tokenizer(models.BPE()).save("/dev/full")
    assert error.value.errno == errno.ENOSPC
