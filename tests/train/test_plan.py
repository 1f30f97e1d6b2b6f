"""Plans for GPUs that are not here: the arithmetic, and that each figure comes from a measurement or a count."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from dyadlm import DyadConfig
from dyadlm.accounting import training_flops_per_token
from dyadlm.cli import main
from dyadlm.errors import UserError
from dyadlm.train import TrainSettings, plan
from dyadlm.train.gpu_plan import measured_rates, nearest_rate, overhead, passes_over, windows_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.hidden_size=32", "model.num_hidden_layers=2", "max_steps=100", "gradient_accumulation_steps=4")


def settings(*assignments, preset="tiny"):
    return TrainSettings.create("run", preset=preset, data=["any"], assignments=(*SMALL, *assignments))


@pytest.mark.slow
def test_the_rates_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    script = importlib.import_module("rates")
    counted = {2048: script.activation_bytes(DyadConfig.from_preset("small", max_position_embeddings=2048), 16, 2048)}
    monkeypatch.setattr(script, "activation_bytes", lambda config, windows, length: counted.get(length))
    found = script.rates()
    for name in set(sys.modules) - before:  # other tests import modules of these names
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    stored = json.loads((ROOT / "src/dyadlm/train/rates.json").read_text())
    for one, other in zip(found, stored, strict=True):
        saved, expected = one.pop("activation_bytes", None), other.pop("activation_bytes", None)
        # What autograd saves differs a little by version of torch. Counting takes seconds; one length is enough.
        assert saved is None or saved == pytest.approx(expected, rel=0.02)
        assert one == other


def test_the_counted_memory_is_near_what_a_gpu_took():
    """Beyond it, there are buffers that live for a moment."""
    eager = [rate for rate in measured_rates() if rate.kind == "eager"]
    assert len(eager) >= 3
    assert all(1.0 < overhead(rate) < 1.2 for rate in eager)


@pytest.mark.slow
def test_time_is_operations_by_the_measured_rate():
    told = plan(settings(), (1, 4), efficiency=0.5, price=3.0)
    config = DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2)
    rate = nearest_rate("eager", config, 256)
    assert (rate.preset, rate.sequence_length) == ("small", 2048)
    assert told["tokens"] == 100 * 16 * 256
    one, four = told["gpus"]
    assert one["seconds"]["eager"] == pytest.approx(
        told["tokens"] * training_flops_per_token(config, 256) / rate.flops_per_second
    )
    assert four["seconds"]["eager"] == pytest.approx(one["seconds"]["eager"] / 4 / 0.5)
    assert four["gpu_hours"]["llama"] == pytest.approx(2 * one["gpu_hours"]["llama"])
    assert one["cost"]["graph"] == pytest.approx(3 * one["gpu_hours"]["graph"])
    assert one["seconds"]["llama"] < one["seconds"]["graph"] < one["seconds"]["eager"]


@pytest.mark.slow
def test_memory_follows_the_windows_of_a_card_and_fsdp():
    one, sixteen = plan(settings(), (1, 16))["gpus"]
    assert (one["rows"], sixteen["rows"]) == (4, 1)
    assert (one["gradient_accumulation_steps"], sixteen["gradient_accumulation_steps"]) == (4, 1)
    assert one["sharded_memory_bytes"] == one["memory_bytes"] > sixteen["memory_bytes"]
    # Several GPUs sum gradients in buckets beside them.
    two = plan(settings("per_device_train_batch_size=1", "gradient_accumulation_steps=16"), (1, 2))
    assert two["gpus"][1]["memory_bytes"] - two["gpus"][0]["memory_bytes"] == 4 * two["parameters"]
    assert sixteen["memory_bytes"] > sixteen["sharded_memory_bytes"]
    # A table that every GPU gathers whole, and its gradient, are in no block.
    wider, narrow = (plan(settings(f"model.vocab_size={size}"), (16,)) for size in (1259, 259))
    (more,), (less,) = wider["gpus"], narrow["gpus"]
    table = 1000 * 32
    assert wider["static_memory_bytes"] - narrow["static_memory_bytes"] == 16 * table
    kept = (more["memory_bytes"] - less["memory_bytes"]) - (16 + 4) * table  # with gradients in buckets
    assert more["sharded_memory_bytes"] - less["sharded_memory_bytes"] == table + 8 * table + kept
    (less,) = plan(settings("gradient_checkpointing=true"), (1,))["gpus"]
    assert less["memory_bytes"] < one["memory_bytes"]
    assert less["seconds"]["eager"] > 1.2 * one["seconds"]["eager"]


def test_windows_of_a_step_of_all_processes_are_those_of_the_plan():
    assert windows_of(settings()) == (4, 16)
    assert windows_of(settings("train.windows_per_step=64")) == (16, 64)
    with pytest.raises(UserError, match=r"8 GPUs cannot share the 6 windows.*train\.windows_per_step"):
        plan(settings("train.windows_per_step=6"), (8,))


def test_nearest_rates_are_of_the_nearest_length():
    config = DyadConfig.from_preset("large", max_position_embeddings=32_768)
    assert nearest_rate("eager", config, 32_768).sequence_length == 32_768
    assert nearest_rate("eager", config, 9000).sequence_length == 8192
    assert nearest_rate("llama", config, 32_768).preset == "base"


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"gpus": (64,)}, "gradient_accumulation_steps"),
        ({"gpus": ()}, "--gpus"),
        ({"gpus": (0,)}, "--gpus"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"efficiency": float("nan")}, "efficiency"),
        ({"price": -1.0}, "price"),
        ({"price": float("inf")}, "price"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, remedy):
    with pytest.raises(UserError, match=remedy):
        plan(settings(), **options)


def test_plans_are_for_new_models_of_a_known_length():
    with pytest.raises(UserError, match="--preset"):
        plan(TrainSettings.create("run", model="tiny-en", data=["any"]))
    epochs = TrainSettings.create("run", preset="tiny", data=["any"], assignments=["num_train_epochs=2"])
    with pytest.raises(UserError, match="max_steps"):
        plan(epochs)
    chooses = settings("model.selector=topk", "model.selector_heads=4")
    with pytest.raises(UserError, match="selector"):
        plan(chooses, (1,))


@pytest.mark.parametrize(("windows", "rows", "passes"), [(16, 4, 4), (16, 6, 4), (16, 16, 1), (7, 3, 7), (2, 8, 1)])
def test_a_card_takes_its_windows_in_equal_passes(windows, rows, passes):
    assert passes_over(windows, rows) == passes


def test_cards_that_cannot_share_a_step_are_left_out_or_refused():
    told = plan(settings())
    assert ([entry["gpus"] for entry in told["gpus"]], told["left_out"]) == ([1, 8], [64])
    assert plan(settings(), (1,))["left_out"] == []
    assert [entry["gpus"] for entry in plan(settings("gradient_accumulation_steps=1"))["gpus"]] == [1]
    with pytest.raises(UserError, match=r"3 GPUs cannot share the 16 windows of a step evenly; change gradient_"):
        plan(settings(), (1, 3))


@pytest.mark.parametrize(
    "number",
    [
        "per_device_train_batch_size=1" + 17 * "0",
        "max_steps=1" + 320 * "0",
        "data.sequence_length=1" + 26 * "0",
        "data.sequence_length=1" + 10 * "0",
        "model.hidden_size=1" + 11 * "0",
    ],
)
def test_what_cannot_be_counted_is_refused(number, caplog):
    with pytest.raises(UserError, match="beyond what can be counted"):
        plan(settings(number), (1,))
    assert not caplog.records  # torch logs its errors with tracebacks


def test_a_time_that_json_has_no_number_for_is_refused(monkeypatch):
    monkeypatch.setattr("dyadlm.train.gpu_plan.activation_bytes", lambda *given, **options: 1)  # which takes longest
    with pytest.raises(UserError, match="larger efficiency"):
        plan(settings(), (8,), efficiency=1e-320)


def test_a_base_width_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"train\.base_width=64 is the width of a narrower model"):
        plan(settings("train.base_width=64"), (1,))


@pytest.mark.slow
def test_the_command_says_what_was_measured_and_what_was_not(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", "tiny", "--gpus", "1", "8", "--price", "2", "--set", *SMALL])
    assert not ended.value.code
    shown = capsys.readouterr().out
    for words in ("NVIDIA H200", "Assumed, not measured", "cost", "--set train.windows_per_step=16 gradient_acc"):
        assert words in shown
    with pytest.raises(SystemExit):
        main(["plan", "--preset", "tiny", "--gpus", "1", "--json", "--set", *SMALL])
    assert json.loads(capsys.readouterr().out)["gpus"][0]["cost"] == {}
