"""Values of `--set` become what their field takes, or are refused in one sentence."""

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm import values
from dyadlm.errors import UserError
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.loading import load_weights
from dyadlm.recall.models import build_model
from dyadlm.train.settings import TrainSettings
from dyadlm.values import coerce, parse_assignment, type_of

TAKEN = {
    "dropout=1e-1": 0.1,
    "dropout=0.1": 0.1,
    "rms_norm_eps=1e-5": 1e-5,
    "hidden_size=6.4e1": 64,
    "slot_contexts=[1, word]": [1, "word"],
    "slot_layers=[0, 1e0]": [0, 1],
    "level_rank=[1, 2]": [1, 2],
    "level_rank=null": None,
    "salience=true": True,
    "eos_token_id=[1, 2]": [1, 2],
    "bos_token_id=null": None,
    "output_hidden_states=true": True,
}
REFUSED = {
    "dropout=much": "model.dropout cannot be 'much'; it takes a number.",
    "dropout=true": "model.dropout cannot be True; it takes a number.",
    "dropout=null": "model.dropout cannot be None; it takes a number.",
    "hidden_size=1.5": "model.hidden_size cannot be 1.5; it takes a whole number.",
    "salience=1": "model.salience cannot be 1; it takes true or false.",
    "slot_layers=3": "model.slot_layers cannot be 3; it takes a list, each entry a whole number or null.",
    "dropuot=1": "A dyadlm model has no field 'dropuot'; the nearest is dropout.",
    "architectures=[a]": "A dyadlm model has no field 'architectures'.",
}


@pytest.mark.parametrize("text", TAKEN)
def test_a_field_takes_what_its_annotation_says(text):
    name, value = parse_assignment(text)
    taken = DyadConfig.coerce_fields({name: value})[name]
    assert taken == TAKEN[text]
    assert type(taken) is type(TAKEN[text])


@pytest.mark.parametrize("text", REFUSED)
def test_another_type_or_field_is_refused_in_one_sentence(text):
    with pytest.raises(UserError) as refused:
        DyadConfig.coerce_fields(dict([parse_assignment(text)]), prefix="model.")
    assert str(refused.value) == REFUSED[text]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_as_text_is_that_number(number):
    assert coerce(f"{number!r}", float, "key") == number


@given(st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.floats(-9, 9), st.lists(st.integers(-9, 9))))
def test_the_value_a_field_has_fits_its_own_type(value):
    taken = coerce(value, type_of(value), "key")
    assert taken == value


def test_training_a_new_model():
    given = ["model.dropout=1e-1", "model.rms_norm_eps=1e-5", "model.slot_contexts=[1,2]", "model.level_rank=null"]
    settings = TrainSettings.create("run", preset="tiny", data=["text"], assignments=given)
    assert settings.model_fields == {
        "dropout": 0.1, "rms_norm_eps": 1e-5, "slot_contexts": [1, 2], "level_rank": None
    }  # fmt: skip
    assert TrainSettings.from_dict(settings.to_dict(), output="run").model_fields == settings.model_fields


def test_a_new_model_for_recall():
    config = build_model("tiny", 16, 32, {"dropout": "1e-1", "rms_norm_eps": "1e-5"}).config
    assert (config.dropout, config.rms_norm_eps) == (0.1, 1e-5)


def test_a_folder_of_ours(tmp_path):
    DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=1, selector_heads=1)).save_pretrained(tmp_path)
    config = load_weights(tmp_path, fields={"dropout": "1e-1", "rms_norm_eps": "1e-5", "use_cache": False}).config
    assert (config.dropout, config.rms_norm_eps, config.use_cache) == (0.1, 1e-5, False)
    with pytest.raises(UserError, match=r"model\.dropout cannot be 'much'; it takes a number"):
        load_weights(tmp_path, fields={"dropout": "much"}, prefix="model.")


def test_a_folder_of_another_architecture(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **small)).save_pretrained(tmp_path)
    config = load_weights(tmp_path, fields={"rms_norm_eps": "1e-5", "attention_dropout": "1e-1"}).config
    assert (config.rms_norm_eps, config.attention_dropout) == (1e-5, 0.1)
    for wrong, message in (
        ({"rms_norm_eps": "small"}, "rms_norm_eps cannot be 'small'; it takes a number or null"),
        ({"rms_norm_esp": 1}, "A llama model has no field 'rms_norm_esp'; the nearest is rms_norm_eps"),
        ({"dtype": "float16"}, "no field 'dtype'"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(tmp_path, fields=wrong)


def test_the_module_is_light():
    tree = ast.parse(Path(values.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} == {"yaml", "dyadlm.errors"}
