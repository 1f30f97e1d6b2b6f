"""`dyadlm diagnose` from end to end: what it prints and keeps, and what it says of what is not as it should be."""

import json
import struct
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_gguf_available

from dyadlm.cli import main
from dyadlm.cli.diagnosing import budget_for, names
from dyadlm.data import byte_tokenizer
from dyadlm.diagnose import Diagnosis, candidates, chosen
from dyadlm.diagnose import run as running
from dyadlm.diagnose.oracles import Oracle, independent, uniform
from dyadlm.diagnose.probes.leak import Leak

WORDS = ["the", "king", "queen", "speaks", "of", "love", "and", "war", "in", "a", "dark", "wood", "by", "night"]
TRAINING = [
    "--set", "model.hidden_size=16", "model.num_hidden_layers=1", "data.sequence_length=32", "max_steps=2",
    "per_device_train_batch_size=2", "save_steps=1", "eval_steps=2", "logging_steps=1", "data.validation_tokens=64",
]  # fmt: skip


class Large(Oracle):
    """Nothing but its size."""

    def __init__(self, width: int):
        super().__init__(2**20, lambda ids: ids, "large")
        self._layer = torch.nn.Linear(width, width, device="meta")

    @property
    def module(self) -> torch.nn.Module:
        return self._layer


def interrupted(*arguments):
    raise KeyboardInterrupt


def words(count: int) -> str:
    return " ".join(np.random.default_rng(count).choice(WORDS, count)) + ".\n"


def llama(folder, vocabulary=259, context=512, tokenizer=True, broken=False, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if broken:
        torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models and texts; the cache is elsewhere."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(words(12000))
    (place / "short.txt").write_text(words(40))
    (place / "garbage.gguf").write_bytes(b"nothing of the kind")
    llama(place / "whole")
    llama(place / "other")
    for seed in range(3):
        llama(place / f"plain-seed{seed}", seed=seed)
    llama(place / "untold", tokenizer=False)
    llama(place / "narrow", vocabulary=100)
    llama(place / "broken", broken=True)
    llama(place / "near", context=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYADLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(place)
        yield place


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def diagnosed(capsys, *arguments) -> dict:
    """The results of the one model asked, by probe."""
    assert call("diagnose", *arguments, "--fast", "--json", "--device", "cpu") == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found["results"]


def test_models_side_by_side_are_kept_and_not_asked_again(capsys, tmp_path, monkeypatch):
    output = tmp_path / "found"
    arguments = ["diagnose", "whole", "other", "--probe", "leak", "position", "--data", "text.txt", "--fast",
                 "--output", output, "--device", "cpu"]  # fmt: skip
    assert call(*arguments) == 0
    shown = capsys.readouterr()
    assert "No leak" in shown.out
    assert "From position 50" in shown.out
    assert shown.out.count("whole") == shown.out.count("other") == 2
    kept = Diagnosis.load(output / "whole.json")
    assert list(kept.results) == ["leak", "position"]
    assert (output / "report" / "index.html").is_file()
    monkeypatch.setattr(running, "ask", None)
    assert call(*arguments) == 0
    assert capsys.readouterr().out == shown.out


@pytest.mark.slow
def test_models_at_once_are_found_as_one_by_one(capsys, tmp_path):
    arguments = [
        "diagnose",
        "whole",
        "plain-seed1",
        "--probe",
        "position",
        "--data",
        "text.txt",
        "--fast",
        "--device",
        "cpu",
    ]
    assert call(*arguments) == 0
    alone = capsys.readouterr().out
    assert call(*arguments, "--jobs", "2", "--output", tmp_path / "found") == 0
    assert capsys.readouterr().out == alone
    assert list(Diagnosis.load(tmp_path / "found" / "plain-seed1.json").results) == ["position"]
    assert call(*arguments, "--address", "auto") == 2
    assert "--engine ray" in capsys.readouterr().err


def test_seeds_are_shown_as_one_and_kept_each(capsys, tmp_path):
    seeds = [f"plain-seed{seed}" for seed in range(3)]
    arguments = ["--probe", "bytes", "--data", "text.txt", "--fast", "--output", tmp_path, "--device", "cpu", "--json"]
    assert call("diagnose", "whole", *seeds, *arguments, "--pool-seeds", "--references") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["subject"] for each in shown][:2] == ["whole", "plain"]
    assert len(shown) == 3  # and random weights
    kept = [Diagnosis.load(tmp_path / f"{seed}.json") for seed in seeds]
    values = [each.results["bytes"].readings["bits_per_byte"].value for each in kept]
    pooled = shown[1]["results"]["bytes"]["readings"]["bits_per_byte"]
    assert len(set(values)) == 3
    assert pooled["value"] == pytest.approx(sum(values) / 3)
    assert pooled["interval"][0] < min(values) < max(values) < pooled["interval"][1]
    stored = json.loads((tmp_path / "report" / "diagnoses.json").read_text())
    assert [each["subject"] for each in stored["diagnoses"]] == ["whole", "plain"]
    assert stored["seeds"] == [json.loads((tmp_path / f"{seed}.json").read_text()) for seed in seeds]
    assert call("diagnose", "whole", *arguments, "--pool-seeds") == 0
    assert "NAME-seed0" in capsys.readouterr().err


def test_what_is_not_of_the_report_is_left_alone(capsys, tmp_path):
    output = tmp_path / "found"
    arguments = ["diagnose", "whole", "--probe", "leak", "--data", "text.txt", "--fast", "--output", output]
    assert call(*arguments, "--device", "cpu") == 0
    (output / "report" / "notes.txt").write_text("mine")
    assert call(*arguments, "--device", "cpu") == 2
    assert "already exists" in capsys.readouterr().err
    assert (output / "report" / "notes.txt").read_text() == "mine"


def test_without_a_tokenizer_synthetic_tokens_are_still_read(capsys):
    results = diagnosed(capsys, "untold", "--probe", "leak", "position", "loop", "bytes")
    assert results["leak"]["readings"]["largest_change"]["value"] < 1e-5
    assert results["position"]["not_applicable"] == "untold has no tokenizer to read text with"
    assert results["loop"]["not_applicable"] == "untold has no tokenizer to read text with"
    assert results["bytes"]["not_applicable"]


def test_a_tokenizer_of_another_model_is_told(capsys):
    results = diagnosed(capsys, "narrow", "--probe", "leak", "position", "--data", "text.txt")
    assert "259 tokens but narrow knows 100" in results["position"]["not_applicable"]
    assert not results["leak"]["failed"] + results["leak"]["not_applicable"]


def test_a_model_that_returns_no_numbers(capsys):
    results = diagnosed(capsys, "broken", "--probe", "leak", "position", "bytes", "--data", "text.txt")
    assert {result["not_applicable"] for result in results.values()} == {"broken returns values that are not numbers"}


def test_a_context_shorter_than_a_probe_needs(capsys):
    results = diagnosed(capsys, "near", "--probe", "position", "loop", "cost", "bytes", "--data", "text.txt")
    assert "context of 32 tokens" in results["position"]["not_applicable"]
    assert "context of 32 tokens" in results["loop"]["not_applicable"]
    assert "context of 32 tokens" in results["cost"]["not_applicable"]
    assert results["bytes"]["readings"]["bits_per_byte"]["value"] > 1


def test_too_little_text(capsys):
    results = diagnosed(capsys, "whole", "--probe", "position", "bytes", "leak", "--data", "short.txt")
    assert "no document of short.txt has 512 tokens" in results["position"]["not_applicable"]
    assert "no document of short.txt" in results["bytes"]["not_applicable"]
    assert results["leak"]["readings"]


def test_a_run_has_text_of_its_own_and_so_do_its_checkpoints(capsys, tmp_path):
    call("train", "--preset", "tiny", "--data", "text.txt", "--output", tmp_path / "run", *TRAINING)
    capsys.readouterr()
    results = diagnosed(capsys, tmp_path / "run", "--probe", "position")
    assert results["position"]["readings"]
    (checkpoint,) = [folder for folder in (tmp_path / "run").glob("checkpoint-*") if folder.name.endswith("2")]
    assert diagnosed(capsys, checkpoint, "--probe", "position")["position"]["readings"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "no model to diagnose"),
        (["whole"], "give some with --data"),
        (["whole", "--data", "text.txt", "--probe", "leek"], "no probe 'leek'"),
        (["nowhere.gguf"], "no file nowhere.gguf"),
        (["garbage.gguf"], "cannot be loaded as a GGUF model" if find_spec("gguf") else "pip install 'dyadlm[gguf]'"),
        (["whole", "--data", "text.txt", "--dtype", "float12"], "Unknown dtype"),
        (["whole", "--data", "nothing.txt"], "nothing.txt"),
        (["text.txt"], "no model folder"),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments, remedy, capsys):
    assert call("diagnose", *arguments, "--device", "cpu") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert remedy in shown.err
    assert shown.err.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    def absent(*arguments, **options):
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(candidates.AutoModelForCausalLM, "from_pretrained", absent)
    assert call("diagnose", "garbage.gguf", "--device", "cpu") == 2
    assert "pip install 'dyadlm[gguf]'" in capsys.readouterr().err


@pytest.mark.skipif(is_gguf_available(), reason="the package is there")
def test_a_file_that_needs_the_missing_package(place, capsys):
    field = b"general.architecture"
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(field)) + field
    (place / "llama.gguf").write_bytes(header + struct.pack("<IQ", 8, 5) + b"llama")
    assert call("diagnose", "llama.gguf", "--device", "cpu") == 2
    assert "pip install 'dyadlm[gguf]'" in capsys.readouterr().err


def test_a_diagnosis_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "whole.json").write_text('{"mine": 1}')
    arguments = ["diagnose", "whole", "--probe", "leak", "--data", "text.txt", "--output", tmp_path]
    assert call(*arguments, "--device", "cpu") == 2
    assert "is no diagnosis" in capsys.readouterr().err
    assert (tmp_path / "whole.json").read_text() == '{"mine": 1}'


def test_the_probes_are_listed(capsys):
    assert call("diagnose", "--list") == 0
    shown = capsys.readouterr().out
    assert "Does the future reach the past?" in shown
    assert "position" in shown


def test_the_instrument_tests_itself(capsys, monkeypatch):
    assert call("diagnose", "--self-test", "--probe", "leak", "bounds") == 0
    shown = capsys.readouterr().out
    assert shown.count("passed  leak") == 5
    assert shown.endswith("checks passed.\n")
    monkeypatch.setattr("dyadlm.diagnose.probes.leak.STEPS", 11)  # the probe reads less than its control expects
    monkeypatch.setattr(Leak, "controls", lambda self, controls=Leak().controls(): controls)
    monkeypatch.setattr("dyadlm.diagnose.probes.leak.STEPS", 10)
    assert call("diagnose", "--self-test", "--probe", "leak") == 1
    shown = capsys.readouterr()
    assert "FAILED  leak: sure of the next token: gain" in shown.out
    assert "1 of 5 checks left their tolerance" in shown.err


def test_models_have_files_of_their_own(tmp_path):
    run = tmp_path / "run" / "checkpoint-3"
    run.mkdir(parents=True)
    assert names([str(run), "a/model", "b/model", "model", "hub/x y"]) == [
        "run-checkpoint-3", "model", "model-2", "model-3", "x-y",
    ]  # fmt: skip


def test_published_values_are_listed_with_the_command_that_would_show_them(capsys):
    assert call("diagnose", "--list", "--json", "--probe", "loop", "drift") == 0
    loop, drift = json.loads(capsys.readouterr().out)
    assert loop["published"][0]["value"] == "seq_rep_4_of_100 = 0.442"
    assert "--probe loop" in loop["published"][0]["command"]
    assert drift == {**drift, "id": "drift", "published": []}


@pytest.mark.parametrize(("width", "fast", "share"), [(8, True, 1 / 4), (6000, True, 1 / 16), (6000, False, 1.0)])
def test_fast_reads_less_of_the_text_for_a_large_model(width, fast, share):
    model = Large(width)
    budget = budget_for(model, fast, 0)
    assert (budget.tokens, budget.fast) == (share, fast)
    assert budget.batch_tokens * model.vocabulary <= 2**25


def test_what_was_found_before_an_interruption_is_not_asked_again(tmp_path, monkeypatch):
    output = tmp_path / "found.json"
    probes = chosen(["leak", "position"])
    model, text = uniform(16), independent(16, 4, 1024)
    with monkeypatch.context() as patch:
        patch.setattr(type(probes[1]), "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            running.diagnose(model, text, probes, output=output)
    assert list(Diagnosis.load(output).results) == ["leak"]
    monkeypatch.setattr(type(probes[0]), "run", interrupted)
    found = running.diagnose(model, text, probes, output=output)
    assert list(found.results) == ["leak", "position"]
