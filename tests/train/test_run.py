"""Runs in this process: what they leave, how they resume, how they stop."""

import errno
import json
import math
import os
import re
import signal
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback

from dyadlm import DyadConfig, DyadForCausalLM, RunFailed, UserError, files
from dyadlm.accounting import training_flops_per_token
from dyadlm.evaluate.evaluation import evaluate
from dyadlm.train import RunInterrupted, dry_run, export, train
from dyadlm.train.checkpoint import last_complete, read_manifest
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.trainer import LanguageModelTrainer

pytestmark = pytest.mark.slow


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of six steps that nothing disturbed."""
    return tmp_path_factory.mktemp("undisturbed") / "run"


@pytest.fixture
def undisturbed(whole, small, words):
    """`whole`, trained at its first use under the fixtures of a test."""
    if not whole.exists():
        train(small(whole), words(), Console(quiet=True))
    return whole


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_run_leaves_a_loadable_model_and_complete_checkpoints(tmp_path, small, words, console):
    output = tmp_path / "run"
    result = train(small(output), words(), console)
    assert names(output) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "dyadlm.json", "metrics.jsonl", "tensorboard", "checkpoint-4", "checkpoint-6",
    }  # fmt: skip
    assert not list(output.rglob("training_args.bin"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.use_cache is True
    assert AutoTokenizer.from_pretrained(output).encode("Abc") == [65, 98, 99]
    assert_same_weights(output, output / "checkpoint-6")

    assert (result.steps, result.tokens, result.checkpoint) == (6, 6 * 4 * 32, output / "checkpoint-6")
    assert 0 < result.loss < math.log(259)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]
    assert list((output / "tensorboard").iterdir())
    record = json.loads((output / "dyadlm.json").read_text())
    assert record["settings"]["data.sequence_length"] == 32
    assert record["training_arguments"]["max_steps"] == 6
    assert record["model"]["hidden_size"] == 16
    card = (output / "README.md").read_text()
    assert "768" in card
    assert "CC0-1.0" in card
    shown = console.file.getvalue()
    assert re.search(r"step 6/6 .*bits/byte.*tokens/s.*left", shown)
    assert "device cpu: as asked" in shown
    assert "dtype float32" in shown


def test_validation_during_training_is_that_of_evaluate(tmp_path, small, words, console):
    data = words()
    result = train(small(tmp_path / "run", "data.validation_tokens=100000"), data, console)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    expected = evaluate(model, data.validation[0], data.tokenizer, window=32)
    assert result.validation_loss == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert result.validation_bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_checkpoints_are_read_back_without_pickles(tmp_path, small, words, console, monkeypatch):
    train(small(tmp_path / "run", "max_steps=2"), words(), console)
    load, seen = torch.load, []

    def checked_load(path, *args, **kwargs):
        seen.append(os.path.basename(path))
        assert kwargs.get("weights_only") is True
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", checked_load)
    train(small(tmp_path / "run", "max_steps=4", resume=True), words(), console)
    assert sorted(seen) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]


def test_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path, small, words, console, undisturbed):
    parts = tmp_path / "parts"

    class Crash(Exception):
        pass

    def crash(self, *args, **kwargs):
        raise Crash  # after the save at step 4, before its evaluation

    trainer = LanguageModelTrainer
    evaluations = iter([trainer.evaluate, crash])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate", lambda self, *a, **k: next(evaluations)(self, *a, **k))
        with pytest.raises(Crash):
            train(small(parts), words(), console)
    assert last_complete(parts) == parts / "checkpoint-4"
    (parts / ".staging-left").mkdir()
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 5, "lo')
    result = train(small(parts, resume=True), words(), console)
    assert_same_weights(undisturbed, parts)
    assert not (parts / ".staging-left").exists()
    evaluated = [line["step"] for line in result.metrics if "eval_loss" in line]
    assert evaluated == [2, 4, 6]
    assert 5 not in [line["step"] for line in result.metrics]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of workers that are forked
@pytest.mark.parametrize("histories", [(), ("train.carry_state=true", "train.history_weight=0.5")])
def test_every_way_of_feeding_resumes_bit_equal(tmp_path, small, words, console, monkeypatch, histories):
    """Accumulated gradients, workers, several sources, canaries, reset documents, checkpoints in between."""
    monkeypatch.setattr("dyadlm.data.batches.MIXED_RUN", 4)  # where state is carried, lanes also turn elsewhere
    first, second = words(0), words(1)
    data = replace(first, train=[*first.train, (second.train[0][0], 0.5)])
    options = (
        "gradient_accumulation_steps=2", "dataloader_num_workers=2", "data.canaries=1", "data.document_reset=true",
        "data.sequence_length=40", "train.log_spaced_checkpoints=true", "max_steps=11", "save_steps=5",
        *histories,
    )  # fmt: skip
    train(small(tmp_path / "whole", *options), data, console)

    class Crash(Exception):
        pass

    step = LanguageModelTrainer.training_step
    for crash_at in (6, 9):  # resumed from 5, then from a log-spaced checkpoint, 8

        def crash(self, *args, crash_at=crash_at, **kwargs):
            if self.state.global_step == crash_at:
                raise Crash
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModelTrainer, "training_step", crash)
            with pytest.raises(Crash):
                train(small(tmp_path / "parts", *options, resume=True), data, console)
    train(small(tmp_path / "parts", *options, resume=True), data, console)
    shown = console.file.getvalue()
    assert [f"Going on from {tmp_path / 'parts' / f'checkpoint-{step}'}" in shown for step in (5, 8)] == [True, True]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("histories", [(), ("train.carry_state=true", "train.history_weight=0.5")])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, small, words, console, histories):
    # With its usual epsilon, the first steps of AdamW make full steps out of the rounding of vanishing gradients.
    steady = ("model.dropout=0", "adam_epsilon=1e-4")
    options = (*histories, *steady, "data.document_reset=true", "logging_steps=1", "max_steps=4")
    whole = train(small(tmp_path / "whole", *options), words(), console)
    halves = ("per_device_train_batch_size=2", "gradient_accumulation_steps=2")
    halved = train(small(tmp_path / "halved", *options, *halves), words(), console)
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in whole.metrics if name in line]
        assert len(expected) == 4
        assert [line[name] for line in halved.metrics if name in line] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_cannot_be_put_in_place_is_put_there_by_resume(
    tmp_path, small, words, console, monkeypatch, undisturbed
):
    output = tmp_path / "run"
    save = LanguageModelTrainer._save

    def full(self, folder, *args, **kwargs):
        if folder.endswith(".staging-model"):
            raise SafetensorError("No space left on device")
        return save(self, folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "_save", full)
        with pytest.raises(RunFailed, match=r"No space left on device.*checkpoint-6\b"):
            train(small(output), words(), console)
    assert not [name for name in names(output) if name.startswith(".staging-")]
    assert not (output / "model.safetensors").exists()
    train(small(output, resume=True), words(), console)
    assert_same_weights(undisturbed, output)
    # The last evaluation came after the last checkpoint, and is the one reported all the same.
    results = [json.loads((folder / "dyadlm.json").read_text())["result"] for folder in (undisturbed, output)]
    for name in ("loss", "bits_per_byte", "validation_loss", "validation_bits_per_byte"):
        assert results[0][name] == results[1][name]
    assert f"{results[1]['validation_loss']:.4f}" in (output / "README.md").read_text()


def test_resume_passes_over_damaged_checkpoints(tmp_path, small, words, console, undisturbed):
    damaged = tmp_path / "damaged"
    train(small(damaged, "max_steps=4", "save_total_limit=null"), words(), console)
    file = damaged / "checkpoint-4" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (damaged / "checkpoint-5").mkdir()  # what Trainer would leave half-written
    assert last_complete(damaged) == damaged / "checkpoint-2"
    train(small(damaged, "save_total_limit=null", resume=True), words(), console)
    assert read_manifest(damaged / "checkpoint-6")
    assert read_manifest(damaged / "checkpoint-4")
    assert_same_weights(undisturbed, damaged)


def test_resume_takes_settings_from_the_run_and_returns_a_finished_one(tmp_path, small, words, console):
    output = tmp_path / "run"
    first = train(small(output), words(), console)
    before = (output / "model.safetensors").stat().st_mtime_ns
    settings = type(small(output)).create(output, resume=True)
    assert settings.to_dict() == small(output).to_dict()
    assert train(settings, words(), console) == first
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_changed_learning_rate_holds_after_resume(tmp_path, small, words, console):
    output = tmp_path / "run"
    options = ("train.schedule=constant", "warmup_steps=0")
    train(small(output, *options, "max_steps=2"), words(), console)
    result = train(small(output, *options, "learning_rate=1e-3", resume=True), words(), console)
    rates = {line["step"]: line["learning_rate"] for line in result.metrics if "learning_rate" in line}
    assert rates == {2: 1e-2, 4: 1e-3, 6: 1e-3}
    record = json.loads((output / "dyadlm.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3
    (earlier,) = record["earlier"]
    assert (earlier["until_step"], earlier["settings"]["learning_rate"]) == (2, 1e-2)


def test_changed_values_of_the_optimizer_hold_after_resume(tmp_path, small, words, console, monkeypatch):
    """Loading a checkpoint brings back the groups of the optimizer with the values they had."""
    output, seen = tmp_path / "run", []
    train(small(output, "max_steps=2"), words(), console)
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        seen.append([(group["weight_decay"], group["betas"], group["eps"]) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    options = ("weight_decay=0.3", "adam_beta1=0.8", "adam_beta2=0.9", "adam_epsilon=1e-6", "max_steps=3")
    train(small(output, *options, resume=True), words(), console)
    decayed, plain = seen[0]
    assert decayed == (0.3, (0.8, 0.9), 1e-6)
    assert plain == (0.0, (0.8, 0.9), 1e-6)


def test_changed_steps_hold_after_resume(tmp_path, small, words, console):
    output = tmp_path / "run"
    train(small(output, "max_steps=2"), words(), console)
    changed = ("logging_steps=1", "save_steps=5", "eval_steps=3", "save_total_limit=null")
    result = train(small(output, *changed, resume=True), words(), console)
    assert [line["step"] for line in result.metrics if "loss" in line] == [2, 3, 4, 5, 6]
    assert [line["step"] for line in result.metrics if "eval_loss" in line] == [2, 3, 6]
    assert {name for name in names(output) if "checkpoint" in name} == {f"checkpoint-{step}" for step in (2, 5, 6)}


@pytest.mark.parametrize(
    ("assignment", "seed", "named"),
    [
        ("model.hidden_size=24", 0, "another model .*hidden_size: 16 there, 24 here"),
        ("max_steps=8", 1, "another data"),
        ("data.sequence_length=16", 0, "sequence_length"),
        ("seed=7", 0, "another order of text .*seed: 42 there, 7 here"),
    ],
)
def test_resume_refuses_another_run(tmp_path, small, words, console, assignment, seed, named):
    output = tmp_path / "run"
    train(small(output, "max_steps=2"), words(), console)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=named):
        train(small(output, assignment, resume=True), words(seed), console)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_output_that_holds_something_is_left_alone(tmp_path, small, words, console):
    output = tmp_path / "run"
    train(small(output, "max_steps=2"), words(), console)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        train(small(output), words(), console)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="already exists"):
            train(small(other, resume=resume), words(), console)
    assert names(other) == {"thesis.txt"}


def test_user_errors_leave_nothing_behind(tmp_path, small, words, console, llama):
    output = tmp_path / "run"
    data = words()
    for settings, message in (
        (small(output, "data.sequence_length=100000"), "less than one window"),
        (small(output, "data.canaries=3"), "plant fewer or train for more steps"),
        (small(output, "model.level_feature=nothing"), "level_feature"),
        (small(output, model=tmp_path), "is no model folder"),
        (small(output, "dataloader_prefetch_factor=2"), "do not fit together"),
        (small(output, "bf16=false", dtype="bfloat16"), "contradict"),
        (small(output, "optim=galore_adamw"), "no such optimizer"),
    ):
        with pytest.raises(UserError, match=message):
            train(settings, data, console)
        assert not output.exists()
    with pytest.raises(UserError, match="hidden_size"):  # where the settings are read, before anything is loaded
        small(output, "model.hiden_size=16")
    larger = AutoTokenizer.from_pretrained(llama)
    larger.add_tokens(["<|extra|>"])
    with pytest.raises(UserError, match="260 tokens but the model knows 259"):
        train(small(output, model=llama), replace(data, tokenizer=larger), console)
    assert not output.exists()


def test_a_wrong_model_is_found_before_text_is_prepared(tmp_path, small):
    output = tmp_path / "run"
    with pytest.raises(UserError, match="hidden_size"):
        train(small(output, "model.hiden_size=16", data=["nowhere.txt"]))
    with pytest.raises(UserError, match="is no model folder"):
        train(small(output, model=tmp_path / "nowhere", data=["nowhere.txt"]))
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        train(small(output, data=["nowhere.txt"]))
    assert not output.exists()


def test_one_run_at_a_time_in_a_folder(tmp_path, small, words, console, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE_SECONDS", 0.0)
    output = tmp_path / "run"
    train(small(output, "max_steps=2"), words(), console)
    (output / ".staging-of-the-other").mkdir()
    before = names(output)
    with files.locked(output), pytest.raises(UserError, match=r"Another process is at work in .*run"):
        train(small(output, resume=True), words(), console)
    assert names(output) == before
    train(small(output, "max_steps=4", resume=True), words(), console)


def test_a_run_that_began_meanwhile_is_left_alone(tmp_path, small, words, console, monkeypatch):
    output = tmp_path / "run"

    def slow(*arguments, **options):
        monkeypatch.undo()
        train(small(output, "max_steps=2"), words(), console)
        return prepare_run(*arguments, **options)

    monkeypatch.setattr("dyadlm.train.run.prepare_run", slow)
    with pytest.raises(UserError, match="already holds a run"):
        train(small(output), words(), console)
    assert last_complete(output) == output / "checkpoint-2"
    assert json.loads((output / "dyadlm.json").read_text())["settings"]["max_steps"] == 2


def test_checkpoint_is_complete_before_evaluation_begins(tmp_path, small, words, console, monkeypatch):
    seen = []
    evaluate_ = LanguageModelTrainer.evaluate

    def spy(self, *args, **kwargs):
        seen.append(last_complete(self.output).name)
        return evaluate_(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModelTrainer, "evaluate", spy)
    train(small(tmp_path / "run"), words(), console)
    assert seen == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(tmp_path, small, words, console, monkeypatch):
    output = tmp_path / "run"
    compute = LanguageModelTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (math.nan if self.state.global_step == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "compute_loss", poisoned)
        with pytest.raises(RunFailed, match=r"is nan; the last good checkpoint is .*checkpoint-2\b"):
            train(small(output), words(), console)
    assert not (output / "model.safetensors").exists()
    train(small(output, resume=True), words(), console)
    assert all(torch.isfinite(value).all() for value in weights(output).values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, small, words, console, monkeypatch):
    output = tmp_path / "run"
    step = torch.optim.AdamW.step
    calls = iter(range(100))

    def poisoned(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if next(calls) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = math.inf
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(RunFailed, match=r"no longer finite after step 4; .*checkpoint-2\b"):
        train(small(output), words(), console)
    assert "checkpoint-4" not in names(output)


def test_divergence_stops(tmp_path, small, words, console):
    options = ("learning_rate=30", "train.schedule=constant", "max_grad_norm=0", "logging_steps=1")
    with pytest.raises(RunFailed, match=r"the loss rose from .* to .*; there is no checkpoint yet"):
        train(small(tmp_path / "run", *options, "max_steps=50", "save_steps=100"), words(), console)
    assert names(tmp_path / "run") == {"dyadlm.json", "metrics.jsonl", "tensorboard"}


def test_full_disk_loses_no_earlier_checkpoint(tmp_path, small, words, console, monkeypatch, undisturbed):
    output = tmp_path / "run"
    save = torch.save

    def full(content, path, *args, **kwargs):
        if path.endswith("optimizer.pt") and (output / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunFailed, match=r"No space left on device.*last good checkpoint is .*checkpoint-2\b"):
            train(small(output), words(), console)
    assert last_complete(output) == output / "checkpoint-2"
    assert not [name for name in names(output) if name.startswith(".staging-")]
    train(small(output, resume=True), words(), console)
    assert_same_weights(undisturbed, output)


def test_memory_that_is_full_is_said_with_the_last_good_checkpoint(tmp_path, small, words, console, monkeypatch):
    step = LanguageModelTrainer.training_step

    def full(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", full)
    with pytest.raises(RunFailed, match=r"not enough memory for another 2\.50 GiB; .* is .*checkpoint-2\. Go on"):
        train(small(tmp_path / "run"), words(), console)


@pytest.mark.parametrize("setting", ["max_steps=1" + 20 * "0", "per_device_train_batch_size=1" + 10 * "0"])
def test_a_run_that_cannot_be_counted_is_refused(tmp_path, small, words, setting):
    with pytest.raises(UserError, match="beyond what can be counted"):
        train(small(tmp_path / "run", setting), words())


@pytest.mark.usefixtures("signals_as_before")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(tmp_path, small, words, console, monkeypatch, undisturbed, number, code):
    output = tmp_path / "run"
    step = LanguageModelTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", interrupted)
        with pytest.raises(
            RunInterrupted, match=r"Stopped at step 3 of 6 .* --resume .*checkpoint-3 is a model"
        ) as caught:
            train(small(output), words(), console)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is handler
    assert last_complete(output) == output / "checkpoint-3"
    train(small(output, resume=True), words(), console)
    assert_same_weights(undisturbed, output)


def test_a_run_that_a_callback_ends_is_finished(tmp_path, small, words, console):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    result = train(small(tmp_path / "run"), words(), console, callbacks=[lambda trainer: Enough()])
    assert (result.steps, result.tokens) == (3, 3 * 4 * 32)
    assert weights(tmp_path / "run")


def test_log_spaced_checkpoints_stay(tmp_path, small, words, console):
    options = ("train.log_spaced_checkpoints=true", "save_total_limit=1", "save_steps=3", "max_steps=10")
    train(small(tmp_path / "run", *options), words(), console)
    kept = {name for name in names(tmp_path / "run") if name.startswith("checkpoint-")}
    assert kept == {"checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-8", "checkpoint-10"}


def test_canaries_are_planted_and_recorded(tmp_path, small, words, console):
    options = ("data.canaries=1", "data.sequence_length=48", "max_steps=25", "save_steps=25", "eval_steps=25")
    train(small(tmp_path / "run", *options), words(), console)
    plan = json.loads((tmp_path / "run" / "canaries.json").read_text())
    assert [canary["repetitions"] for canary in plan["members"]] == [1, 4, 16, 64]
    assert [len(canary["windows"]) for canary in plan["members"]] == [1, 4, 16, 64]
    assert len({canary["text"] for canary in plan["members"] + plan["twins"]}) == 8


def test_ordinary_hugging_face_model_trains_on(tmp_path, small, words, console, llama):
    output = tmp_path / "run"
    result = train(small(output, "data.document_reset=true", model=llama), words(), console)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(model, LlamaForCausalLM)
    before = load_file(llama / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in weights(output).items())
    assert result.loss < math.log(259)


@pytest.mark.parametrize("kind", ["dyadlm", "llama"])
def test_smoothed_targets_are_the_tokens_that_follow(tmp_path, small, words, console, llama, kind):
    """In parts of a step, and with companions, which learn from targets as they are."""
    beside = ("twin.conditioning=joint", "model.planner=head", "model.dropout=0") if kind == "dyadlm" else ()
    options = (*beside, "max_steps=1", "logging_steps=1", "eval_steps=0", "label_smoothing_factor=0.2")
    halves = ("per_device_train_batch_size=2", "gradient_accumulation_steps=2")
    model = {"model": llama} if kind == "llama" else {}
    plan = prepare_run(small(tmp_path / "plan", *options, **model), words(), tmp_path / "plan")
    ids = torch.stack([plan.windows[number]["input_ids"] for number in range(4)])
    logits = plan.model.eval()(ids).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:], label_smoothing=0.2).item()
    result = train(small(tmp_path / "run", *options, *halves, **model), words(), console)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    if beside:
        (line,) = (line for line in result.metrics if "loss" in line)
        assert {"twin_loss", "proposal_loss", "artist_loss"} <= line.keys()


def test_gradient_checkpointing_changes_memory_not_weights(tmp_path, small, words, console):
    options = ("model.dropout=0", "max_steps=2")
    train(small(tmp_path / "plain", *options), words(), console)
    train(small(tmp_path / "checkpointed", *options, "gradient_checkpointing=true"), words(), console)
    plain, checkpointed = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_autocasts_and_keeps_float32_weights(tmp_path, small, words, console):
    exact = train(small(tmp_path / "exact", "max_steps=2"), words(), console)
    rounded = train(small(tmp_path / "rounded", "max_steps=2", dtype="bfloat16"), words(), console)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    dtypes = {value.dtype for name, value in weights(tmp_path / "rounded").items() if not name.endswith("marks")}
    assert dtypes == {torch.float32}
    assert "dtype bfloat16: as asked" in console.file.getvalue()


def test_epochs_become_steps(tmp_path, small, words):
    settings = small(tmp_path / "run", "num_train_epochs=0.5")
    del settings.arguments["max_steps"]
    assert dry_run(settings, words())["steps"] == math.ceil(0.5 * len(words().train[0][0]) / (4 * 32))


def test_dry_run_leaves_nothing_and_counts(tmp_path, small, words):
    estimate = dry_run(small(tmp_path / "run"), words())
    assert not (tmp_path / "run").exists()
    train(small(tmp_path / "run", "max_steps=1"), words())
    total = sum(value.numel() for name, value in weights(tmp_path / "run").items() if not name.endswith("marks"))
    assert estimate["parameters"] == total
    assert (estimate["steps"], estimate["tokens"], estimate["static_memory_bytes"]) == (6, 768, 16 * total)
    assert estimate["seconds"] == pytest.approx(6 * estimate["seconds_per_step"])
    assert estimate["peak_memory_bytes"] > estimate["static_memory_bytes"]


@pytest.mark.parametrize(("patience", "timed"), [(1e-9, 1), (None, 2)])
def test_a_slow_dry_run_times_fewer_windows_and_plans_the_same(tmp_path, small, words, monkeypatch, patience, timed):
    whole = dry_run(small(tmp_path / "run"), words())
    assert (whole["windows_timed"], whole["windows_per_step"]) == (4, 4)
    monkeypatch.setattr("dyadlm.train.cost.PATIENCE_SECONDS", patience or 5.0)
    if patience is None:  # a step that takes a second
        monkeypatch.setattr("dyadlm.train.cost.time", SimpleNamespace(perf_counter=map(float, count()).__next__))
    said: list[str] = []
    few = dry_run(small(tmp_path / "run"), words(), said.append)
    assert (few["windows_timed"], few["windows_per_step"]) == (timed, 4)
    assert said[0] == "timing one window"
    assert said[1:] == ["timing 2 steps of 2 windows instead of 4, which would take longer"] * (timed == 2)
    measured = {"seconds", "seconds_per_step", "peak_memory_bytes", "windows_timed"}
    assert {name: few[name] for name in few if name not in measured} == {
        name: whole[name] for name in whole if name not in measured
    }
    assert few["seconds"] == pytest.approx(6 * few["seconds_per_step"])
    if patience is None:
        assert few["seconds_per_step"] == 2.0  # a second for two windows, of which there are four
    assert few["peak_memory_bytes"] >= whole["peak_memory_bytes"]  # of the process, which has run the whole before


def test_a_dry_run_with_accumulation_counts_all_of_a_step(tmp_path, small, words, monkeypatch):
    options = ("per_device_train_batch_size=2", "gradient_accumulation_steps=2")
    plain = dry_run(small(tmp_path / "run"), words())
    monkeypatch.setattr("dyadlm.train.cost.PATIENCE_SECONDS", 1e-9)
    several = dry_run(small(tmp_path / "run", *options), words())
    assert several["windows_per_step"] == 4
    assert several["flops"] == plain["flops"]


def test_dry_run_counts_what_trains_beside_a_model_apart(tmp_path, small, words):
    options = ("max_steps=1", "data.sequence_length=8", "per_device_train_batch_size=1")
    plain, beside = (dry_run(small(tmp_path, *options, *more), words()) for more in ((), ("twin.conditioning=joint",)))
    assert plain["parameters_in_training_alone"] == 0 < beside["parameters_in_training_alone"]
    assert beside["parameters"] == plain["parameters"]
    assert 1.5 * plain["flops"] < beside["flops"] < 2.5 * plain["flops"]
    both = beside["parameters"] + beside["parameters_in_training_alone"]
    assert beside["static_memory_bytes"] == 16 * both


def test_dry_run_neither_saves_nor_evaluates(tmp_path, small, words, monkeypatch):
    for name in ("_save_checkpoint", "evaluate"):
        monkeypatch.setattr(LanguageModelTrainer, name, lambda *args, **kwargs: pytest.fail("not in a dry run"))
    settings = small(tmp_path / "run", "train.log_spaced_checkpoints=true", "eval_on_start=true")
    estimate = dry_run(settings, words())
    config = DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, max_position_embeddings=32)
    ids = torch.randint(0, 256, (4, 32))
    with FlopCounterMode(display=False) as counter:
        DyadForCausalLM(config).train()(ids, labels=ids).loss.backward()
    assert estimate["flops"] == 6 * counter.get_total_flops()
    assert estimate["flops"] == pytest.approx(768 * training_flops_per_token(config, 32), rel=0.02)


def test_export_copies_the_model_alone(tmp_path, small, words, console):
    run, output = tmp_path / "run", tmp_path / "exported"
    train(small(run, "max_steps=2"), words(), console)
    export(run, output)
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names(output) == {*model, "README.md"}
    assert_same_weights(run, output)
    export(run / "checkpoint-2", tmp_path / "early")
    assert names(tmp_path / "early") == model
    with pytest.raises(UserError, match="already exists"):
        export(run, output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no trained model"):
        export(tmp_path / "empty", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_export_leaves_the_state_of_the_text_behind(tmp_path, small, words, console):
    options = ("train.carry_state=true", "twin.conditioning=joint", "max_steps=1", "save_steps=1", "eval_steps=0")
    run = train(small(tmp_path / "run", *options), words(), console)
    assert {"carried_state_0.safetensors", "companions.safetensors"} <= names(run.checkpoint)
    shards = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    save_file({"part": torch.zeros(1)}, run.checkpoint / "model-00001-of-00002.safetensors")
    (run.checkpoint / "model.safetensors.index.json").write_text("as models in several files have")
    export(run.checkpoint, tmp_path / "exported")
    held = [name for name in names(tmp_path / "exported") if "safetensors" in name]
    assert set(held) == {"model.safetensors", *shards}


def test_progress_bar_on_a_terminal(tmp_path, small, words, console):
    console._force_terminal = True
    train(small(tmp_path / "run"), words(), console)
    assert "6/6" in console.file.getvalue()


def test_files_become_a_model_and_the_data_is_told_apart(tmp_path, small, words, console, monkeypatch, llama):
    """The whole way: text files, prepared into the cache with the tokenizer of the model."""
    monkeypatch.setenv("DYADLM_CACHE", str(tmp_path / "cache"))
    stream = words().train[0][0]
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    content = bytes(token for token in stream.tokens(0, len(stream)).tolist() if token < 256)
    first.write_bytes(content)
    second.write_bytes(content[::-1])
    output = tmp_path / "run"
    options = ("max_steps=2", "data.validation_tokens=128")
    result = train(small(output, *options, data=[f"{first}:2", str(second)]), console=console)
    assert result.validation_bits_per_byte > 0
    with pytest.raises(UserError, match="another data"):
        train(small(output, "max_steps=4", data=[str(first), str(second)], resume=True), console=console)
    train(small(tmp_path / "llama-run", *options, model=llama, data=[str(first)]), console=console)
    with pytest.raises(UserError, match="has its own tokenizer"):
        train(small(tmp_path / "other", "data.tokenizer=byte", model=llama, data=[str(first)]), console=console)


def test_damaged_model_folder_is_refused(tmp_path, small, words, console, llama):
    tensors = load_file(llama / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.norm\.weight; the folder is damaged"):
        train(small(tmp_path / "run", model=llama), words(), console)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.hiden_size=16", "no field 'hiden_size'; the nearest is hidden_size"),
        ("model.hidden_size=32", r"have another size of lm_head.weight \(and .* more\); leave hidden_size as it is"),
        ("model.num_hidden_layers=2", r"lack model.layers.1.* more\); leave num_hidden_layers as it is"),
        ("model.num_hidden_layers=0", "also hold model.layers.0"),
    ],
)
def test_fields_that_the_weights_do_not_fit(tmp_path, small, words, console, llama, assignment, message):
    with pytest.raises(UserError, match=message):
        train(small(tmp_path / "run", assignment, model=llama), words(), console)
    assert not (tmp_path / "run").exists()


def test_evaluation_can_be_turned_off(tmp_path, small, words, console):
    result = train(small(tmp_path / "run", "eval_steps=0", "max_steps=2"), words(), console)
    assert result.validation_loss is None
    assert "not measured" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_modes_of_what_a_run_leaves_follow_the_umask(tmp_path, small, words, console, mask):
    """safetensors writes files for their owner alone."""
    before = os.umask(mask)
    try:
        train(small(tmp_path / "run", "max_steps=2"), words(), console)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
