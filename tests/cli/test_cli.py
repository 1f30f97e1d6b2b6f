"""The verbs from end to end, on text made here and a model that trains in a second."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dyadlm import DyadCache, DyadConfig
from dyadlm.cli import main
from dyadlm.cli.app import spread_lists
from dyadlm.cli.shared import as_shown
from dyadlm.cli.train import _print_cost, duration
from dyadlm.files import printable
from dyadlm.train import RunInterrupted
from dyadlm.train.settings import NAMESPACES
from dyadlm.version import __version__

SMALL = [
    "--set", "model.hidden_size=16", "model.num_hidden_layers=2", "data.sequence_length=32", "max_steps=4",
    "per_device_train_batch_size=2", "save_steps=2", "eval_steps=2", "logging_steps=1", "data.validation_tokens=256",
]  # fmt: skip
WORDS = ["the", "king", "queen", "speaks", "of", "love", "and", "war", "in", "a", "dark", "wood", "by", "night"]


def words(count: int) -> str:
    chosen = np.random.default_rng(count).choice(WORDS, count)
    return " ".join(chosen) + ".\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, a finished run, and nothing else; the cache is elsewhere."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(words(600))
    (place / "other.txt").write_text(words(500))
    (place / "empty.txt").write_text("")
    (place / "short.txt").write_text("short")
    (place / "bytes.dat").write_bytes(bytes(range(256)) * 20)
    (place / "no-model").mkdir()
    (place / "no-model" / "notes.md").write_text("nothing here")
    word_tokenizer().save_pretrained(place / "words")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYADLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(place)
        call("train", "--preset", "tiny", "--data", "text.txt", "--output", "run", *SMALL)
        call("data", "prepare", "other.txt", "--output", "word-data", "--tokenizer", "words")
        yield place


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*WORDS, " ", ".", "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code or 0
    assert code in (0, 1, 2)
    return code


def contents(place) -> dict:
    return {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def start(place, *arguments) -> subprocess.Popen:
    """A process of its own, for what only signals and pipes can tell."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's background jobs ignore SIGINT, and their children with them; what is tested is the program.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "dyadlm", *arguments]
    return subprocess.Popen(command, cwd=place, text=True, preexec_fn=heed, **pipes)


# ---- Errors


REQUESTS = {
    "unknown preset": ("train --preset huge --data text.txt --output new", "huge"),
    "unknown corpus": ("train --preset tiny --data shakespear --output new", "shakespear"),
    "unknown corpus to fetch": ("data fetch shakespear", "shakespear"),
    "unknown key": ("train --preset tiny --data text.txt --output new --set max_step=3", "max_steps"),
    "unknown key of ours": ("train --preset tiny --data text.txt --output new --set data.canary=3", "canaries"),
    "unknown field": ("train --preset tiny --data text.txt --output new --set model.levels=3", "levels"),
    "unknown value": ("train --preset tiny --data text.txt --output new --set max_steps=many", "max_steps"),
    "unknown value of a field": (
        "train --preset tiny --data text.txt --output new --set model.level_feature=sum", "level_feature",
    ),
    "field of another type": ("train --preset tiny --data text.txt --output new --set model.dropout=much", "a number"),
    "fraction for a whole number": (
        "train --preset tiny --data text.txt --output new --set model.hidden_size=1.5", "model.hidden_size",
    ),
    "unknown field of a folder": (
        "train --model run --data text.txt --output new --set model.dropuot=1e-1", "the nearest is dropout",
    ),
    "field of a folder of another type": (
        "train --model run --data text.txt --output new --set model.dropout=much", "model.dropout cannot be",
    ),
    "unknown field to evaluate with": (
        "evaluate run --data text.txt --set dropuot=1e-1", "the nearest is dropout",
    ),
    "field of another type to evaluate with": (
        "evaluate run --data text.txt --set rms_norm_eps=small", "rms_norm_eps cannot be 'small'; it takes a number",
    ),
    "unknown field to generate with": ("generate run --prompt a --set dropuot=1e-1", "the nearest is dropout"),
    "flag of another type to generate with": ("generate run --prompt a --set use_cache=3", "true or false"),
    "unknown field to stream with": ("stream run --set dropuot=1e-1", "the nearest is dropout"),
    "unknown field to inspect with": (
        "inspect run --text abc --output new.png --set dropuot=1e-1", "the nearest is dropout",
    ),
    "unknown field of a recall model": (
        "recall --task copying --model tiny --set dropuot=1e-1", "did you mean 'dropout'",
    ),
    "key without value": ("train --preset tiny --data text.txt --output new --set max_steps", "key=value"),
    "unknown device": ("train --preset tiny --data text.txt --output new --device abacus", "abacus"),
    "no preset and no model": ("train --data text.txt --output new", "--preset"),
    "no data": ("train --preset tiny --output new", "--data"),
    "missing configuration": ("train --preset tiny --data text.txt --output new --config none.yaml", "none.yaml"),
    "missing file": ("train --preset tiny --data none.txt --output new", "none.txt"),
    "empty file": ("train --preset tiny --data empty.txt --output new", "empty.txt"),
    "empty file to prepare": ("data prepare empty.txt --output new", "empty.txt"),
    "missing file to evaluate": ("evaluate run --data none.txt", "none.txt"),
    "shorter than one window": ("train --preset tiny --data short.txt --output new", "short"),
    "no text for a text tokenizer": ("data prepare bytes.dat --output new --tokenizer words", "bytes.dat"),
    "unknown tokenizer": ("data prepare text.txt --output new --tokenizer none/none", "none/none"),
    "no model": ("generate no-model --prompt a", "no-model"),
    "no model to evaluate": ("evaluate no-model --data text.txt", "no-model"),
    "no model to train on from": ("train --model no-model --data text.txt --output new", "no-model"),
    "no model to export": ("export no-model --output new", "no-model"),
    "no run to report on": ("report no-model --output new", "no-model"),
    "missing model": ("generate none --prompt a", "none"),
    "checkpoint of another config": (
        "train --preset tiny --data text.txt --output run --resume --set model.hidden_size=32", "run",
    ),
    "output holds a run": (f"train --preset tiny --data text.txt --output run {' '.join(SMALL)}", "--resume"),
    "output holds something else": ("train --preset tiny --data text.txt --output no-model", "no-model"),
    "prepared already": ("data prepare text.txt --output word-data", "word-data"),
    "exported already": ("export run --output no-model", "no-model"),
    "reported already": ("report run --output no-model", "no-model"),
    "picture already": ("inspect run --text abc --output picture.png", "picture.png"),
    "picture that is none": ("inspect run --text abc --output picture.jpg", ".png"),
    "no text to inspect": ("inspect run --text= --output new.png", "at least one character"),
    "vocabulary mismatch": ("evaluate run --data word-data", "tokenizer"),
    "vocabulary mismatch in training": ("train --model run --data word-data --output new", "tokenizer"),
    "empty prompt": ("generate run --prompt=", "prompt"),
    "temperature": ("generate run --prompt a --temperature=-1", "temperature"),
    "state of nothing": ("generate run --prompt a --state-in none.safetensors", "none.safetensors"),
    "state that is none": ("generate run --prompt a --state-in text.txt", "text.txt"),
    "state already there": ("generate run --prompt a --state-out text.txt", "text.txt"),
    "window of nothing": ("evaluate run --data text.txt --window 0", "at least 1"),
    "window of a stream": ("evaluate run --data text.txt --window 8 --stream", "not both"),
    "unknown split": ("evaluate run --data text.txt --split training", "training"),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_wrong_requests_end_with_one_sentence_and_change_nothing(name, place, capsys):
    request, named = REQUESTS[name]
    if name == "picture already":
        (place / "picture.png").write_bytes(b"a picture")
    before = contents(place)
    assert call(*request.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *told, sentence = err.splitlines()
    assert sentence.startswith("dyadlm: ")
    assert all(line.startswith(("device", "dtype")) for line in told)  # what a run says when it begins
    assert named in sentence
    assert "Traceback" not in err
    assert contents(place) == before
    assert not (place / "new").exists()
    assert not list(place.glob(".staging-*"))


@pytest.mark.parametrize(
    "request_",
    ["nonsense", "train", "train --output", "evaluate", "evaluate run", "generate run", "data prepare text.txt"],
)
def test_incomplete_requests(request_, place, capsys):
    assert call(*request_.split()) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_failed_runs_end_with_1(place, capsys):
    diverging = ["--set", "learning_rate=1e9", "max_grad_norm=0", "train.divergence_rise=0.1", "max_steps=40"]
    assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", "diverged", *SMALL, *diverging) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "checkpoint" in err.splitlines()[-1]


# ---- What works


def test_version_and_help(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"dyadlm {__version__}\n"
    for verb in (
        (),
        ("train",),
        ("evaluate",),
        ("generate",),
        ("stream",),
        ("inspect",),
        ("export",),
        ("data", "list"),
    ):
        assert call(*verb, "--help") == 0
        shown = capsys.readouterr().out
        assert "Usage" in shown
        if verb == ("train",):
            assert all(f"{name}.FIELD" in shown for name in ("model", *NAMESPACES))


@pytest.mark.parametrize(
    "request_",
    [
        "evaluate run --data text.txt",
        "generate run --prompt a --max-new-tokens 2",
        "inspect run --text abc --output fields.png",
        "train --model run --data text.txt --output other-fields --dry-run",
        "train --preset tiny --data text.txt --output other-fields --dry-run",
    ],
)
def test_fields_are_coerced_by_every_verb(request_, place, capsys):
    prefix = "model." if request_.startswith("train") else ""
    values = ("dropout=1e-1", "rms_norm_eps=1e-5", "use_cache=true", "bos_token_id=null", "eos_token_id=[1,2]")
    assert call(*request_.split(" "), "--set", *(prefix + value for value in values)) == 0
    assert capsys.readouterr().out


def test_lists_of_values():
    assert spread_lists(["train", "--data", "a", "b:2", "-", "--set", "x=1", "y=2", "--resume"]) == (
        ["train", "--data", "a", "--data", "b:2", "--data", "-", "--set", "x=1", "--set", "y=2", "--resume"]
    )
    assert spread_lists(["evaluate", "run", "--data", "a", "--json"]) == ["evaluate", "run", "--data", "a", "--json"]
    assert spread_lists(["--data", "a", "--", "b"]) == ["--data", "a", "--", "b"]


def test_durations():
    assert [duration(s) for s in (4.4, 60, 3725)] == ["4 s", "1 min 0 s", "1 h 2 min"]


def test_corpora_are_listed(capsys):
    assert call("data", "list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("shakespeare", "kjv", "sotu"))


def test_a_dry_run_leaves_nothing(place, capsys):
    before = contents(place)
    assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", "new", "--dry-run", *SMALL) == 0
    out = capsys.readouterr().out
    expected = ("parameters", "memory", "tokens: 256 in 4 steps of 64", "matrix products", "time")
    assert all(word in out for word in expected)
    assert "alone" not in out
    assert contents(place) == before
    assert not (place / "new").exists()


def test_a_dry_run_tells_the_model_from_what_trains_beside_it(capsys):
    figures = {"peak_memory_bytes": 1, "static_memory_bytes": 1, "tokens": 8, "steps": 2, "tokens_per_step": 4}
    cost = {"parameters": 5000, "parameters_in_training_alone": 1200, "flops": 3e6, "choices": [], **figures}
    _print_cost(cost | {"seconds": 1.0, "seconds_per_step": 0.5, "windows_per_step": 1, "windows_timed": 1})
    out = capsys.readouterr().out
    assert "parameters: 5,000, and 1,200 in training alone\n" in out


def test_training_goes_on(place, capsys):
    before = contents(place / "run")
    assert call("train", "--output", "run", "--resume") == 0
    assert "4 steps, 256 tokens" in capsys.readouterr().out
    assert contents(place / "run") == before
    assert (
        call(
            "train", "--model", "run", "--data", "text.txt:2", "other.txt", "--output", "longer", *SMALL[:1], *SMALL[4:]
        )
        == 0
    )
    assert (place / "longer" / "model.safetensors").is_file()


def test_three_ways_to_evaluate(place, capsys):
    results = {}
    for options in ((), ("--window", "16"), ("--stream",)):
        assert call("evaluate", "run", "--data", "text.txt", "--json", *options) == 0
        result = json.loads(capsys.readouterr().out)
        results[result["mode"]] = result
        assert result["parts"] == {"text.txt": "whole"}
        assert result["model"] == "run"
    assert {mode: result["window"] for mode, result in results.items()} == {
        "disjoint": 32,
        "rolling": 16,
        "stream": None,
    }
    assert results["disjoint"]["tokens"] == results["rolling"]["tokens"] + 1  # the end of the document
    assert call("evaluate", "run", "--data", "text.txt", "--split", "train") == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "95% interval" in out
    assert "Only a part was scored: text.txt (train alone)" in out


def test_a_file_is_scored_whole_and_what_was_trained_on_is_said(place, capsys):
    size = (place / "text.txt").stat().st_size
    assert call("evaluate", "run", "--data", "text.txt", "--json") == 0
    read = capsys.readouterr()
    assert json.loads(read.out)["bytes"] == size
    assert "run was trained on text.txt; --split validation scores the part that was held out" in read.err
    assert call("evaluate", "run", "--data", "text.txt", "--split", "validation", "--json") == 0
    read = capsys.readouterr()
    assert json.loads(read.out)["bytes"] == size - size * 9 // 10
    assert "trained on" not in read.err
    record = place / "run" / "dyadlm.json"
    content = record.read_text()
    record.write_text("{")
    try:
        assert call("evaluate", "run", "--data", "text.txt", "--json") == 0  # a figure is not lost for that
    finally:
        record.write_text(content)
    assert json.loads(capsys.readouterr().out)["bytes"] == size
    assert call("evaluate", "run", "--data", "other.txt") == 0
    read = capsys.readouterr()
    assert "Only a part" not in read.out
    assert "trained on" not in read.err


def test_generation_prints_and_repeats(place, capsys):
    arguments = ["generate", "run", "--prompt", "the king", "--max-new-tokens", "12", "--seed", "3"]
    assert call(*arguments) == 0
    first = capsys.readouterr().out
    assert call(*arguments) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("the king")
    assert first.endswith("\n")
    assert call(*arguments[:4], "--max-new-tokens", "5", "--state-out", "state.safetensors") == 0
    assert call("generate", "run", "--prompt", " speaks", "--state-in", "state.safetensors", "--top-k", "3") == 0


def give_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_prompt_on_standard_input(place, capsys, monkeypatch):
    give_input(monkeypatch, "the queen é".encode())
    assert call("generate", "run", "--prompt", "-", "--max-new-tokens", "3") == 0
    assert capsys.readouterr().out.startswith("the queen é")
    give_input(monkeypatch, b"\xff\xfe")
    assert call("generate", "run", "--prompt", "-") == 2
    assert "UTF-8" in capsys.readouterr().err


def test_streaming_surprisals_as_they_come_until_interrupted(place):
    with start(place, "stream", "run", "--json") as process:
        process.stdin.write("the\n")
        process.stdin.flush()
        told = [json.loads(process.stdout.readline()) for _ in range(4)]  # while the input is open
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert [surprise["text"] for surprise in told] == ["t", "h", "e", "\n"]
    assert told[-1]["mean_nats"] == pytest.approx(np.log(2) * np.mean([surprise["bits"] for surprise in told]))
    assert (process.returncode, out, err.strip()) == (0, "", "")


def test_streaming_a_table_of_any_bytes(place, capsys, monkeypatch):
    give_input(monkeypatch, b"a\xff\n")
    assert call("stream", "run") == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["0", "1", "2"]
    assert [line.split()[-1] for line in out.splitlines()] == ["'a'", "'\ufffd'", "'\\n'"]
    assert err.startswith("3 tokens read: ")


def test_streaming_on_demand(place, capsys, monkeypatch):
    written = []
    for content in (b"the king\n", b"the king\ngo\n", b"the king\ngo\nand the queen\n"):
        give_input(monkeypatch, content)
        assert call("stream", "run", "--continue", "4", "--marker", "go", "--temperature", "0") == 0
        out, err = capsys.readouterr()
        written.append(out)
        assert err.startswith(f"{len(content.replace(b'go' + bytes([10]), b''))} tokens read")
    # At the end of the input, or at the marker: once for what was read, and again when more was.
    assert written[0] == written[1]
    assert written[2].startswith(written[0])
    assert len(written[2]) > len(written[0])


def test_a_reader_may_leave(place):
    endless = ("--max-new-tokens", "100000", "--temperature", "0")  # sampling might come to an end of its own
    with start(place, "generate", "run", "--prompt", "a", *endless) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_an_interrupted_generation_ends_without_a_traceback(place):
    endless = ("--max-new-tokens", "100000", "--temperature", "0")  # sampling might come to an end of its own
    with start(place, "generate", "run", "--prompt", "a", *endless) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("verb", ["generate", "stream"])
@pytest.mark.parametrize(("how", "code"), [("SIGINT", None), ("SIGTERM", 143), ("SIGHUP", 129), ("leave", 0)])
def test_states_are_never_lost(place, tmp_path, verb, how, code):
    """However a command ends, what it has read is in the file, and the file can be taken up again."""
    state = tmp_path / "state"
    endless = ["--prompt", "a", "--max-new-tokens", "100000", "--temperature", "0"] if verb == "generate" else []
    with start(place, verb, "run", *endless, "--state-out", str(state)) as process:
        if verb == "stream":
            process.stdin.write("the king\n" * 3)
            process.stdin.flush()
        process.stdout.read(20)
        if how == "leave":
            process.stdout.close()
            if verb == "stream":
                with contextlib.suppress(BrokenPipeError):  # it may have ended by then
                    process.stdin.write("the queen\n" * 10_000)
                    process.stdin.close()
            err = process.stderr.read()
            process.wait(timeout=60)
        else:
            process.send_signal(getattr(signal, how))
            _, err = process.communicate(timeout=60)
    if code is None:
        code = 130 if verb == "generate" else 0
    assert process.returncode == code, err
    assert f"the state so far is in {state}" in err
    assert "Traceback" not in err
    read = int(DyadCache.load(state, DyadConfig.from_pretrained(place / "run")).position)
    assert read >= 20 if verb == "generate" else read >= 27
    assert call("generate", "run", "--prompt", "a", "--max-new-tokens", "2", "--state-in", state) == 0


@pytest.mark.parametrize("kind", ["folder", "file/state", "pipe", "link", "/proc/none/state"])
def test_places_that_cannot_hold_a_state_are_refused_before_anything_is_read(place, tmp_path, capsys, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    state = kind if kind.startswith("/") else tmp_path / kind
    for arguments in (("generate", "run", "--prompt", "a"), ("stream", "run")):
        assert call(*arguments, "--state-out", state) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_the_end_of_a_long_line_is_no_marker(place, capsys, monkeypatch):
    give_input(monkeypatch, b"a" * 4096 + b"go\nthe\n")
    assert call("stream", "run", "--continue", "3", "--marker", "go", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    assert err.startswith("4,103 tokens read")
    assert out.count("\n") <= 4  # what was written once, at the end


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_of_other_encodings(place, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "DYADLM_CACHE": str(place)}
    command = [sys.executable, "-m", "dyadlm", "generate", "run", "--prompt", "caf\xe9 日本", "--max-new-tokens", "2"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"caf\\xe9 " if encoding == "ascii" else b"caf\xe9 ")
    assert b"\\u65e5" in done.stdout


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
@pytest.mark.parametrize("request_", ["stream run", "generate run --prompt -"])
def test_closed_standard_input_and_output(place, closed, request_):
    shell = f"{sys.executable} -m dyadlm {request_} {'<&-' if closed == 'stdin' else '>&- <text.txt'}"
    done = subprocess.run(shell, shell=True, cwd=place, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_is_no_text(place, capsys):
    prompt = os.fsdecode(b"caf\xe9")
    assert call("generate", "run", "--prompt", prompt) == 2
    assert "The prompt is not UTF-8 text" in capsys.readouterr().err
    assert call("inspect", "run", "--text", prompt, "--output", "new.png") == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_what_a_model_writes_does_not_steer_a_terminal(place, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert as_shown("a\x1b[2J\r\tb\n\x9b é", raw=False) == "a\\x1b[2J\\r\tb\n\\x9b é"
    assert as_shown("a\x1b[2J", raw=True) == "a\x1b[2J"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert as_shown("a\x1b[2J", raw=False) == "a\x1b[2J"


def test_names_with_brackets_and_escapes(place, tmp_path, capsys):
    for name in ("a[/x] b", "[red]run", "run \x1b[2J"):
        run = tmp_path / "folder[" / name
        assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", run, *SMALL, "max_steps=1") == 0
        capsys.readouterr()
        assert call("train", "--output", run, "--resume") == 0
        out, err = capsys.readouterr()
        assert f"{printable(str(run))} is already finished." in err
        assert "\x1b" not in out + err


def test_progress_that_cannot_be_written_ends_nothing(place, tmp_path):
    command = [sys.executable, "-m", "dyadlm", "train", "--preset", "tiny", "--data", "text.txt"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--output", str(tmp_path / "run"), *SMALL], cwd=place, stderr=full)
    assert done.returncode == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_inspecting_draws_a_picture(place):
    assert call("inspect", "run", "--text", "the dark wood", "--output", "tower.png") == 0
    assert (place / "tower.png").read_bytes().startswith(b"\x89PNG")


def test_exporting_leaves_training_behind(place, capsys):
    assert call("export", "run", "--output", "exported") == 0
    names = {path.name for path in (place / "exported").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"dyadlm.json", "metrics.jsonl", "tensorboard", "checkpoint-4"}
    capsys.readouterr()
    assert call("evaluate", "exported", "--data", "text.txt") == 0
    assert call("evaluate", "run", "--data", "text.txt") == 0
    first, second = capsys.readouterr().out.split("bits per byte")[:2]
    assert first.split()[0] == second.split("\n")[-1].split()[0] or first in second


def test_a_report_says_it_all(place):
    assert call("report", "run", "--output", "report", "--prompt", "the ") == 0
    page = (place / "report" / "README.md").read_text()
    for said in (
        "bits per byte",
        "no interval",
        "text.txt",
        "hidden_size | 16",
        "loss.png",
        "tower.png",
        "```text\nthe ",
    ):
        assert said in page
    figures = json.loads((place / "report" / "evaluation.json").read_text())
    assert f"{figures['bits_per_byte']:.4f}" in page
    for picture in ("loss.png", "tower.png"):
        assert (place / "report" / picture).read_bytes().startswith(b"\x89PNG")


def test_prepared_data_trains_and_evaluates(place, capsys):
    assert call("data", "prepare", "text.txt", "--output", "data", "--validation", "other.txt") == 0
    assert "train: " in capsys.readouterr().out
    assert call("train", "--preset", "tiny", "--data", "data", "--output", "prepared-run", *SMALL) == 0
    assert call("evaluate", "prepared-run", "--data", "data") == 0


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_shards_are_not_asked_of_accelerate(place, capsys, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", "elsewhere") == 2
    assert "--set fsdp=true" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_that_were_stopped_the_first_says_so(place, capsys, monkeypatch, rank):
    def stopped(*arguments, **options):
        raise RunInterrupted("Stopped at step 3 of 9 and saved.", signal.SIGTERM)

    monkeypatch.setattr("dyadlm.train.train", stopped)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--preset", "tiny", "--data", "text.txt", "--output", "stopped"])
    assert ended.value.code == 143
    assert capsys.readouterr().err == ("dyadlm: Stopped at step 3 of 9 and saved.\n" if rank == "0" else "")


def test_an_error_of_the_system_is_one_sentence_and_exit_code_1(place, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "model")

    monkeypatch.setattr("dyadlm.train.export", full)
    assert call("export", "run", "--output", "elsewhere") == 1
    error = capsys.readouterr().err
    assert error.startswith("dyadlm: ")
    assert "No space left on device" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), ""),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            " for another 4 bytes",
        ),
    ],
)
def test_memory_that_is_full_is_one_sentence_and_exit_code_1(monkeypatch, capsys, error, wanted):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("dyadlm.train.plan", full)
    assert call("plan", "--preset", "tiny") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"dyadlm: There is not enough memory{wanted}; use a smaller model, shorter texts or smaller batches, or "
        "another machine."
    )


def test_an_export_with_its_map_loads_where_nobody_imports_dyadlm(place, tmp_path):
    assert call("export", "run", "--output", tmp_path / "mapped", "--auto-map") == 0
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert 'dyadlm' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__, tuple(model(torch.arange(5)[None]).logits.shape))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "mapped")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "DyadForCausalLM (1, 5, 259)"


def test_a_plan_of_many_passes_and_the_defaults_of_going_on_are_remarked_upon(place, tmp_path, capsys):
    many = [*SMALL, "max_steps=2000"]
    assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", tmp_path / "a", *many, "--dry-run") == 0
    assert "times, so that the model will know it by heart" in capsys.readouterr().out
    assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", tmp_path / "b", *SMALL, "--dry-run") == 0
    assert "by heart" not in capsys.readouterr().out
    few = ["--set", "max_steps=1", "data.sequence_length=32", "data.validation_tokens=256"]
    assert call("train", "--model", "run", "--data", "text.txt", "--output", tmp_path / "c", *few, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "going on from run: max_steps=1, learning_rate=0.0003, per_device_train_batch_size=8" in out
