"""The model that comes with the package: its folder, its name in every command and function, a quick first answer."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dyadlm import DyadForCausalLM, UserError
from dyadlm.cli import main
from dyadlm.data import byte_tokenizer
from dyadlm.data.tokenizer import load_tokenizer
from dyadlm.diagnose.candidates import find_tokenizer, load_subject
from dyadlm.generate import Sampling, engine_model, load_model, open_session
from dyadlm.model.loading import load_weights, require_found
from dyadlm.recall.models import build_model
from dyadlm.shipped import FOLDER, SHIPPED, place_of_model
from dyadlm.train import export
from dyadlm.train.verification import verify

TINY = FOLDER / "tiny-en"
PARAMETERS = 2_623_520
GREEDY = " of the world the prophet said to the children of Israel, “What do you see the"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, and no network: whoever asks for it fails."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def test_the_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert files.keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert 5e6 < sum(files.values()) <= 6e6
    with safe_open(TINY / "model.safetensors", framework="pt") as weights:
        kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - not a mapping
    assert kinds.pop("model.boundaries.marks") == "U8"
    assert set(kinds.values()) == {"BF16"}


def test_the_card_says_where_the_text_is_from():
    card = (TINY / "README.md").read_text(encoding="utf-8")
    for name in ("shakespeare", "kjv", "sotu", "web", "tdavid", "mhcc", "wordnet", "python", "gcide", "kernel"):
        assert f"| {name} |" in card
    assert "GPL-2.0-or-later" in card
    assert "GPL-2.0-only" in card


def test_it_computes_in_float32():
    for model in (load_weights("tiny-en"), AutoModelForCausalLM.from_pretrained(TINY)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.num_parameters() == PARAMETERS
        assert model.config.max_position_embeddings == 1024  # the length it was trained with


def greedy(model, tokenizer) -> str:
    session = open_session(model, tokenizer)
    session.read_prompt("In the beginning")
    return "".join(session.write(len(GREEDY.encode()), Sampling(temperature=0)))


def test_what_it_writes_is_what_it_wrote():
    """By the engine and by torch."""
    light = engine_model("tiny-en", "cpu", "auto")
    assert light is not None
    assert greedy(light, light.tokenizer) == GREEDY
    assert greedy(*load_model("tiny-en", "cpu")) == GREEDY


def test_it_has_learned_english():
    """Random letters of the same kind cost it 5 times as much."""
    model = engine_model("tiny-en", "cpu", "auto")
    text = b"The people of the United States have given their consent to the treaty, and the war is at an end."

    def bits(letters: bytes) -> float:
        return float(open_session(model, model.tokenizer).read(list(letters))[1:].mean() / np.log(2))

    shuffled = bytes(np.random.default_rng(0).permutation(list(text)).tolist())
    assert bits(text) < 2
    assert bits(shuffled) > 4


# A first answer in a process of its own, as on a machine on which nothing was compiled and nothing is reached.
FIRST = """
import socket, sys
def refuse(*_): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["numba"] = None
from dyadlm.cli import main
main(sys.argv[1:])
"""


def test_a_first_answer_is_quick(place):
    """It needs neither torch nor numba, whose compiler would take some 8 seconds; it takes about 1 second of the
    processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", FIRST, "generate", "tiny-en", "--prompt", "In the beginning", "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"NUMBA_CACHE_DIR": str(place / "none")}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("In the beginning")
    assert len(done.stdout) > 200
    assert done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4


@pytest.mark.parametrize(
    "ask",
    [
        lambda: require_found("tiny-en"),
        lambda: load_tokenizer("tiny-en"),
        lambda: find_tokenizer("tiny-en"),
        lambda: DyadForCausalLM.from_pretrained("tiny-en"),
        lambda: build_model("tiny-en", 64, 128, {}),
    ],
)
def test_functions_know_the_name(ask):
    ask()


def test_a_subject_is_called_by_the_name():
    subject = load_subject("tiny-en")
    assert subject.name == "tiny-en"
    assert subject.tokenizer is not None


def test_it_is_exported_and_whole(place):
    assert all(found.whole for found in verify("tiny-en"))
    export("tiny-en", place / "copy")
    assert (place / "copy" / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert (place / "copy" / "README.md").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "tiny-en", "--data", "text.txt"],
        ["score", "tiny-en", "text.txt", "--top", "1"],
        ["generate", "tiny-en", "--prompt", "The king", "--max-new-tokens", "5"],
        ["generate", "tiny-en", "--prompt", "The king", "--max-new-tokens", "5", "--dtype", "bfloat16"],
        ["inspect", "tiny-en", "--text", "The king", "--output", "levels.png"],
        ["audit", "tiny-en", "--length", "24"],
        ["export", "tiny-en", "--output", "copy"],
        ["verify", "tiny-en"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_know_the_name(place, arguments, capsys):
    (place / "text.txt").write_text("The king speaks of love and war.\n" * 20)
    assert run(*arguments) == 0
    assert capsys.readouterr().out


TRAINING = ["max_steps=2", "per_device_train_batch_size=2", "data.sequence_length=32", "data.validation_tokens=64"]


@pytest.mark.slow
def test_training_goes_on_from_it(place):
    (place / "text.txt").write_text("The king speaks of love and war.\n" * 60)
    given = ["--model", "tiny-en", "--data", "text.txt", "--device", "cpu"]
    assert run("train", *given, "--output", "more", "--set", *TRAINING) == 0
    assert load_weights(place / "more").num_parameters() == PARAMETERS
    pytest.importorskip("peft")
    assert run("train", *given, "--output", "adapter", "--lora", "2", "--set", *TRAINING) == 0
    assert load_weights(place / "adapter").num_parameters() == PARAMETERS


def test_a_run_cannot_have_its_name(place, capsys):
    (place / "text.txt").write_text("The king speaks of love and war.\n" * 60)
    given = ["--model", "tiny-en", "--data", "text.txt", "--device", "cpu", "--set", *TRAINING]
    assert run("train", *given, "--output", "tiny-en") == 2
    assert "choose another --output" in capsys.readouterr().err
    assert not Path("tiny-en").exists()


def test_a_folder_of_that_name_comes_first(place):
    DyadForCausalLM(load_weights("tiny-en").config).save_pretrained(place / "tiny-en")
    byte_tokenizer().save_pretrained(place / "tiny-en")
    assert place_of_model("tiny-en") == "tiny-en"
    found = load_weights("tiny-en").get_input_embeddings().weight
    assert not torch.equal(found, load_weights(TINY).get_input_embeddings().weight)


def test_a_file_of_that_name_is_no_model(place):
    (place / "tiny-en").write_text("a text")
    with pytest.raises(UserError, match="no model folder"):
        load_weights("tiny-en")


def test_other_names_are_left_as_they_are():
    for name in ("tiny", "runs/tiny-en", "./tiny-en", "gpt2", Path("x") / "tiny-en"):
        assert place_of_model(name) == name
    assert {place_of_model(name) for name in SHIPPED} == {folder for folder in FOLDER.iterdir() if folder.is_dir()}
    assert place_of_model(Path("tiny-en")) == TINY
