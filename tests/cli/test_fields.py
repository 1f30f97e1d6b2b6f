"""`--set` of fields of a model, in every verb that has it: values take the type of the field."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dyadlm.cli.app import app, spread_lists
from dyadlm.errors import UserError
from dyadlm.generate import load_model
from dyadlm.train.settings import TrainSettings

RUN = str(Path(__file__).parents[1] / "golden" / "run_0_1" / "run")
VERBS = {
    "generate": ["generate", RUN, "--prompt", "the cat", "--max-new-tokens", "2", "--temperature", "0"],
    "stream": ["stream", RUN],
    "inspect": ["inspect", RUN, "--text", "the cat"],
    "evaluate": ["evaluate", RUN, "--data", "TEXT"],
}


def invoke(verb: str, tmp_path: Path, *fields: str):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    arguments = [str(text) if argument == "TEXT" else argument for argument in VERBS[verb]]
    if verb == "inspect":
        arguments += ["--output", str(tmp_path / "picture.png")]
    return CliRunner().invoke(app, spread_lists([*arguments, "--set", *fields]), input=b"the cat\n")


@pytest.mark.parametrize("verb", VERBS)
def test_fields_are_coerced_in_every_verb(verb, tmp_path):
    done = invoke(verb, tmp_path, "rms_norm_eps=1e-5", "slot_scope=stream", "dropout=1e-1")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("field", "message"),
    [("rms_norm_eps=small", "rms_norm_eps cannot be 'small'; it takes a number"), ("slot_scop=x", "slot_scope")],
)
def test_wrong_fields_are_one_sentence(verb, field, message, tmp_path):
    done = invoke(verb, tmp_path, field)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)


def test_loaded_models_have_the_type_of_the_field():
    model, _ = load_model(RUN, fields={"rms_norm_eps": "1e-5", "dropout": "1e-1"})
    assert (model.config.rms_norm_eps, model.config.dropout) == (1e-5, 0.1)


def test_fields_of_new_models_are_coerced(tmp_path):
    given = ["model.dropout=1e-1", "model.rms_norm_eps=1e-5", "model.slot_contexts=[2, word]", "model.level_rank=null"]
    settings = TrainSettings.create(preset="tiny", data=["x"], output=tmp_path, assignments=given)
    assert settings.model_fields == {
        "dropout": 0.1,
        "rms_norm_eps": 1e-5,
        "slot_contexts": [2, "word"],
        "level_rank": None,
    }
