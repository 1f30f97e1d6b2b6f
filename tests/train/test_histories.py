"""Histories of unequal length: the state is really carried, and tokens count as their histories say."""

import json
import math
import random
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.data import TokenStream, TrainingWindows
from dyadlm.model.cache import DyadCache
from dyadlm.train import train
from dyadlm.train.histories import CarriedState, HistoryWeightedLoss, history_weights

pytestmark = pytest.mark.slow

# Steps so small that the weights stay what they were, to float32.
STANDING = ("learning_rate=1e-30", "weight_decay=0", "max_grad_norm=1e9", "logging_steps=1")


def logged(result, name):
    return [line[name] for line in result.metrics if name in line]


@pytest.fixture
def awake(tmp_path, words):
    """A folder with a small dyadlm model whose blocks say something: new ones are silent."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, dropout=0.0))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "awake")
    words().tokenizer.save_pretrained(tmp_path / "awake")
    return tmp_path / "awake"


@pytest.mark.parametrize(("reset", "groups"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_windows_are_those_of_one_pass_over_the_text_cut_for_gradients(
    tmp_path, small, words, console, awake, reset, groups
):
    """Each step has the loss and the gradient of its windows, read after all that their lanes have read before."""
    draw, data = random.Random(0), words()
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(10, 60))) for _ in range(14 * groups)]
    data = replace(data, train=[(TokenStream.from_text(texts, data.tokenizer), 1.0)])
    steps = 5 * groups
    windows = TrainingWindows(data.train, 32, 4 * steps, seed=42, document_reset=reset, lanes=4 * groups)
    assert windows.run_windows == 3  # lanes enter anew at their first turn and at their fourth
    options = ("train.carry_state=true", f"train.carry_lanes={groups}", f"data.document_reset={str(reset).lower()}")
    result = train(small(tmp_path / "run", *STANDING, *options, f"max_steps={steps}", model=awake), data, console)

    model = AutoModelForCausalLM.from_pretrained(awake).train()
    items = [[windows[4 * step + lane] for lane in range(4)] for step in range(steps)]
    for step in range(steps):
        turns = range(step % groups, step + 1, groups)
        ids, labels, positions = (
            torch.stack([torch.cat([items[s][lane][name] for s in turns]) for lane in range(4)])
            for name in ("input_ids", "labels", "position_ids")
        )
        cut, cache = 32 * (len(turns) - 1), DyadCache()
        if cut:
            with torch.no_grad():
                model(ids[:, :cut], position_ids=positions[:, :cut], past_key_values=cache)
        logits = model(ids[:, cut:], position_ids=positions[:, cut:], past_key_values=cache).logits
        loss = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, cut + 1 :])
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        assert logged(result, "loss")[step] == pytest.approx(loss.item(), rel=1e-5)
        assert logged(result, "grad_norm")[step] == pytest.approx(norm, rel=1e-4)

        alone = model(ids[:, cut:], position_ids=positions[:, cut:]).logits
        fresh = cross_entropy(alone[:, :-1].transpose(1, 2), labels[:, cut + 1 :]).item()
        assert (fresh == pytest.approx(loss.item(), rel=1e-5)) == (step // groups in (0, 3))


def test_states_are_carried_from_a_step_on(tmp_path, small, words, console, awake):
    """Two steps in windows that begin anew, then three in lanes."""
    data = words()
    options = ("train.carry_state=true", "train.carry_from=0.4", "max_steps=5")
    losses = logged(train(small(tmp_path / "run", *STANDING, *options, model=awake), data, console), "loss")
    length = small(tmp_path / "same").data.sequence_length
    anew = TrainingWindows(data.train, length, 8, seed=42)
    lanes = TrainingWindows(data.train, length, 12, seed=42, lanes=4)
    model, cache = AutoModelForCausalLM.from_pretrained(awake).train(), DyadCache()
    for step, loss in enumerate(losses):
        windows = [anew[4 * step + row] if step < 2 else lanes[4 * (step - 2) + row] for row in range(4)]
        ids = torch.stack([window["input_ids"] for window in windows])
        with torch.no_grad():
            if step < 2:
                found = model(ids, labels=ids, use_cache=False).loss
            else:
                positions = torch.stack([window["position_ids"] for window in windows])
                found = model(ids, labels=ids, position_ids=positions, past_key_values=cache).loss
            alone = model(ids, labels=ids, use_cache=False).loss.item()
        assert loss == pytest.approx(found.item(), rel=1e-5)
        assert (loss == pytest.approx(alone, rel=1e-5)) == (step <= 2)  # step 2 enters the lanes


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_that_is_to_carry_states_goes_on_before_and_after(tmp_path, small, words, console, stop):
    options = ("train.carry_state=true", "train.carry_from=0.4", "train.carry_lanes=2", "max_steps=5")
    options = (*options, "logging_steps=1", "save_steps=1", "save_total_limit=null")
    whole = train(small(tmp_path / "whole", *options), words(), console)
    shutil.copytree(whole.output, tmp_path / "run")
    for step in range(stop + 1, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    run = train(small(tmp_path / "run", *options, resume=True), words(), console)
    assert logged(run, "loss")[-1] == logged(whole, "loss")[-1]
    weights = [load_file(result.output / "model.safetensors") for result in (whole, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpointed_gradients_are_the_same_with_a_carried_state(tmp_path, small, words, console, awake):
    options = ("train.carry_state=true", "max_steps=4", "logging_steps=1")
    plain = train(small(tmp_path / "plain", *options, model=awake), words(), console)
    options = (*options, "gradient_checkpointing=true")
    checkpointed = train(small(tmp_path / "checkpointed", *options, model=awake), words(), console)
    assert logged(checkpointed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    for name, value in load_file(plain.output / "model.safetensors").items():
        other = load_file(checkpointed.output / "model.safetensors")[name]
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_resume_goes_on_with_the_same_rows_however_they_are_dealt(tmp_path, small, words, console, groups):
    """With three groups, one of which has not had its turn when the run stops."""
    options = ("train.carry_state=true", f"train.carry_lanes={groups}", "model.dropout=0", "logging_steps=1")
    whole = train(small(tmp_path / "whole", *options, "max_steps=5", "train.schedule=constant"), words(), console)
    options = (*options, "train.schedule=constant")
    begun = train(small(tmp_path / "run", *options, "max_steps=2"), words(), console)
    halves = ("per_device_train_batch_size=2", "gradient_accumulation_steps=2", "max_steps=5")
    run = train(small(tmp_path / "run", *options, *halves, resume=True), words(), console)
    assert logged(run, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)

    with pytest.raises(UserError, match="another order of text"):
        train(small(tmp_path / "run", "train.carry_state=false", "train.carry_lanes=1", resume=True), words(), console)
    with pytest.raises(UserError, match="another order of text"):
        train(small(tmp_path / "run", *options, "train.carry_lanes=2", resume=True), words(), console)
    # Earlier versions did not write which rows a file has.
    manifest = begun.output / "checkpoint-5" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["identity"]["order of text"]["rows_carried"] = {"processes": 1, "rows": 4}
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rows_carried: .*'rows': 4\} there, .*'rows': 2\} here"):
        train(small(tmp_path / "run", *options, *halves, "max_steps=6", resume=True), words(), console)


@pytest.mark.parametrize("groups", [1, 3])
def test_files_of_earlier_versions_and_of_others_are_told_apart(tmp_path, groups):
    """What two processes with two batches each have read, one process reads as one batch, for each group of lanes."""
    config = DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=1, slot_layers=[])
    model = DyadForCausalLM(config).eval()

    def carried(rank, processes, batches, rows):
        state = CarriedState(config, rank, processes, batches, rows, groups)
        for batch in range(batches * groups):
            ids = torch.from_numpy(state.lanes.reshape(batches * groups, rows)[batch])[:, None] + 1
            with torch.no_grad():
                model(ids, past_key_values=state.current)
            state.advance()
        return state

    for rank in range(2):
        carried(rank, 2, 2, 1).save(tmp_path)
    merged, expected = CarriedState(config, 0, 1, 1, 4, groups), carried(0, 1, 1, 4)
    merged.load(tmp_path, groups, torch.device("cpu"))
    for _ in range(groups):
        for name, tensor in expected.current.tensors().items():
            torch.testing.assert_close(merged.current.tensors()[name], tensor)
        merged.advance()
        expected.advance()
    (tmp_path / "carried_state_1.safetensors").unlink()
    with pytest.raises(UserError, match="does not hold the state of every row"):
        merged.load(tmp_path, groups, torch.device("cpu"))


# ---- Weights


@given(rows=st.integers(1, 3), length=st.integers(2, 9), power=st.floats(0.1, 3), carried=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=50)
def test_the_loss_is_that_of_a_slow_loop(rows, length, power, carried, data):
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 5, generator=generator, requires_grad=True)
    labels = torch.randint(5, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    labels[0, 1] = 2  # a target
    batch = {"labels": labels}
    if carried:
        batch["position_ids"] = torch.randint(3 * length, (rows, length), generator=generator)

    terms, weights = [], []
    for row in range(rows):
        for column in range(1, length):
            if labels[row, column] == -100:
                continue
            history = int(batch["position_ids"][row, column]) if carried else column
            weights.append(min(1.0, max(1, history) / length) ** power)
            terms.append(-logits[row, column - 1].log_softmax(0)[labels[row, column]])
    mean = sum(weights) / len(weights)
    expected = sum(weight / mean * term for weight, term in zip(weights, terms, strict=True)) / len(terms)
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)

    loss = HistoryWeightedLoss(power)
    loss.mean_of_step = torch.divide(*loss.sums(batch))
    assert loss.mean_of_step.item() == pytest.approx(mean, rel=1e-5)
    for count in (None, torch.tensor(len(terms))):  # a batch is the whole step here
        with loss.of(batch):
            value = loss(logits, labels, 5, num_items_in_batch=count)
        torch.testing.assert_close(torch.autograd.grad(value, logits)[0], gradient)
        torch.testing.assert_close(value, sum(terms) / len(terms))  # what is logged weighs nothing


def test_weights_rise_with_the_history_up_to_a_window():
    labels = torch.zeros(1, 8, dtype=torch.int64)
    weights = history_weights({"labels": labels}, 0.5)[0].tolist()
    assert weights == pytest.approx([math.sqrt(h / 8) for h in range(1, 8)])
    assert all(later > earlier for earlier, later in pairwise(weights))
    later = history_weights({"labels": labels, "position_ids": torch.arange(8, 16)[None]}, 0.5)
    assert later.tolist() == [[1.0] * 7]


@pytest.mark.parametrize("kind", ["dyad", "llama"])
def test_the_weighted_loss_is_minimised_and_the_plain_one_logged(tmp_path, small, words, console, awake, llama, kind):
    which = {"model": llama if kind == "llama" else awake}
    options = (*STANDING, "max_steps=2")
    plain = train(small(tmp_path / "plain", *options, **which), words(), console)
    weighted = train(small(tmp_path / "weighted", *options, "train.history_weight=2", **which), words(), console)
    assert logged(weighted, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(plain.output).train()
    windows = TrainingWindows(words().train, 32, 8, seed=42)
    for step in range(2):
        ids = torch.stack([windows[4 * step + row]["input_ids"] for row in range(4)])
        nats = cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        weights = torch.arange(1, 32) ** 2.0
        model.zero_grad()
        (nats * weights / weights.mean()).mean().backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        assert logged(weighted, "grad_norm")[step] == pytest.approx(norm, rel=1e-4)
        assert logged(weighted, "grad_norm")[step] != pytest.approx(logged(plain, "grad_norm")[step], rel=1e-3)


def test_no_weight_is_the_path_without_weights(tmp_path, small, words, console, monkeypatch):
    monkeypatch.setattr(HistoryWeightedLoss, "__init__", lambda *arguments: pytest.fail("not without weights"))
    train(small(tmp_path / "run", "max_steps=1", "train.history_weight=0"), words(), console)


def test_models_that_cannot(tmp_path, small, words, console, llama, monkeypatch):
    run = tmp_path / "run"
    for assignments, message in (
        (("train.carry_state=true",), "dyadlm models, which LlamaForCausalLM has not; leave train.carry_state out"),
        (("train.history_weight=1", "label_smoothing_factor=0.1"), "exclude each other"),
    ):
        with pytest.raises(UserError, match=message):
            train(small(run, *assignments, model=llama), words(), console)
        assert not run.exists()

    def own_loss(self, input_ids, labels, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return {"loss": cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]), "logits": logits}

    monkeypatch.setattr(LlamaForCausalLM, "forward", own_loss)
    with pytest.raises(UserError, match=r"without the loss_function .* leave train\.history_weight out"):
        train(small(run, "train.history_weight=1", "eval_steps=0", model=llama), words(), console)
