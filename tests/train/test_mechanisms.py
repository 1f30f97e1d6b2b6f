"""Training models with every mechanism: they are told what they need, and nothing depends on how a step is cut."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._inductor.exc import InductorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dyadlm import DyadForCausalLM, RunFailed
from dyadlm.data import TokenStream
from dyadlm.evaluate.inspection import behaviour
from dyadlm.model import DyadConfig
from dyadlm.train import TrainingData, train
from dyadlm.train.mechanisms import MeanMetrics
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.trainer import LanguageModelTrainer

pytestmark = pytest.mark.slow

EVERYTHING = (
    "model.num_levels=4", "model.semantic_levels=[syllable, word, learned]", "model.semantic_memory=2",
    "model.salience=true", "model.forgetting=true", "model.selector=gumbel", "model.selector_heads=16",
    "model.selector_margin=0.5",
    "model.selector_balance=0.01", "model.decision_slots=true", "model.slot_contexts=[1, 2, word, code]",
    "model.slot_entries=64", "model.slot_gate=true", "model.slot_evict=lru", "model.ngram_sizes=[2, 3, word]",
    "model.ngram_entries=64", "model.ngram_width=4", "train.optimizer=muon",
)  # fmt: skip
# Without chance, and with a cost that is a mean over tokens: any cut of a batch gives the same.
EXACT = (
    "model.num_levels=4", "model.semantic_levels=[word]", "model.selector=topk", "model.selector_heads=16",
    "model.selector_balance=0.01",
    "model.decision_slots=true", "model.slot_contexts=[1, 2]", "model.slot_entries=64", "model.slot_gate=true",
    "model.ngram_sizes=[2, 3, word]", "model.ngram_entries=64",
    "model.dropout=0", "train.schedule=constant", "logging_steps=1",
)  # fmt: skip
PLAIN = ("model.semantic_levels=[]", "model.selector=none", "model.slot_contexts=[]")  # whatever the preset has


def logged(result, name):
    return [line[name] for line in result.metrics if name in line]


def biases(folder):
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if "selector.bias" in name}


def test_fractions_are_summed_before_they_are_divided(monkeypatch):
    """Over passes and processes; what was judged nowhere is left out, and does not count as nothing."""
    metrics = MeanMetrics()
    assert metrics.take(1) == {}
    for loss, above, below in ((1.0, 3.0, 4.0), (2.0, 0.0, 0.0), (6.0, -5.0, 96.0)):
        found = {"loss": loss, "skill": (above, below), "unjudged": (0.0, 0.0)}
        metrics.add({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})
    other = torch.tensor([[1.0, 1.0], [12.0, 20.0], [0.0, 0.0]])  # of another process
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(other))
    assert metrics.take(2) == {"loss": 2.5, "skill": pytest.approx(10 / 120)}
    metrics.add({"loss": torch.tensor(7.0)})
    assert metrics.take(1) == {"loss": 7.0}


def test_progress_follows_the_steps_of_the_whole_run(tmp_path, small, words, console, monkeypatch):
    told = []
    tell = DyadForCausalLM.set_progress
    monkeypatch.setattr(DyadForCausalLM, "set_progress", lambda model, at: (told.append(at), tell(model, at)))
    options = (*EVERYTHING, "max_steps=4", "eval_steps=0")
    train(small(tmp_path / "run", *options, "save_steps=1"), words(), console)
    assert told == [0.0, 0.25, 0.5, 0.75, 1.0]
    told.clear()
    train(small(tmp_path / "run", *options, "max_steps=8", resume=True), words(), console)
    assert told == [0.5, 0.625, 0.75, 0.875, 1.0]


@pytest.mark.parametrize(("selector", "told"), [("topk", True), ("gumbel", True), ("dense", False)])
def test_another_number_of_steps_is_said_to_change_how_selectors_are_annealed(
    tmp_path, small, words, console, selector, told
):
    output = tmp_path / "run"
    options = (
        *PLAIN,
        "model.num_levels=4",
        f"model.selector={selector}",
        "model.selector_heads=4",
        "save_steps=1",
        "eval_steps=0",
    )
    train(small(output, *options, "max_steps=1"), words(), console)
    assert "annealed" not in console.file.getvalue()
    train(small(output, *options, "max_steps=2", resume=True), words(), console)
    said = f"selector {selector}: annealed over 1 steps until step 1, over 2 from there on"
    choices = json.loads((output / "dyadlm.json").read_text())["choices"]
    assert [choice for choice in choices if "annealed" in choice] == [said] * told
    assert console.file.getvalue().count("annealed") == told
    # The same number again is no change.
    (output / "checkpoint-2" / "checkpoint.json").unlink()
    train(small(output, *options, "max_steps=2", "logging_steps=1", resume=True), words(), console)
    assert console.file.getvalue().count("annealed") == told


def test_resumed_runs_and_checkpointed_gradients_give_the_same_weights(tmp_path, small, words, console):
    whole = train(small(tmp_path / "whole", *EVERYTHING), words(), console)
    train(small(tmp_path / "lean", *EVERYTHING, "gradient_checkpointing=true"), words(), console)
    expected = load_file(whole.output / "model.safetensors")
    assert any(value.any() for value in biases(whole.output).values())
    lean = load_file(tmp_path / "lean" / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(lean[name], value, rtol=1e-4, atol=1e-5)

    again = train(small(tmp_path / "again", *EVERYTHING, "save_steps=3", "save_total_limit=3"), words(), console)
    (tmp_path / "again" / "checkpoint-6" / "checkpoint.json").unlink()  # as if killed before it was complete
    resumed = train(
        small(tmp_path / "again", *EVERYTHING, "save_steps=3", "eval_steps=3", resume=True), words(), console
    )
    assert resumed.steps == again.steps
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_in_parts_is_the_step_of_one_batch(tmp_path, small, words, console):
    """The cost counts once a step, and selectors are corrected once, by the load of all parts."""
    one = train(small(tmp_path / "one", *EXACT), words(), console)
    halves = ("per_device_train_batch_size=1", "gradient_accumulation_steps=4")
    parts = train(small(tmp_path / "parts", *EXACT, *halves), words(), console)
    for name in ("loss", "cost", "grad_norm", "eval_loss", "eval_largest_load"):
        assert len(logged(one, name)) >= 3
        assert logged(parts, name) == pytest.approx(logged(one, name), rel=1e-4)
    expected = biases(one.output)
    assert len(expected) == 2
    for name, bias in biases(parts.output).items():
        # Six corrections of 0.01 up or down; where the load is even to the last bit, none.
        torch.testing.assert_close(bias, expected[name], rtol=0, atol=1e-6)
        assert 0.0 < bias.abs().max() <= 0.06 + 1e-6


def test_the_loss_is_that_of_the_tokens_and_the_gradient_also_that_of_the_cost(tmp_path, small, words, console):
    standing = ("learning_rate=1e-30", "weight_decay=0", "max_grad_norm=1e9", "max_steps=1", "model.selector_balance=0")
    result = train(small(tmp_path / "run", *EXACT, *standing), words(), console)
    plan = prepare_run(small(tmp_path / "other", *EXACT, *standing), words(), tmp_path / "other")
    batch = {name: torch.stack([plan.windows[row][name] for row in range(4)]) for name in plan.windows[0]}
    model = AutoModelForCausalLM.from_pretrained(result.output).train()
    model.set_progress(0.0)
    output = model(**batch)
    output.loss.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm().item()
    cost = output.metrics["cost"].item()
    assert cost > 1e-3
    assert logged(result, "cost") == pytest.approx([cost], rel=1e-5)
    assert logged(result, "loss") == pytest.approx([output.loss.item() - cost], rel=1e-5)
    assert logged(result, "grad_norm") == pytest.approx([norm], rel=1e-4)


def test_what_mechanisms_do_is_logged_with_the_validation_loss(tmp_path, small, words, console):
    result = train(small(tmp_path / "run", *EVERYTHING, "max_steps=2"), words(), console)
    (line,) = [line for line in result.metrics if "eval_loss" in line]
    plan = prepare_run(small(tmp_path / "other", *EVERYTHING), words(), tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(result.output)
    ids = plan.validation.inputs(4)
    assert ids.shape == (4, 32)
    assert ids[0, 0] == 257  # the first window of the text has nothing before it
    expected = behaviour(model, ids).measures()
    assert {"commitment", "levels_chosen", "run_length", "largest_load", "segment_length_learned"} <= expected.keys()
    assert {name: line[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    plain = train(small(tmp_path / "plain", *PLAIN, "max_steps=2"), words(), console)
    (line,) = [line for line in plain.metrics if "eval_loss" in line]
    assert set(line) == {"step", "eval_loss", "eval_bits_per_byte", "epoch"}


def test_a_new_model_knows_the_texts_of_its_tokens(tmp_path, small):
    vocabulary = {text: number for number, text in enumerate(["a", "b", " ", "."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    stream = TokenStream.from_text("ab. " * 50, tokenizer)
    data = TrainingData(tokenizer, [(stream, 1.0)], [], id="words")
    plan = prepare_run(small(tmp_path / "run", "model.semantic_levels=[word, sentence]"), data, tmp_path / "run")
    marks = plan.model.model.boundaries.marks
    untold = DyadForCausalLM(DyadConfig(vocab_size=len(tokenizer), semantic_levels=["word", "sentence"]))
    assert not untold.model.boundaries.marks.any()
    untold.use_tokenizer(tokenizer)
    assert torch.equal(marks, untold.model.boundaries.marks)
    assert marks[2].tolist() != marks[0].tolist()


def test_bytes_are_known_as_they_are(tmp_path, small, words):
    plan = prepare_run(small(tmp_path / "run", "model.semantic_levels=[word]"), words(), tmp_path / "run")
    fresh = DyadForCausalLM(DyadConfig.from_preset("tiny", semantic_levels=["word"]))
    assert torch.equal(plan.model.model.boundaries.marks, fresh.model.boundaries.marks)


def test_a_model_that_cannot_be_compiled_is_told(tmp_path, small, words, console, monkeypatch):
    def fail(*args, **kwargs):
        raise InductorError(ValueError("no such instruction"), None)

    monkeypatch.setattr(LanguageModelTrainer, "train", fail)
    with pytest.raises(RunFailed, match=r"no such instruction.*leave train.compile out"):
        train(small(tmp_path / "run", "train.compile=true"), words(), console)
