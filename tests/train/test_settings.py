"""Keys and values: where they come from, which win, and what is said of wrong ones."""

import json
import re

import pytest

from dyadlm import UserError
from dyadlm.train import NAMESPACES, TrainSettings
from dyadlm.train.arguments import training_arguments


def create(output, *assignments, **options):
    return TrainSettings.create(output, assignments=assignments, **{"preset": "tiny", "data": ["text.txt"]} | options)


def test_later_sources_win(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "preset: small\n"
        "data: [a.txt, b.txt:2]\n"
        "max_steps: 7\n"
        "learning_rate: 1e-4\n"
        "train:\n  schedule: wsd\n"
        "data.canaries: 2\n"
        "model: {hidden_size: 64}\n"
    )
    settings = TrainSettings.create(tmp_path / "run", config=config, assignments=["max_steps=9"])
    assert settings.preset == "small"
    assert settings.sources == ("a.txt", "b.txt:2")
    assert settings.arguments["max_steps"] == 9
    assert settings.arguments["learning_rate"] == 1e-4
    assert settings.arguments["per_device_train_batch_size"] == 16  # of the preset
    assert (settings.train.schedule, settings.data.canaries) == ("wsd", 2)
    assert settings.data.sequence_length == 1024
    assert settings.model_fields == {"hidden_size": 64}
    assert create(tmp_path / "run", config=config, preset="tiny").preset == "tiny"


def test_the_optimizer_is_fused_unless_another_is_asked_for(tmp_path):
    """The default of transformers with torch 2.8 and later, kept on a CPU as well."""
    by_default, _ = training_arguments(create(tmp_path / "run", device="cpu"), tmp_path / "run")
    assert by_default.optim == "adamw_torch_fused"
    asked, _ = training_arguments(create(tmp_path / "run", "optim=adamw_torch", device="cpu"), tmp_path / "run")
    assert asked.optim == "adamw_torch"


def test_record_of_a_run_is_a_configuration(tmp_path):
    first = create(
        tmp_path, "max_steps=5", "data.sequence_length=64", "model.level_rank=[4, 8]", "save_total_limit=null"
    )
    file = tmp_path / "dyadlm.json"
    file.write_text(json.dumps({"settings": first.to_dict()}))
    assert TrainSettings.create(tmp_path, config=file) == first
    resumed = TrainSettings.create(tmp_path, resume=True)
    assert resumed.to_dict() == first.to_dict()
    with pytest.raises(UserError, match="was started with preset tiny"):
        TrainSettings.create(tmp_path, resume=True, preset="small")
    with pytest.raises(UserError, match="holds no run to go on with"):
        TrainSettings.create(tmp_path / "other", resume=True)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("max_step=1", "no key max_step; the nearest is max_steps"),
        ("data.canary=1", "the nearest is data.canaries"),
        ("trian.schedule=wsd", "the nearest is train"),
        ("train.schedule=cosin", "'cosin'; the nearest is cosine"),
        ("optim=adamw_torch_fuse", "the nearest is adamw_torch_fused"),
        ("max_steps=many", "takes a whole number"),
        ("max_steps=1.5", "takes a whole number"),
        ("max_steps=0", "max_steps must be at least 1"),
        ("learning_rate=-1", "learning_rate must be above 0"),
        ("learning_rate=.nan", "takes a number"),
        ("num_train_epochs=-1", "num_train_epochs must be above 0"),
        ("eval_steps=null", "eval_steps must be a whole number"),
        ("eval_steps=2.5", "eval_steps must be a whole number"),
        ("seed=-1", "seed must be at least 0"),
        ("adam_beta1=1.5", "adam_beta1 must be at least 0 and below 1"),
        ("weight_decay=-1", "weight_decay must be 0 or more"),
        ("dataloader_num_workers=-1", "dataloader_num_workers must be 0 or more"),
        ("bf16=1", "true or false"),
        ("fp16=true", "use --dtype bfloat16"),
        ("hub_model_id=me/mine", "nothing is uploaded"),
        ("data.sequence_length=1", "at least 2"),
        ("train.carry_state=1", "true or false"),
        ("train.history_weight=-0.5", "history_weight must be 0 or more"),
        ("train.final_learning_rate=2", "between 0 and 1"),
        ("max_steps", "takes key=value"),
        ("max_steps={", "cannot be read"),
    ],
)
def test_wrong_keys_and_values_name_the_remedy(tmp_path, assignment, message):
    with pytest.raises(UserError, match=message):
        create(tmp_path, assignment)


def test_wrong_requests(tmp_path):
    for options, message in (
        ({"preset": "tyny"}, "no preset 'tyny'; the nearest is tiny"),
        ({"preset": None}, "either --preset NAME .* or --model DIR"),
        ({"model": "folder"}, "either --preset"),
        ({"data": []}, "nothing to train on"),
        ({"device": "gpu"}, "--device cannot be 'gpu'"),
        ({"dtype": "float16"}, "--dtype cannot be 'float16'; the nearest is bfloat16"),
        ({"config": tmp_path / "none.yaml"}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            create(tmp_path, **options)
    broken = tmp_path / "broken.yaml"
    broken.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must be a mapping"):
        create(tmp_path, config=broken)


def test_a_mechanism_adds_a_namespace(tmp_path, monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class TwinOptions:
        weight: float = 0.5

    monkeypatch.setitem(NAMESPACES, "twin", TwinOptions)
    settings = create(tmp_path, "twin.weight=1")
    assert settings.options["twin"] == TwinOptions(1)
    assert settings.to_dict()["twin.weight"] == 1


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "learning_rate"), ("hidden_size", "model.hidden_size"), ("sequence_length", "data.sequence_length"),
        ("data.schedule", "train.schedule"), ("epochs", "num_train_epochs"),
        ("bogus", "docs/settings.md"), ("modell.dropout", "model.dropout"),
    ],
)  # fmt: skip
def test_a_key_that_is_none_leads_to_the_one_that_was_meant(tmp_path, key, meant):
    with pytest.raises(UserError, match=re.escape(meant)):
        TrainSettings.create(tmp_path, preset="tiny", data=["x"], assignments=[f"{key}=3"])
