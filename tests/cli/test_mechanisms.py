"""A model with every mechanism on, on every path of the program."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dyadlm.cli import main
from dyadlm.data import TokenStream
from dyadlm.data.encoding import encode_bytes
from dyadlm.evaluate import evaluate
from dyadlm.generate import load_model

pytestmark = pytest.mark.slow

TEXT = "the king speaks of love and war. in a dark wood the queen speaks. "
EVERYTHING = [
    "--set", "model.hidden_size=16", "model.selector_heads=4", "model.num_hidden_layers=2", "model.num_levels=4",
    "model.semantic_levels=[syllable, word, sentence, line, paragraph, learned]", "model.semantic_memory=2",
    "model.salience=true", "model.forgetting=true", "model.selector=gumbel", "model.selector_margin=0.3",
    "model.decision_slots=true", "model.slot_contexts=[1, 2, 8, word, code]", "model.slot_entries=64",
    "model.slot_gate=true", "model.slot_evict=lru", "model.dropout=0.1", "data.sequence_length=32", "max_steps=4",
    "per_device_train_batch_size=2", "logging_steps=1", "data.validation_tokens=256",
]  # fmt: skip


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a finished run."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(TEXT * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYADLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(place)
        assert call("train", "--preset", "tiny", "--data", "text.txt", "--output", "run", *EVERYTHING) == 0
        yield place


def test_carried_training(place):
    options = (
        "train.carry_state=true", "train.history_weight=0.5", "model.slot_scope=stream", "data.sequence_length=32",
        "max_steps=3", "per_device_train_batch_size=2", "save_steps=2",
    )  # fmt: skip
    assert call("train", "--model", "run", "--data", "text.txt", "--output", "carried", "--set", *options) == 0
    assert json.loads((place / "carried" / "config.json").read_text())["slot_scope"] == "stream"


def test_every_way_to_evaluate(place, capsys):
    found = {}
    for options in ((), ("--batch-size", 3), ("--window", 512), ("--stream",), ("--set", "slot_scope=stream")):
        assert call("evaluate", "run", "--data", "text.txt", "--json", "--device", "cpu", *options) == 0
        found[options] = json.loads(capsys.readouterr().out)["nats_per_token"]
    first = found[()]
    assert found["--batch-size", 3] == pytest.approx(first, abs=1e-5)
    assert found["--set", "slot_scope=stream"] == pytest.approx(first, abs=1e-5)  # each window is one document
    # One document in one window, without the token that ends it, and with it.
    assert found["--window", 512] == pytest.approx(found["--stream",], abs=0.05)


def test_runs_go_on_from_the_state_of_others(place, capsys, monkeypatch):
    """As if the whole text had been read at once."""

    def bits(text: str, *options) -> list[float]:
        (place / "part.txt").write_text(text)
        with (place / "part.txt").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            assert call("stream", "run", "--json", "--device", "cpu", *options) == 0
        return [json.loads(line)["bits"] for line in capsys.readouterr().out.splitlines()]

    whole = bits(TEXT * 2)
    first = bits(TEXT, "--state-out", "state")
    second = bits(TEXT, "--state-in", "state", "--state-out", "state")
    assert first + second == pytest.approx(whole[: len(TEXT)] + whole[len(TEXT) + 1 :], abs=1e-3)
    assert call("generate", "run", "--prompt", "and", "--max-new-tokens", 3, "--state-in", "state") == 0
    recalls = ("--new-document", "--set", "slot_scope=stream")
    assert call("generate", "run", "--prompt", "and", "--max-new-tokens", 3, "--state-in", "state", *recalls) == 0


def test_hugging_face_generates_from_an_exported_model(place):
    assert call("export", "run", "--output", "exported") == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")
    with torch.no_grad():
        for weight in model.parameters():  # as if trained for long: choices differ
            weight.add_(torch.randn_like(weight) * 0.2)
    texts = [TEXT[:11], TEXT[:30], TEXT[:5]]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for options in ({"num_beams": 3}, {}, {"num_beams": 2, "num_return_sequences": 2}):
        options = {**options, "do_sample": False}  # drawn by default, as `dyadlm generate` does
        together = model.generate(**batch, max_new_tokens=8, **options)[:, -8:]
        each = options.get("num_return_sequences", 1)
        for row, text in enumerate(texts):
            alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, **options)[:, -8:]
            assert torch.equal(together[row * each : (row + 1) * each], alone)
    own = model.generation_config
    assert (own.do_sample, own.temperature, own.top_p) == (True, 0.8, 0.95)
    sampled = model.generate(**batch, max_new_tokens=8)
    assert sampled.shape == (3, batch["input_ids"].shape[1] + 8)


def test_streams_give_the_loss_of_evaluation(place, capsys, monkeypatch):
    with (place / "text.txt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert call("stream", "run", "--json", "--device", "cpu") == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    model, tokenizer = load_model("run", "cpu")
    text = TokenStream.from_tokens(encode_bytes((place / "text.txt").read_bytes()))
    expected = evaluate(model, text, tokenizer, mode="stream")
    assert last["mean_nats"] == pytest.approx(expected.nats_per_token, abs=1e-4)


def test_inspecting_draws_and_tells(place, capsys):
    assert call("inspect", "run", "--text", TEXT, "--output", "tower.png", "--json", "tower.json") == 0
    assert (place / "tower.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((place / "tower.json").read_text())
    assert figures["tokens"] == len(TEXT)
    assert figures["all"]["levels_chosen"] == 1.0
    assert len(figures["layers"]) == 2
    table, said = capsys.readouterr().out, "segment_length_paragraph"
    assert f"{said} {figures['all'][said]:.3f} " in " ".join(table.split())
    assert "depends on more than the tokens" in table
    before = (place / "tower.json").read_bytes()
    assert call("inspect", "run", "--text", TEXT, "--output", "other.png", "--json", "tower.json") == 2
    assert (place / "tower.json").read_bytes() == before
    assert not (place / "other.png").exists()


def test_a_report_of_it(place, monkeypatch):
    monkeypatch.setattr("dyadlm.report.summary.SAMPLE_TOKENS", 30)
    assert call("report", "run", "--output", "report", "--prompt", "the ") == 0
    assert (place / "report" / "tower.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "| levels chosen (levels that a head uses at a token) | 1.000 |" in (place / "report" / "README.md").read_text()
    )
