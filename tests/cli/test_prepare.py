"""`dyadlm data prepare` that does not end well: what is said, with which exit code, and what is left."""

import errno
import os
import signal
import sys
import time

import pytest

from dyadlm.cli import main
from dyadlm.data import Passage, Source
from processes import shown_in


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 20)
    return "text.txt"


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_stopped_preparation_says_what_is_left(
    text, tmp_path, monkeypatch, capsys, signals_as_before, engine, number, code
):
    def stopped(*arguments, **options):
        signal.raise_signal(getattr(signal, number))

    if engine == "local":
        monkeypatch.setattr("dyadlm.data.preparation._write_split", stopped)
    else:
        monkeypatch.setattr("dyadlm.data.preparation.ray_cluster", stopped)
    assert call("data", "prepare", text, "--output", "out", "--engine", engine) == code
    told = {"local": "Stopped; nothing was written.\n", "ray": "Stopped; the same command goes on where it was.\n"}
    assert capsys.readouterr() == ("", told[engine])
    assert os.listdir(tmp_path) == [text]


def test_a_full_disk_is_said_with_its_place_and_what_to_do(text, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dyadlm.data.split_writer.SplitWriter._write", full)
    assert call("data", "prepare", text, "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err == (
        f"dyadlm: No space left on device: {tmp_path / 'out'}; make room there, or choose another place, and give the "
        "command again.\n"
    )
    assert os.listdir(tmp_path) == [text]


def prepare_slowly(folder: str) -> None:
    def passages():
        for number in range(1000):
            time.sleep(0.02)
            yield Passage(f"text {number}", b"to be or not to be\n" * 99)

    source = Source("made up", "CC0", "1", {"train": passages, "validation": passages})
    module = sys.modules["dyadlm.data.preparation"]
    module.find_source, module.WORK_BYTES = lambda *given: source, 1
    main(["data", "prepare", "made up", "--output", f"{folder}/out", "--engine", "ray"])


@pytest.mark.slow
def test_sigterm_ends_a_preparation_on_ray_in_good_order(tmp_path, forkserver):
    pytest.importorskip("ray")
    shown, parts = tmp_path / "shown", tmp_path / "out.parts"
    process = forkserver.Process(target=shown_in, args=(shown, prepare_slowly, str(tmp_path)))
    process.start()
    until = time.monotonic() + 300
    while not list(parts.glob("*/*.safetensors")):
        assert process.is_alive(), shown.read_text()
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    *progress, last = shown.read_text().splitlines()
    assert last == "Stopped; the same command goes on where it was."
    assert all(line.startswith("tokenising: ") for line in progress)  # none where Ray starts within a minute
    assert list(parts.glob("*/*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"shown", "out.parts"}
