"""LoRA: an adapter is trained beside frozen weights, resumed, used, merged and refused where it does not fit."""

import json
import shutil
import warnings

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm import UserError
from dyadlm.diagnose.candidates import load_trajectory
from dyadlm.generate import load_model
from dyadlm.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainSettings, dry_run, export, train
from dyadlm.train.average import RAW_NAME
from dyadlm.train.verification import verify

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    # peft calls what is to go in transformers 6
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture
def base(places, small, words):
    """A finished run, to adapt."""
    folder = places / "base"
    if not folder.exists():
        train(small(folder), words(), Console(quiet=True))
    return folder


@pytest.fixture
def adapt(words):
    """`adapt(base, output, *assignments)`: train an adapter for six steps."""

    def start(base, output, *assignments, resume=False):
        settings = TrainSettings.create(
            output,
            model=base,
            data=["words"],
            resume=resume,
            lora=2,
            device="cpu",
            dtype="float32",
            assignments=[
                "max_steps=6", "save_steps=3", "eval_steps=0", "per_device_train_batch_size=2",
                "data.sequence_length=16", "logging_steps=1", "learning_rate=0.01", *assignments,
            ],
        )  # fmt: skip
        return train(settings, words(1), Console(quiet=True))

    return start


@pytest.fixture
def adapter(places, base, adapt):
    folder = places / "adapter"
    if not folder.exists():
        adapt(base, folder)
    return folder


def logits(folder):
    model, tokenizer = load_model(folder, "cpu")
    with torch.no_grad():
        return model(tokenizer("the words of a model", return_tensors="pt")["input_ids"]).logits


def test_only_the_adapter_is_trained_and_saved(base, adapter):
    assert {file.name for file in adapter.glob("*.safetensors")} == {ADAPTER_WEIGHTS}
    saved = load_file(adapter / ADAPTER_WEIGHTS)
    assert all("lora_" in name for name in saved)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    assert (
        sum(file.stat().st_size for file in (adapter / "checkpoint-6").glob("*.safetensors"))
        < 2 * sum(4 * tensor.numel() for tensor in saved.values()) + 20_000
    )
    assert json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(base)
    assert (logits(base) - logits(adapter)).abs().max() > 1e-3


def test_it_is_merged_as_peft_merges_it(base, adapter):
    model = peft.PeftModel.from_pretrained(load_weights(base), adapter).eval()
    _, tokenizer = load_model(base, "cpu")
    with torch.no_grad():
        beside = model(tokenizer("the words of a model", return_tensors="pt")["input_ids"]).logits
    torch.testing.assert_close(logits(adapter), beside, rtol=1e-4, atol=1e-4)


def test_it_is_exported_as_an_ordinary_model(adapter, tmp_path):
    export(adapter, tmp_path / "whole", auto_map=True)
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_dyadlm.py"} <= names
    assert not {ADAPTER_CONFIG, ADAPTER_WEIGHTS} & names
    assert torch.equal(logits(adapter), logits(tmp_path / "whole"))
    export(adapter / "checkpoint-3", tmp_path / "half")
    assert not torch.equal(logits(adapter), logits(tmp_path / "half"))
    assert all(
        entry.whole for entry in [*verify(adapter), *verify(tmp_path / "whole"), *verify(adapter / "checkpoint-3")]
    )


def test_resuming_changes_nothing(base, adapter, adapt, tmp_path):
    run = shutil.copytree(adapter, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    (run / ADAPTER_WEIGHTS).unlink()
    record = json.loads((run / "dyadlm.json").read_text())
    del record["result"]
    (run / "dyadlm.json").write_text(json.dumps(record))
    adapt(base, run, resume=True)
    first, second = load_file(adapter / ADAPTER_WEIGHTS), load_file(run / ADAPTER_WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_muon_and_an_average_go_with_it(base, adapt, tmp_path):
    options, run = ("train.optimizer=muon", "train.ema=0.9"), tmp_path / "adapter"
    adapt(base, tmp_path / "whole", *options)
    adapt(base, run, *options)
    shutil.rmtree(run / "checkpoint-6")
    record = json.loads((run / "dyadlm.json").read_text())
    del record["result"]
    (run / "dyadlm.json").write_text(json.dumps(record))
    adapt(base, run, resume=True)
    for name in (ADAPTER_WEIGHTS, f"checkpoint-6/{RAW_NAME}"):
        whole, resumed = load_file(tmp_path / "whole" / name), load_file(run / name)
        assert whole.keys() == resumed.keys()
        assert all("lora_" in key and torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_base_is_refused(base, adapter, adapt, small, words, tmp_path):
    train(small(tmp_path / "other", "seed=5"), words(), Console(quiet=True))
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / ADAPTER_CONFIG).read_text())
    (moved / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(UserError, match="trained beside other weights"):
        load_weights(moved)
    (moved / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"base model of .* is not there.*base_model_name_or_path"):
        load_weights(moved)
    run = shutil.copytree(adapter, tmp_path / "run")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "other.safetensors")
    there = shutil.copytree(base, tmp_path / "base")
    (there / "model.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(UserError, match="another adapter"):
        adapt(there, run, "max_steps=7", resume=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": 5}, "names no base model"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"r": 3}, "cannot be merged into"),
        ({"peft_type": "NOTHING"}, "cannot be merged into"),
        ({"target_modules": ["absent"]}, "cannot be merged into"),
        ({"target_modules": ["gate"]}, "cannot be merged into"),
    ],
)
def test_odd_configurations_are_refused(adapter, tmp_path, change, what):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    config = json.loads((odd / ADAPTER_CONFIG).read_text())
    (odd / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=what):
        load_weights(odd)


def test_odd_weights_are_refused(adapter, base, tmp_path):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    tensors = load_file(odd / ADAPTER_WEIGHTS)
    first = min(tensors)
    for changed in (
        {},
        {name: t for name, t in tensors.items() if name != first},
        tensors | {first: tensors[first][:, :-1].clone()},
        tensors | {first: tensors[first].int()},
    ):
        save_file(changed, odd / ADAPTER_WEIGHTS)
        with pytest.raises(UserError, match="cannot be merged into"):
            load_weights(odd)
    (odd / ADAPTER_WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="damaged"):
        load_weights(odd)
    (odd / ADAPTER_WEIGHTS).rename(odd / "adapter_model.bin")
    with pytest.raises(UserError, match="save the adapter in safetensors"):
        load_weights(odd)


def test_where_no_adapter_can_be_trained(base, adapter, adapt, small, words, tmp_path):
    with pytest.raises(UserError, match=r"give --model DIR with --lora"):
        train(small(tmp_path / "new", "lora.rank=2"), words(), Console(quiet=True))
    with pytest.raises(UserError, match="an adapter itself; merge it first"):
        adapt(adapter, tmp_path / "second")
    with pytest.raises(UserError, match=r"not for adapters; leave it out, or lora.rank"):
        adapt(base, tmp_path / "third", "train.base_width=8")
    with pytest.raises(UserError, match=r"do nothing without lora.rank"):
        small(tmp_path / "new", "lora.alpha=2")


def test_without_peft_the_sentence_names_the_extra(adapter, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'dyadlm\[peft\]'"):
        load_weights(adapter)


def test_other_models_are_adapted_too(llama, adapt, tmp_path):
    adapt(llama, tmp_path / "run")
    assert (logits(llama) - logits(tmp_path / "run")).abs().max() > 1e-4


def test_it_can_be_trained_on(adapter, words, tmp_path):
    assert all(weight.requires_grad for weight in load_weights(adapter).parameters())
    settings = TrainSettings.create(
        tmp_path / "run",
        model=adapter,
        data=["words"],
        device="cpu",
        dtype="float32",
        assignments=["max_steps=2", "data.sequence_length=16", "per_device_train_batch_size=2", "eval_steps=0"],
    )
    train(settings, words(), Console(quiet=True))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_fields_that_would_be_lost_are_refused(base, adapt, tmp_path):
    with pytest.raises(UserError, match=r"model.slot_scope would be lost"):
        adapt(base, tmp_path / "run", "model.slot_scope=stream")
    adapt(base, tmp_path / "dropped", "model.dropout=0.2")


def test_a_folder_that_holds_both_is_refused(base, adapter, tmp_path):
    both = shutil.copytree(base, tmp_path / "both")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(adapter / name, both / name)
    with pytest.raises(UserError, match="a whole model and an adapter"):
        load_weights(both)


def test_an_export_needs_neither_base_nor_peft(base, adapter, tmp_path, monkeypatch):
    there, beside = shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((beside / ADAPTER_CONFIG).read_text())
    (beside / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "../base"}))
    for file in beside.glob("tokenizer*"):  # as peft saves adapters
        file.unlink()
    expected = logits(beside)
    export(beside, tmp_path / "whole")
    shutil.rmtree(there)
    shutil.rmtree(beside)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert torch.equal(logits(tmp_path / "whole"), expected)


def test_a_moved_base_is_named_anew(base, adapter, adapt, tmp_path):
    there, run = shutil.copytree(base, tmp_path / "moved"), shutil.copytree(adapter, tmp_path / "run")
    adapt(there, run, "max_steps=7", resume=True)
    assert json.loads((run / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(there)


def test_tied_embeddings_are_refused(words, tmp_path):
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    words().tokenizer.save_pretrained(tmp_path / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = peft.LoraConfig(target_modules=["embed_tokens"], r=2)
        model = peft.get_peft_model(load_weights(tmp_path / "llama"), options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is tested here
        model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text(
        json.dumps(
            json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
            | {"base_model_name_or_path": str(tmp_path / "llama")}
        )
    )
    with pytest.raises(UserError, match="twice, as input and as output"):
        load_weights(tmp_path / "adapter")


def test_checkpoints_of_adapters_are_seen(adapter):
    assert list(load_trajectory(str(adapter), "cpu").steps) == [3, 6]


@pytest.mark.parametrize("option", ["twin.conditioning=joint", "fingerprint.shown=true", "train.carry_state=true"])
def test_with_what_trains_beside_a_model(base, adapt, tmp_path, option):
    adapt(base, tmp_path / "run", option)
    load_weights(tmp_path / "run")


def test_the_rate_of_an_adapter(base, tmp_path):
    given = {"model": str(base), "data": ["x"]}
    assert TrainSettings.from_dict(given, output=tmp_path).arguments["learning_rate"] == 3e-4
    assert TrainSettings.from_dict(given | {"lora.rank": 2}, output=tmp_path).arguments["learning_rate"] == 3e-3
    told = given | {"lora.rank": 2, "learning_rate": 1e-4}
    assert TrainSettings.from_dict(told, output=tmp_path).arguments["learning_rate"] == 1e-4


def test_what_it_costs(base, words, tmp_path):
    settings = TrainSettings.create(
        tmp_path / "run", model=base, data=["words"], lora=2, assignments=["max_steps=6", "data.sequence_length=16"]
    )
    cost = dry_run(settings, words())
    assert any("adapter of rank 2 beside" in choice for choice in cost["choices"])
    model = load_weights(base)
    weights = sum(weight.numel() for weight in model.parameters())
    adapted = cost["parameters"] - weights
    assert 0 < adapted < weights / 5
    assert cost["static_memory_bytes"] == 4 * weights + 16 * adapted


def test_the_card_counts_the_parameters_of_the_merged_model(base, adapter):
    line = next(line for line in (base / "README.md").read_text().splitlines() if line.startswith("| Parameters"))
    assert line in (adapter / "README.md").read_text()
