"""Muon beside AdamW, and the average of weights: which weights they move, how they resume, what they leave."""

import copy
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainingArguments

from dyadlm import DyadConfig, DyadForCausalLM, UserError, zoo
from dyadlm.diagnose.callback import ProbeCallback
from dyadlm.diagnose.material import Material
from dyadlm.train import dry_run, train
from dyadlm.train.average import RAW_NAME, WeightAverage
from dyadlm.train.muon import MuonWithAdamW, muon_optimizer
from dyadlm.train.optimizer import matrix_parameters, scale_rates
from dyadlm.train.trainer import LanguageModelTrainer

MUON = ("train.optimizer=muon", "weight_decay=0.1")


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def both(rate=1e-2):
    """A small model, its copy, the optimizer of one and two of torch's own for the other, on the same weights."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=2, num_levels=4, max_position_embeddings=16))
    twin = copy.deepcopy(model)
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, learning_rate=rate, weight_decay=0.1)
    matrices = set(matrix_parameters(twin))
    named = dict(twin.named_parameters())
    muon = torch.optim.Muon(
        [named[n] for n in named if n in matrices], lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    # All that has two dimensions is a matrix of a linear map or the embedding, so that nothing of AdamW's decays.
    adamw = torch.optim.AdamW([named[n] for n in named if n not in matrices], lr=rate, weight_decay=0.0, fused=True)
    return model, twin, muon_optimizer(model, arguments), (muon, adamw)


def backward(model, seed):
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def test_one_optimizer_steps_like_the_two_that_it_holds():
    model, twin, one, two = both()
    for seed in range(3):
        backward(model, seed)
        backward(twin, seed)
        one.step()
        for part in two:
            part.step()
    assert_equal(model.state_dict(), twin.state_dict())
    kinds = {frozenset(state) for state in one.state.values()}
    assert kinds == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}


def test_stacked_matrices_are_trained_one_by_one():
    """The experts of a mixture stand in one parameter; each is a matrix of its own to Muon."""
    torch.manual_seed(0)
    stack, single = torch.nn.Parameter(torch.randn(3, 8, 4)), [torch.nn.Parameter(torch.empty(8, 4)) for _ in range(3)]
    for one, part in zip(single, stack.detach(), strict=True):
        one.data.copy_(part)
    others = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    together, apart = (MuonWithAdamW(w, others, weight_decay=0.1, adamw={"lr": 0.1}) for w in ([stack], single))
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for one, part in zip(single, stack.grad, strict=True):
            one.grad = part.clone()
        together.step()
        apart.step()
    assert torch.equal(stack, torch.stack(list(single)))
    together.zero_grad()
    before = stack.detach().clone()
    together.step()
    assert torch.equal(stack, before)


def test_experts_of_a_mixture_are_matrices():
    model = zoo.build("moe", length=16, width=32, layers=1)
    stacks = {name: weight for name, weight in model.named_parameters() if weight.ndim == 3}
    assert len(stacks) == 2
    assert set(stacks) <= set(matrix_parameters(model))
    optimizer = muon_optimizer(model, TrainingArguments(output_dir="unused", use_cpu=True, learning_rate=1e-2))
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    before = {name: weight.detach().clone() for name, weight in stacks.items()}
    optimizer.step()
    assert all((weight != before[name]).any(-1).any(-1).all() for name, weight in stacks.items())


def test_its_state_goes_through_a_file(tmp_path):
    model, _, one, _ = both()
    backward(model, 0)
    one.step()
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    again = copy.deepcopy(model)
    other = muon_optimizer(again, TrainingArguments(output_dir="unused", use_cpu=True, learning_rate=1e-2))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for which in (model, again):
        backward(which, 1)
    one.step()
    other.step()
    assert_equal(model.state_dict(), again.state_dict())


def test_a_rate_that_is_set_in_its_groups_moves_both_kinds():
    model, _, one, _ = both()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backward(model, 0)
    for group in one.param_groups:
        group["lr"] = 0.0
    one.step()
    assert_equal(model.state_dict(), before)


def test_matrices_are_the_linear_maps_inside_a_model():
    model = DyadForCausalLM(
        DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, tie_word_embeddings=False)
    )
    found = matrix_parameters(model)
    named = dict(model.named_parameters())
    apart = {name for name in named if name not in found}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.tower.salience.bias"} <= apart
    assert {"model.layers.0.mlp.down.weight", "model.layers.1.tower.bottlenecks.0.weight"} <= set(found)
    assert all(named[name].ndim == 2 for name in found)
    assert {name for name in apart if named[name].ndim > 1} == {"model.embed_tokens.weight", "lm_head.weight"}
    # Tied, the head has the weight of the embedding. GPT-2 has matrices in a class of its own.
    other = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    ends = {name.removeprefix("transformer.h.0.") for name in matrix_parameters(other)}
    assert ends == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # read by peft, not by us
def test_adapters_alone_are_moved_where_they_alone_are_trained():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(both()[0], peft.LoraConfig(r=2, target_modules=["up", "down"], task_type="CAUSAL_LM"))
    optimizer = muon_optimizer(model, TrainingArguments(output_dir="unused", use_cpu=True))
    moved = [weight for group in optimizer.param_groups for weight in group["params"]]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {id(weight) for weight in moved} == {id(weight) for weight in trained}
    assert len(optimizer.param_groups[0]["params"]) == len(trained)


def test_what_muon_cannot_do_is_refused(tmp_path, small, words, monkeypatch):
    for assignment, message in (
        ("optim=adafactor", "takes AdamW for what is no matrix; leave optim=adafactor out"),
        ("train.optimizer=moon", "'moon'; the nearest is muon"),
        ("train.ema=1", "train.ema must be 0 or more and below 1"),
    ):
        with pytest.raises(UserError, match=message):
            train(small(tmp_path / "run", *MUON, assignment), words())
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"no Muon; install 2.9 or newer"):
        train(small(tmp_path / "run", *MUON), words())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train.ema=0.9", "gradient_accumulation_steps=2"), ("optim=adamw_torch",)])
def test_a_run_that_crashed_resumes_bit_equal(tmp_path, small, words, console, more):
    options = (*MUON, *more)
    whole = train(small(tmp_path / "whole", *options), words(), console)

    class Crash(Exception):
        pass

    def crash(self, *args, **kwargs):
        raise Crash

    step = LanguageModelTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LanguageModelTrainer,
            "training_step",
            lambda self, *a, **k: crash(self) if self.state.global_step == 5 else step(self, *a, **k),
        )
        with pytest.raises(Crash):
            train(small(tmp_path / "parts", *options), words(), console)
    parts = train(small(tmp_path / "parts", *options, resume=True), words(), console)
    assert f"Going on from {tmp_path / 'parts' / 'checkpoint-4'}" in console.file.getvalue()
    assert_equal(weights(whole.output), weights(parts.output))
    losses = [[line["eval_loss"] for line in run.metrics if "eval_loss" in line] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.slow
def test_a_momentum_of_another_shape_is_refused(tmp_path, small, words, console):
    run = tmp_path / "run"
    train(small(run, *MUON, "max_steps=2"), words(), console)
    file = run / "checkpoint-2" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    place = next(number for number, entry in state["state"].items() if "momentum_buffer" in entry)
    state["state"][place]["momentum_buffer"] = torch.zeros(3)
    torch.save(state, file)
    with pytest.MonkeyPatch.context() as patch:  # as if it had been written so
        patch.setattr("dyadlm.train.checkpoint.sha256_of", lambda path: "")
        patch.setattr("dyadlm.train.checkpoint.read_manifest", lambda folder: {"identity": {}})
        patch.setattr("dyadlm.train.resuming.read_manifest", lambda folder: None)
        with pytest.raises(UserError, match=r"momentum_buffer .* is \(3,\)"):
            train(small(run, *MUON, "max_steps=4", resume=True), words(), console)


@pytest.mark.slow
def test_a_run_keeps_the_optimizer_that_it_began_with(tmp_path, small, words, console):
    train(small(tmp_path / "run", "max_steps=2"), words(), console)
    with pytest.raises(UserError, match="another optimizer"):
        train(small(tmp_path / "run", *MUON, "max_steps=4", resume=True), words(), console)


@pytest.mark.parametrize(("optimizer", "share"), [("adamw", 0.25), ("muon", 0.5)])
def test_the_rate_of_matrices_falls_with_the_width(tmp_path, small, words, console, monkeypatch, optimizer, share):
    """`small` has a width of 16. Its rate is told as it was asked for; those of the groups are looked at themselves."""
    seen = {}
    step = LanguageModelTrainer.training_step

    def watched(self, model, *args, **kwargs):
        names = {id(weight): name for name, weight in model.named_parameters()}
        for group in self.optimizer.param_groups:
            seen.update((names[id(weight)], group["lr"]) for weight in group["params"])
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", watched)
    options = (
        f"train.optimizer={optimizer}", "train.base_width=4", "max_steps=1", "logging_steps=1", "learning_rate=0.01",
        "train.schedule=constant", "warmup_steps=0",
    )  # fmt: skip
    run = train(small(tmp_path / "run", *options), words(), console)
    model = DyadForCausalLM.from_pretrained(run.output)
    assert model.config.hidden_size == 16
    matrices = set(matrix_parameters(model))
    assert matrices
    assert seen == {name: 0.01 * (share if name in matrices else 1) for name, _ in model.named_parameters()}
    assert [line["learning_rate"] for line in run.metrics if "learning_rate" in line] == [0.01]
    assert f"matrices get {share}" in " ".join(console.file.getvalue().split())


def test_a_scaled_group_keeps_all_else_that_it_had():
    model, *_ = both()
    chosen = model.get_parameter("model.layers.0.mlp.down.weight")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.5, 0.7), weight_decay=0.3)
    scale_rates(optimizer, [chosen], 0.5)
    first, second = optimizer.param_groups
    assert second["params"] == [chosen]
    assert len(first["params"]) == len(list(model.parameters())) - 1
    assert (first["lr"], second["lr"]) == (1.0, 0.5)
    assert all(first[name] == second[name] for name in first if name not in ("params", "lr"))


def test_a_group_without_weights_keeps_its_place():
    """Muon's is the first one, also where there is no matrix."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = MuonWithAdamW([], [{"params": [weight], "weight_decay": 0.0}], weight_decay=0.0, adamw={"lr": 1.0})
    scale_rates(optimizer, [], 0.5)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not weight.equal(torch.ones(3))


def test_a_base_width_that_cannot_be_is_refused(tmp_path, small, words, console):
    for options, message in (
        (("train.base_width=-1",), "must be 0 or more"),
        (("train.base_width=32",), "is the width of a narrower model, and this one has 16"),
        (
            ("train.base_width=8", "fsdp=true", 'fsdp_config={"version": 1}'),
            "FSDP 1 flattens matrices, which train.base_w",
        ),
        (("train.base_width=8", "optim=adafactor"), "for AdamW and Muon; leave it out, or optim=adafactor"),
    ):
        with pytest.raises(UserError, match=message):
            train(small(tmp_path / "run", *options), words(), console)
    assert not (tmp_path / "run").exists()
    train(small(tmp_path / "run", "max_steps=2"), words(), console)
    with pytest.raises(UserError, match="another base width"):
        train(small(tmp_path / "run", "train.base_width=8", "max_steps=4", resume=True), words(), console)


def test_the_plan_counts_what_each_optimizer_keeps(tmp_path, small, words):
    options = ("max_steps=1", "data.sequence_length=8", "per_device_train_batch_size=1")
    plain, muon, averaged = (
        dry_run(small(tmp_path, *options, *more), words()) for more in ((), MUON, (*MUON, "train.ema=0.9"))
    )
    model = DyadForCausalLM(
        DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, max_position_embeddings=8)
    )
    matrices = sum(dict(model.named_parameters())[name].numel() for name in matrix_parameters(model))
    assert plain["static_memory_bytes"] == 16 * plain["parameters"]
    assert muon["static_memory_bytes"] == plain["static_memory_bytes"] - 4 * matrices
    assert averaged["static_memory_bytes"] == muon["static_memory_bytes"] + 4 * plain["parameters"]


# ---- The average


def test_an_average_follows_its_definition():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.8)
    average.begin()
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    state = type("State", (), {})()
    for step in range(1, 60):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape))
        state.global_step = step
        average.on_step_end(None, state, None)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * weight.detach() for n, weight in model.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with average.shown():
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), expected[name])
    assert_equal(dict(model.named_parameters()), before)


@pytest.mark.slow
def test_the_average_is_evaluated_and_published_and_raw_weights_are_trained(tmp_path, small, words, console):
    """By a run without an average, whose weights are the raw ones of the other."""
    plain = train(small(tmp_path / "plain", "save_steps=1"), words(), console)
    averaged = train(small(tmp_path / "averaged", "save_steps=1", "train.ema=0.9"), words(), console)
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in (plain, averaged)]
    assert losses[0] == losses[1]
    last = averaged.output / "checkpoint-6"
    raw, published = weights(last, RAW_NAME), weights(averaged.output)
    assert_equal(raw, {name: value for name, value in weights(plain.output).items() if name in raw})
    assert_equal(published, weights(last))
    assert any(not torch.equal(raw[name], published[name]) for name in raw)
    # Checkpoints hold the averages of their steps, from which the definition follows.
    earlier = weights(averaged.output / "checkpoint-5")
    decay = 7 / 16
    for name, value in raw.items():
        torch.testing.assert_close(published[name], decay * earlier[name] + (1 - decay) * value)
    loaded = AutoModelForCausalLM.from_pretrained(averaged.output)
    ids = torch.randint(0, 256, (1, 16))
    with torch.no_grad():
        assert torch.isfinite(loaded(ids).logits).all()
    assert averaged.validation_loss != plain.validation_loss


@pytest.mark.slow
def test_a_run_may_begin_or_end_to_average_on_its_way(tmp_path, small, words, console):
    plain = train(small(tmp_path / "plain"), words(), console)
    train(small(tmp_path / "run", "max_steps=2", "train.schedule=constant", "train.ema=0.9"), words(), console)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    ended = train(
        small(tmp_path / "run", "max_steps=4", "train.ema=0", "train.schedule=constant", resume=True), words(), console
    )
    straight = train(small(tmp_path / "straight", "max_steps=4", "train.schedule=constant"), words(), console)
    assert_equal(weights(ended.output), weights(straight.output))
    assert not (ended.output / "checkpoint-4" / RAW_NAME).exists()
    begun = train(small(plain.output, "max_steps=8", "train.ema=0.9", resume=True), words(), console)
    assert (begun.output / "checkpoint-8" / RAW_NAME).is_file()


@pytest.mark.slow
def test_raw_weights_of_another_model_are_refused(tmp_path, small, words, console):
    from dyadlm.train.average import load_raw, save_raw

    model = nn.Linear(3, 2)
    save_raw(model, tmp_path)
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / RAW_NAME)
    with pytest.raises(UserError, match=re.escape(f"{RAW_NAME} does not hold the weights")):
        load_raw(model, tmp_path)


@pytest.mark.slow
def test_an_ordinary_model_of_hugging_face_trains_with_both(tmp_path, small, words, console, llama):
    result = train(small(tmp_path / "run", *MUON, "train.ema=0.5", model=llama), words(), console)
    assert result.loss < 6.0
    assert isinstance(muon_optimizer(AutoModelForCausalLM.from_pretrained(llama), TrainingArguments()), MuonWithAdamW)


@pytest.mark.slow
def test_probes_are_asked_of_what_a_checkpoint_holds(tmp_path, small, words, console, monkeypatch):
    seen = {}

    def observe(self, subject, step):
        seen[step] = {name: weight.detach().clone() for name, weight in subject.model.named_parameters()}

    monkeypatch.setattr(ProbeCallback, "_observe", observe)
    data = words()
    material = Material([data.validation[0]])
    train(
        small(tmp_path / "run", "train.ema=0.9", "max_steps=4", "save_total_limit=null"),
        data,
        console,
        callbacks=[lambda trainer: ProbeCallback(trainer, [], material, data.tokenizer)],
    )
    assert set(seen) == {2, 4}
    for step, found in seen.items():
        saved = weights(tmp_path / "run" / f"checkpoint-{step}")
        assert_equal(found, {name: saved[name] for name in found})
