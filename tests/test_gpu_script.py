"""`benchmarks/gpu.py` says what is wrong with a request before minutes of a GPU are spent."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out", "--minutes", "nan"], "--minutes"),
        (["--output", "out", "--minutes", "0"], "--minutes"),
        (["--output", "out", "--tail", "0"], "--tail"),
        (["--output", "file"], "no folder"),
        (["--output", "out", "--wheels", "file"], "--wheels"),
        (["--output", "out", "--shard", "nowhere"], "--shard"),
        (["--output", "out", "--shard", "file"], "--shard"),
        (["--output", "out", "--texts", "tiny"], "--texts"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    Path("file").write_text("no archive")
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    script = importlib.import_module("gpu")
    del sys.modules["gpu"]
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
