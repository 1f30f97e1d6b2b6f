"""Runs on several sources and on conversations: what is learned, and which figures come of each source."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from dyadlm.data import resolve_data, resolve_text
from dyadlm.evaluate import evaluate
from dyadlm.generate import load_model
from dyadlm.train import TrainSettings, train
from dyadlm.train.progress import losses_of_sources, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYADLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    asked = [[("user", f"what is {n} " * 9), ("assistant", f"{n}!")] for n in range(90)]
    path.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n" for chat in asked)
    )
    return path


@pytest.fixture
def tale(tmp_path):
    path = tmp_path / "tale.txt"
    path.write_text("once upon a time there was a model that read a tale\n" * 80)
    return path


def small_run(output, *data, more=(), **options):
    assignments = [
        "model.hidden_size=16", "model.num_hidden_layers=1", "data.sequence_length=16", "max_steps=12",
        "per_device_train_batch_size=1", "eval_steps=6", "logging_steps=1", "data.validation_tokens=100000", *more,
    ]  # fmt: skip
    return TrainSettings.create(
        output, preset="tiny", data=[str(path) for path in data], assignments=assignments,
        device="cpu", dtype="float32", **options,
    )  # fmt: skip


def test_each_source_has_its_validation_figure(chats, tale, tmp_path):
    shown = Console(file=io.StringIO(), width=200)
    result = train(small_run(tmp_path / "run", tale, chats), console=shown)
    last = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in entry][-1]
    found = losses_of_sources(last)
    assert list(found) == ["tale.txt", "chats.jsonl"]
    assert last["eval_tale.txt_bits_per_byte"] > 0
    assert min(found.values()) < last["eval_loss"] < max(found.values())
    assert f"; tale.txt {found['tale.txt']:.4f}; chats.jsonl {found['chats.jsonl']:.4f}" in shown.file.getvalue()
    card = (result.output / "README.md").read_text()
    assert f"| Validation loss of tale.txt | {found['tale.txt']:.4f} nats per token |" in card


def test_one_source_has_one_figure(tale, tmp_path):
    train(small_run(tmp_path / "run", tale), console=Console(quiet=True))
    assert not any(losses_of_sources(entry) for entry in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_a_run_on_conversations(chats, tmp_path):
    """Windows of 16 tokens, of which most hold nothing that the assistant says."""
    result = train(small_run(tmp_path / "run", chats), console=Console(quiet=True))
    losses = [entry["loss"] for entry in result.metrics if "loss" in entry]
    assert len(losses) < 12  # steps without a target have no loss
    assert all(1 < loss < 7 for loss in losses)
    model, tokenizer = load_model(result.output, "cpu")
    asked = [{"role": "user", "content": "what is 5"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).endswith("assistant:\n")
    data = resolve_data([str(chats)], tokenizer)
    found = evaluate(model, data.validation, tokenizer, window=16)
    assert found.targets == "what the assistant says"
    assert found.nats_per_token == pytest.approx(result.validation_loss, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(result.validation_bits_per_byte, rel=1e-5)


@pytest.mark.parametrize("logging", [1, 3])
def test_the_loss_is_that_of_the_targets(chats, tmp_path, logging):
    """The mean over the steps that have any, or it would fall and rise with their number, and look like divergence."""
    result = train(small_run(tmp_path / "run", chats, more=[f"logging_steps={logging}"]), console=Console(quiet=True))
    every = train(small_run(tmp_path / "every", chats), console=Console(quiet=True))
    by_step = {entry["step"]: entry["loss"] for entry in every.metrics if "loss" in entry}
    for entry in result.metrics:
        if "loss" in entry:
            steps = range(entry["step"] - logging + 1, entry["step"] + 1)
            expected = [by_step[step] for step in steps if step in by_step]
            assert entry["loss"] == pytest.approx(sum(expected) / len(expected), abs=2e-3)


def test_weights_of_histories_on_conversations(chats, tmp_path):
    settings = small_run(tmp_path / "run", chats, more=["train.history_weight=0.5"])
    losses = [entry["loss"] for entry in train(settings, console=Console(quiet=True)).metrics if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_sample_without_targets_is_said(chats, tmp_path):
    shown = Console(file=io.StringIO(), width=200)
    result = train(small_run(tmp_path / "run", chats, more=["data.validation_tokens=1"]), console=shown)
    assert "raise data.validation_tokens" in shown.file.getvalue()
    assert result.validation_loss is None


def test_only_the_answers_are_scored(chats, tmp_path):
    result = train(small_run(tmp_path / "run", chats), console=Console(quiet=True))
    model, tokenizer = load_model(result.output, "cpu")
    (stream,), _ = resolve_text([str(chats)], tokenizer)
    found = evaluate(model, stream, tokenizer, mode="stream")
    ids = torch.from_numpy(stream.tokens(0, len(stream)).copy()).long()
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([257]), ids[:-1]])[None]).logits[0]
    nats = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    targets = torch.from_numpy(stream.targets(0, len(stream)))
    assert found.tokens == int(targets.sum()) < len(stream) / 10
    assert found.nats_per_token == pytest.approx(nats[targets].mean().item(), rel=1e-4)
    assert found.bytes == sum(len(f"{n}!") for n in range(90))


def test_the_card_of_a_model_that_chats(chats, tale, tmp_path):
    card = (train(small_run(tmp_path / "run", chats), console=Console(quiet=True)).output / "README.md").read_text()
    assert "tokenizer.apply_chat_template(" in card
    assert "dyadlm generate" not in card
    card = (train(small_run(tmp_path / "other", tale), console=Console(quiet=True)).output / "README.md").read_text()
    assert 'tokenizer("once upon' in card
    assert "dyadlm generate" in card
