"""`--slot-entries`: tables of slots of another size than the model was trained with, and the states that come of it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dyadlm.cli.app import app
from dyadlm.errors import UserError
from dyadlm.generate import EngineModel, engine_model, load_model

RUN = str(Path(__file__).parents[1] / "golden" / "run_0_1" / "run")
VERBS = {
    "generate": ["generate", RUN, "--prompt", "the cat", "--max-new-tokens", "2", "--temperature", "0"],
    "stream": ["stream", RUN],
    "score": ["score", RUN, "-"],
}


def invoke(*arguments: str):
    return CliRunner().invoke(app, [str(part) for part in arguments], input=b"the cat sat on the mat\n" * 3)


@pytest.mark.parametrize("verb", VERBS)
def test_a_state_names_its_size_and_is_refused_at_another(verb, tmp_path):
    state = tmp_path / "state"
    done = invoke(*VERBS[verb], "--slot-entries", "64", "--state-out", state)
    assert done.exit_code == 0, done.output
    refused = invoke(*VERBS[verb], "--state-in", state)
    assert isinstance(refused.exception, UserError)
    assert f"{state} was written with slot_entries=64; use it with --set slot_entries=64." == str(refused.exception)
    assert invoke(*VERBS[verb], "--state-in", state, "--set", "slot_entries=64").exit_code == 0


def test_evaluation_takes_the_size(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog lay beside it. " * 80)
    few, more = (
        invoke("evaluate", RUN, "--data", text, "--stream", "--json", "--slot-entries", entries).output
        for entries in (16, 1024)
    )
    assert '"nats_per_token"' in few
    assert few != more


def test_the_engine_serves_at_any_size_and_turns_to_torch_with_it():
    light = engine_model(RUN, "cpu", "auto", {"slot_entries": 64, "slot_values": "float16"})
    assert isinstance(light, EngineModel)
    assert light.engine.shape.sets * light.engine.shape.ways == 64
    assert light.engine.start().values.dtype == "float16"
    config = light.in_torch().config
    assert (config.slot_entries, config.slot_values) == (64, "float16")
    assert load_model(RUN)[0].config.slot_entries == 16


@pytest.mark.parametrize(("entries", "message"), [("63", "make no power of two of sets"), ("0", "at least 1")])
@pytest.mark.parametrize("verb", VERBS)
def test_sizes_that_no_table_can_have_are_one_sentence(verb, entries, message):
    done = invoke(*VERBS[verb], "--slot-entries", entries)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)


def test_models_without_slots_are_told(tmp_path):
    from dyadlm import DyadConfig, DyadForCausalLM
    from dyadlm.data import byte_tokenizer

    DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    done = invoke("generate", tmp_path / "model", "--prompt", "the cat", "--slot-entries", "64")
    assert isinstance(done.exception, UserError)
    assert "has no slots; leave out --slot-entries" in str(done.exception)
