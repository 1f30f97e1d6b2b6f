"""What is wrong with a request is said before a model is loaded or text is read."""

import json
from pathlib import Path

import pytest

from dyadlm.cli import main


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a text, a file where folders are wanted, and what looks like a finished run. Nothing loads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYADLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("Some text. " * 400)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "dyadlm.json").write_text(json.dumps({"settings": {"data": ["gone.txt"]}, "result": {}}))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "dyadlm.json").write_text(json.dumps({"settings": {"data": ["text.txt"]}}))
    page = tmp_path / "found" / "report"
    page.mkdir(parents=True)
    (page / "mine.txt").write_text("not ours")

    def fail(*arguments, **options):
        pytest.fail("a model or a text was read")

    for name in (
        "dyadlm.cli.evaluate.load", "dyadlm.cli.inspect.load", "dyadlm.cli.report.load",
        "dyadlm.cli.generate.load_to_read", "dyadlm.cli.stream.load_to_read", "dyadlm.diagnose.candidates.load_subject",
        "dyadlm.recall.study.build_model", "dyadlm.train.run.prepare_run",
    ):  # fmt: skip
        monkeypatch.setattr(name, fail)
    return tmp_path


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("evaluate run --data text.txt --split validatoin", "the nearest is validation"),
        ("evaluate run --data gone.txt", "no file, folder or corpus 'gone.txt'"),
        ("evaluate run --data text.txt --window 0", "at least 1 token"),
        ("generate run --prompt a --state-in gone.state", "no state file gone.state"),
        ("generate run --prompt a --state-out file", "already exists"),
        ("generate run --prompt a --state-out file/new", "no folder file"),
        ("generate run --prompt a --new-document", "give one with --state-in"),
        ("stream run --state-in gone.state", "no state file gone.state"),
        ("stream run --state-out file/new", "no folder file"),
        ("inspect run --text a --output file/new.png", "no folder file"),
        ("inspect run --text a --output new.png --json file/new.json", "no folder file"),
        ("report unfinished --output new", "is not finished"),
        ("report run --output new", "no file, folder or corpus 'gone.txt'"),
        ("report run --output file/new", "no folder file"),
        ("diagnose run gone/ --data text.txt", "no model gone/"),
        ("diagnose run gone.gguf --data text.txt", "no file gone.gguf"),
        ("diagnose run --data gone.txt", "no file, folder or corpus 'gone.txt'"),
        ("diagnose run --data text.txt --split tset", "the nearest is test"),
        ("diagnose run --data text.txt --output found", "already exists"),
        ("diagnose run --data text.txt --output file", "is a file"),
        ("diagnose run --over-time", "fewer than two checkpoints"),
        ("recall --task mqar --model tiny --output file/new.json", "no folder file"),
        ("train --preset tiny --data text.txt --output file/run", "no folder file"),
        ("data prepare text.txt --output file/new", "no folder file"),
    ],
)
def test_a_request_is_refused_before_anything_is_loaded(request_, said, place, capsys):
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(request_.split())
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert said in message
    assert message.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_a_tokenizer_file_that_is_not_there_is_named(place, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "prepare", "text.txt", "--output", "new", "--tokenizer", "gone.json"])
    assert ended.value.code == 2
    assert "There is no file gone.json" in capsys.readouterr().err


def test_short_names_of_settings_are_told_their_long_ones(place, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--preset", "tiny", "--data", "text.txt", "--output", "new", "--set", "lr=1e-3"])
    assert ended.value.code == 2
    assert "the nearest is learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("dyadlm ev", "evaluate"), ("dyadlm train --pre", "--preset"), ("dyadlm data pre", "prepare")],
)
def test_the_shell_completes_commands_and_options(typed, completed, monkeypatch, capsys):
    monkeypatch.setenv("_DYADLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == [completed]
