"""`dyadlm score` and `dyadlm stream --per line` from end to end: what is printed, refused, saved and followed."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli import main
from dyadlm.cli.units import shown
from dyadlm.data import byte_tokenizer
from dyadlm.generate.streaming import LONGEST_LINE
from dyadlm.score import Unit

LOG = b"the king speaks\n\nthe queen\r\nof love \xff\xfe\nno end"


SMALL = [
    "--set", "model.hidden_size=16", "model.num_hidden_layers=2", "data.sequence_length=32", "max_steps=4",
    "per_device_train_batch_size=2", "save_steps=4", "eval_steps=4", "logging_steps=4", "data.validation_tokens=256",
]  # fmt: skip
WORDS = ["the", "king", "queen", "speaks", "of", "love", "and", "war", "in", "a", "dark", "wood"]


def words(count: int) -> str:
    return " ".join(np.random.default_rng(count).choice(WORDS, count)) + ".\n"


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def give_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def start(place, *arguments) -> subprocess.Popen:
    """A process of its own, for signals and for what has no end. It heeds SIGINT whoever started the tests."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "dyadlm", *arguments]
    return subprocess.Popen(command, cwd=place, text=True, preexec_fn=heed, **pipes)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """A folder with logs, in which `run` is a model."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "slot_layers": [1]}
    DyadForCausalLM(DyadConfig.from_preset("tiny", **small)).save_pretrained(tmp_path / "run")
    byte_tokenizer().save_pretrained(tmp_path / "run")
    (tmp_path / "a.log").write_bytes(LOG)
    (tmp_path / "normal.log").write_text(words(40) * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(out: str) -> tuple[list[dict], dict]:
    *units, last = [json.loads(line) for line in out.splitlines()]
    return units, last["summary"]


def test_json_tells_every_line_and_a_summary(logs, capsys):
    assert call("score", "run", "a.log", "--json") == 0
    units, summary = records(capsys.readouterr().out)
    assert [(unit["line"], unit["offset"], unit["bytes"]) for unit in units] == [
        (1, 0, 16), (2, 16, 1), (3, 17, 11), (4, 28, 11), (5, 39, 6),
    ]  # fmt: skip
    assert units[3]["text"] == "of love \\xff\\xfe\n"
    for unit in units:
        assert unit["bits_per_byte"] == pytest.approx(unit["bits"] / unit["bytes"], abs=1e-3)
        content = LOG[unit["span_offset"] : unit["span_offset"] + unit["span_bytes"]]
        assert content.decode(errors="backslashreplace") == unit["span"]
    assert (summary["lines"], summary["bytes"], summary["drift"]) == (5, len(LOG), None)
    assert summary["bits_per_byte"] == pytest.approx(sum(unit["bits"] for unit in units) / len(LOG), abs=1e-4)


def test_csv_rows_and_standard_input_say_the_same(logs, capsys, monkeypatch):
    assert call("score", "run", "a.log", "--json") == 0
    units, _ = records(capsys.readouterr().out)
    assert call("score", "run", "a.log", "--csv") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["score"]) for row in table] == [unit["score"] for unit in units]
    assert table[3]["text"] == "of love \\xff\\xfe\\n"
    give_input(monkeypatch, LOG)
    assert call("score", "run", "-", "--json") == 0
    again, _ = records(capsys.readouterr().out)
    assert [unit["bits"] for unit in again] == pytest.approx([unit["bits"] for unit in units], abs=1e-3)
    assert call("score", "run", "a.log") == 0
    out, err = capsys.readouterr()
    rows = out.splitlines()[1:]
    assert [float(row.split()[0]) for row in rows] == pytest.approx([unit["score"] for unit in units], abs=0.06)
    assert re.search(r"a.log:4: of love \\xff\\xfe", rows[3])
    assert "\x1b" not in out
    assert err.startswith("5 lines, 45 bytes: ")


def test_the_oddest_units_and_a_threshold(logs, capsys):
    for per in ("line", "document", "token"):
        assert call("score", "run", "a.log", "normal.log", "--per", per, "--json") == 0
        units, _ = records(capsys.readouterr().out)
        assert call("score", "run", "a.log", "normal.log", "--per", per, "--json", "--top", "2") == 0
        top, _ = records(capsys.readouterr().out)
        assert top == sorted(units, key=lambda unit: -unit["score"])[:2]
        edge = top[1]["score"] - 1e-3
        assert call("score", "run", "a.log", "normal.log", "--per", per, "--json", "--threshold", edge) == 0
        passed, summary = records(capsys.readouterr().out)
        assert passed == [unit for unit in units if unit["score"] >= edge]
        assert summary["alerts"] == len(passed) >= 2
    assert {unit["document"] for unit in units} == {"a.log", "normal.log"}


def test_a_line_without_end_is_scored_in_parts(logs, capsys):
    Path("long.log").write_bytes(b"x" * (2 * LONGEST_LINE + 100) + b"\nb\n")
    assert call("score", "run", "long.log", "--json") == 0
    units, _ = records(capsys.readouterr().out)
    assert [(unit["line"], unit["bytes"]) for unit in units] == [(1, 4096), (1, 4096), (1, 101), (2, 2)]


def test_alerts_need_a_calibration_of_the_same_model_and_reading(logs, capsys):
    assert call("score", "run", "normal.log", "--calibrate", "normal.json") == 0
    assert "60 normal lines" in capsys.readouterr().err
    assert call("score", "run", "normal.log", "--calibrate", "normal.json") == 2
    assert "already exists" in capsys.readouterr().err
    Path("odd.log").write_bytes(LOG + b"of something else " * 40)  # an untrained model finds long lines odd
    assert call("score", "run", "odd.log", "--calibration", "normal.json", "--alert", "0.02", "--json") == 0
    (unit,), summary = records(capsys.readouterr().out)
    assert (unit["line"], unit["p"], summary["alerts"]) == (5, 1 / 61, 1)
    for options, message in {
        "--alert 0.001": "--alert 0.017 or more",
        "--alert 0.1 --score mean": "another --score",
        "--alert 0.1 --per document": "another --per",
        "--alert 0.1 --learn": "another --learn",
        "--alert 0.1 --slot-entries 64": "another --set or --slot-entries ('', not 'slot_entries=64')",
        "--alert 0.1 --threshold 3": "not both",
    }.items():
        assert call("score", "run", "a.log", "--calibration", "normal.json", *options.split()) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("run none.log", "There is no file none.log"),
        ("run .", "is a folder"),
        ("run a.png", "is not text"),
        ("run a.log --alert 0.1", "--calibration"),
        ("run a.log --calibration none.json", "There is no calibration"),
        ("run a.log --json --csv", "not both"),
        ("run a.log --calibrate new.json --top 3", "--calibrate shows no units"),
        ("run empty.log --calibrate new.json", "nothing to calibrate on"),
        ("none a.log", "none"),
    ],
)
def test_requests_that_are_refused(logs, capsys, request_, message):
    Path("a.png").write_bytes(b"\x89PNG")
    Path("empty.log").write_bytes(b"")
    before = sorted(os.listdir())
    assert call("score", *request_.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "options",
    ["--follow a.log", "--alert 0.1", "--learn", "--score mean", "--per line --continue 3"],
)
def test_streams_of_tokens_have_no_lines(logs, capsys, options):
    assert call("stream", "run", *options.split()) == 2
    assert "--per line" in capsys.readouterr().err


def test_a_memory_is_kept_in_the_state_and_told_by_the_calibration(logs, capsys, monkeypatch):
    small = ("--memory", "--memory-entries", "64")
    content = Path("normal.log").read_bytes()
    half = content.index(b"\n", len(content) // 2) + 1
    Path("first.log").write_bytes(content[:half])
    Path("second.log").write_bytes(content[half:])
    levels = {}
    for name, options in {"none": (), "small": small, "usual": ("--memory",)}.items():
        assert call("score", "run", "first.log", *options, "--json", "--state-out", f"{name}.state") == 0
        levels[name] = records(capsys.readouterr().out)[1]["bits_per_byte"]
    assert levels["usual"] < levels["small"] < levels["none"]
    assert call("score", "run", "second.log", *small, "--json", "--state-in", "small.state") == 0
    units, _ = records(capsys.readouterr().out)
    give_input(monkeypatch, content[half:])
    assert call("stream", "run", "--per", "line", *small, "--json", "--state-in", "small.state") == 0
    streamed, _ = records(capsys.readouterr().out)
    assert [unit["bits"] for unit in streamed] == pytest.approx([unit["bits"] for unit in units], abs=0.02)
    assert call("score", "run", "normal.log", *small, "--calibrate", "with.json") == 0
    assert call("score", "run", "normal.log", "--calibrate", "without.json") == 0
    assert call("score", "run", "a.log", *small, "--calibration", "with.json", "--alert", "0.1") == 0
    capsys.readouterr()
    for options, message in {
        "--calibration with.json": "another --memory (64, not 0)",
        "--calibration with.json --memory": "another --memory (64, not 16384)",
        "--calibration without.json --memory": "another --memory (0, not 16384)",
        "--state-in small.state": "holds a memory, which would be lost; add --memory",
        "--state-in small.state --memory": "has 64 entries, which cannot change; add --memory-entries 64",
        "--memory-entries 64": "does nothing without --memory",
        "--memory --memory-entries 63": "power of two",
    }.items():
        assert call("score", "run", "a.log", *options.split()) == 2
        assert message in capsys.readouterr().err


def test_learning_goes_on_from_the_state(logs, capsys):
    parts = Path("normal.log").read_bytes()
    half = parts.index(b"\n", len(parts) // 2) + 1
    Path("first.log").write_bytes(parts[:half])
    Path("second.log").write_bytes(parts[half:])
    assert call("score", "run", "first.log", "--learn", "--state-out", "learned", "--json") == 0
    _, first = records(capsys.readouterr().out)
    assert call("score", "run", "second.log", "--learn", "--state-in", "learned", "--json") == 0
    _, second = records(capsys.readouterr().out)
    assert second["bits_per_byte"] < first["bits_per_byte"]
    assert call("score", "run", "second.log", "--state-in", "learned") == 2
    assert "--learn" in capsys.readouterr().err
    assert call("score", "run", "second.log", "--learn", "--state-out", "learned") == 2
    assert "already exists" in capsys.readouterr().err


def wait_for(process, texts):
    """Rows of the process until each of the texts has come."""
    found = []
    while len(found) < len(texts):
        row = json.loads(process.stdout.readline())
        found.append(row["text"])
    assert found == texts


def test_a_file_is_followed_through_rotation_and_after_a_stop(logs):
    """By real processes: rotation by name, SIGTERM, and reading on from the state without a line lost or read twice."""
    Path("app.log").write_text("one\ntwo\n")
    follow = ("stream", "run", "--per", "line", "--json", "--follow", "app.log", "--state-out", "app.state")
    with start(logs, *follow) as process:
        wait_for(process, ["one\n", "two\n"])
        os.rename("app.log", "app.log.1")
        Path("app.log").write_text("three\nhal")
        wait_for(process, ["three\n"])
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the state so far is in app.state" in err
    with Path("app.log").open("a") as log:
        log.write("f\nfour\n")
    with start(logs, *follow, "--state-in", "app.state") as process:
        wait_for(process, ["half\n", "four\n"])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1])["summary"]["lines"] == 2


def test_lines_of_a_stream_come_before_it_ends(logs):
    with start(logs, "stream", "run", "--per", "line", "--json") as process:
        process.stdin.write("the king\n")
        process.stdin.flush()
        wait_for(process, ["the king\n"])
        process.stdin.close()
        process.stdin = None
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["summary"]["lines"] == 1


@pytest.mark.parametrize("room", [None, 200, 20, 10, 5])
@pytest.mark.parametrize("span", [(0, 3), (30, 42), (57, 61), (0, 61)])
def test_the_span_is_shown_in_any_width(room, span):
    content = bytes(range(97, 122)) * 2 + b"0123456789\n"
    unit = Unit("a", 1, 0, content, 1, 61, 1, span)
    before, odd, after = shown(unit, room)
    whole = content.decode().replace("\n", "\\n")[span[0] : span[1] + (span[1] == 61)]
    assert odd == whole[:room]
    if room is not None:
        assert len(before) + len(odd) + len(after) <= room
    else:
        assert before + odd + after == content.decode().replace("\n", "\\n" if span[1] == 61 else "")
