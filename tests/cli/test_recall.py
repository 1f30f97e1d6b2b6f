"""`dyadlm recall` from end to end, on a model that trains in a moment."""

import json
import signal

import pytest

from dyadlm.cli import main

QUICK = [
    "--task", "mqar", "--part", "length=16,pairs=2,vocabulary=12", "--steps", "2", "--batch-size", "4",
    "--questions", "20", "--device", "cpu",
]  # fmt: skip
TINY = ["--model", "tiny", "--set", "hidden_size=16", "num_hidden_layers=1"]


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_a_sweep_is_kept_and_not_run_again(tmp_path, capsys, monkeypatch):
    path = tmp_path / "study.json"
    sweep = ["--learning-rates", "1e-3", "1e-2", "--seeds", "2", "--output", path]
    assert call("recall", *QUICK, *TINY, *sweep) == 0
    shown = capsys.readouterr()
    assert "chance 0.5" in shown.out
    assert shown.out.count("tiny") == 4
    assert shown.err.count("\n") == 4
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 4
    assert all(result["parts"]["length=16,pairs=2,vocabulary=12"]["total"] == 20 for result in cells.values())
    monkeypatch.setattr("dyadlm.recall.study.measure", None)
    assert call("recall", *QUICK, *TINY, *sweep, "--json") == 0
    assert json.loads(capsys.readouterr().out) == cells


@pytest.mark.parametrize(
    ("number", "code", "options", "end"),
    [
        (signal.SIGINT, 130, ("--output", "kept.json"), "is in kept.json. The same command goes on from there."),
        (signal.SIGINT, 130, ("--output", "study.json"), "Stopped; nothing was measured yet."),
        (signal.SIGTERM, 143, (), "Stopped; nothing is kept without --output."),
    ],
)
def test_a_sweep_that_is_stopped_says_what_is_kept(
    tmp_path, capsys, monkeypatch, signals_as_before, number, code, options, end
):
    monkeypatch.chdir(tmp_path)

    def measured(*given, **more):
        if "kept.json" in options:
            (tmp_path / "kept.json").touch()
        signal.raise_signal(number)

    monkeypatch.setattr("dyadlm.recall.study.measure", measured)
    assert call("recall", *QUICK, *TINY, "--learning-rates", "1e-3", *options) == code
    assert " ".join(capsys.readouterr().err.split()).endswith(end)


def test_other_architectures_and_other_questions(capsys):
    arguments = ["--model", "llama", "--set", "hidden_size=16", "head_dim=16", "--learning-rates", "1e-2"]
    assert call("recall", *QUICK, *arguments, "--test", "length=40,pairs=2,vocabulary=12", "--json") == 0
    (result,) = json.loads(capsys.readouterr().out).values()
    assert list(result["parts"]) == ["length=16,pairs=2,vocabulary=12", "length=40,pairs=2,vocabulary=12"]
    assert result["state_numbers"] == {"8": 2 * 2 * 8 * 16, "16": 2 * 2 * 16 * 16}


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--task", "recollection", "--model", "tiny"], "choose one of mqar"),
        (["--task", "mqar", "--model", "tinny"], "the nearest is tiny"),
        (["--task", "mqar", "--model", "tiny", "--set", "widht=3"], "field 'widht'"),
        (["--task", "mqar", "--model", "llama", "--set", "hiden_size=3"], "the nearest is hidden_size"),
        (["--task", "mqar", "--model", "tiny", "--set", "hidden_size"], "FIELD=VALUE"),
        (["--task", "mqar", "--model", "tiny", "--part", "pairs=99"], "length=396"),
        (["--task", "mqar", "--model", "tiny", "--part", "depth=9"], "no parameter 'depth'"),
        (["--task", "mqar", "--model", "tiny", "--steps", "0"], "at least 1"),
        (["--task", "mqar", "--model", "tiny", "--learning-rates", "-1"], "above 0"),
        (["--task", "mqar", "--model", "tiny", "--device", "abacus"], "no device"),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments, remedy, capsys):
    assert call("recall", "--minutes", "0.001", "--device", "cpu", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert remedy in shown.err
    assert shown.err.startswith("dyadlm: ")
    assert shown.err.count("\n") == 1


def test_the_file_of_another_study_is_left_alone(tmp_path, capsys):
    path = tmp_path / "study.json"
    path.write_text('{"mine": 1}')
    assert call("recall", *QUICK, *TINY, "--output", path) == 2
    assert "choose another file" in capsys.readouterr().err
    assert path.read_text() == '{"mine": 1}'
