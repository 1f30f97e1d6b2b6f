"""The preset `paper`: from its name alone the whole system trains, resumes, writes, streams, is scored and exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dyadlm import DyadCache, DyadConfig
from dyadlm.cli.app import app
from dyadlm.model import PRESETS
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainSettings, train
from dyadlm.train.companions import COMPANIONS_NAME
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.settings import PRESET_DEFAULTS

from ..model.conftest import text_ids

NARROW = (
    "model.level_rank=4", "model.slot_entries=64", "model.dropout=0", "logging_steps=1", "save_steps=2", "max_steps=4",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, small, words, console):
    """A finished run of the preset, narrow."""
    return train(small(tmp_path / "run", *NARROW, preset="paper"), words(), console)


def test_its_name_alone_turns_every_part_on():
    config, told = DyadConfig.from_preset("paper"), TrainSettings.create("run", preset="paper", data=["text.txt"])
    assert config.feature_parts == ("transport", "current")
    assert config.level_keys == ["1", "2", "4", "8", "16", "32", "64", "128", "syllable", "word"]
    assert (config.selector, config.decision_slots, config.early) == ("topk", True, "mask")
    assert config.selector_margin > 0
    assert config.read_contexts
    assert (config.planner, config.artist_sees, config.pool) == ("stack", "forecast", "learned")
    assert config.planner_futures > 1
    assert config.consensus > 0
    assert told.twin.conditioning == "reverse"
    assert told.fingerprint.shown
    assert told.planner.teacher > 0
    assert PRESETS.keys() == PRESET_DEFAULTS.keys() - {None}


def test_each_part_can_be_left_out(tmp_path, small, words):
    """As docs/paper.md says."""
    for told, gone in (
        (("twin.conditioning=off",), "twin"),
        (("fingerprint.shown=false",), "fingerprint"),
        (("model.planner=none", "model.consensus=0", "planner.teacher=0"), "planner"),
    ):
        prepared = prepare_run(small(tmp_path / "run", *NARROW, *told, preset="paper"), words(), tmp_path / "run")
        assert set(prepared.model.companions) == {"twin", "fingerprint", "planner"} - {gone}


def test_every_part_learns_and_what_only_training_has_is_not_published(run, tmp_path):
    logged = {name for line in run.metrics for name in line}
    parts = {"twin_loss", "fingerprint_shown", "skill_1", "proposal_loss", "artist_loss", "teacher_loss", "pool_loss"}
    assert parts <= logged
    model = load_weights(run.output, torch.float32)
    assert model.planner.belief.weight.abs().sum() > 0
    last = run.output / "checkpoint-4"
    assert {name.split(".")[0] for name in load_file(last / COMPANIONS_NAME)} == {"twin", "fingerprint"}
    shown = CliRunner().invoke(app, ["export", str(run.output), "--output", str(tmp_path / "exported")])
    assert shown.exit_code == 0, shown.output
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert not [name for name in exported if "twin" in name or "fingerprint" in name or "companions" in name]
    assert not (tmp_path / "exported" / COMPANIONS_NAME).exists()


def test_a_resumed_run_is_the_whole_run(run, small, words, console):
    last = run.output / "checkpoint-4"
    expected = {name: load_file(last / name) for name in ("model.safetensors", COMPANIONS_NAME)}
    (last / "checkpoint.json").unlink()  # as if killed before it was complete
    train(small(run.output, *NARROW, "logging_steps=2", preset="paper", resume=True), words(), console)
    assert "Going on from" in console.file.getvalue()
    for file, weights in expected.items():
        found = load_file(last / file)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in found)


def test_read_in_parts_and_from_a_saved_state_it_says_what_it_says_at_once(run, tmp_path):
    model, ids = load_weights(run.output, torch.float64).eval(), text_ids(2, 90)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = DyadCache(), []
        for start, stop in ((0, 1), (1, 2), (2, 33), (33, 64), (64, 65), (65, 90)):
            if start == 33:
                cache.save(tmp_path / "state", model.config)
                cache = DyadCache.load(tmp_path / "state", model.config)
            parts.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9
    assert whole.exp().sum(-1).sub(1).abs().max() < 1e-9  # the consensus is a distribution


def test_it_trains_in_bfloat16_without_a_warning(tmp_path, small, words, console):
    """Warnings are errors here; norms warn of inputs in another dtype than their weights."""
    settings = small(tmp_path / "run", *NARROW, "max_steps=2", preset="paper", dtype="bfloat16")
    assert train(settings, words(), console).steps == 2


def test_the_commands_take_it(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog while seven wizards watch\n" * 4)
    folder, state = str(run.output), str(tmp_path / "s.state")
    asked = [
        (["evaluate", folder, "--data", str(text), "--json"], None),
        (["generate", folder, "--prompt", "the", "--max-new-tokens", "5", "--state-out", state], None),
        (["generate", folder, "--prompt", "a", "--max-new-tokens", "5", "--state-in", state], None),
        (["generate", folder, "--prompt", "a", "--max-new-tokens", "5", "--temperature", "0", "--speculate"], None),
        (["stream", folder], text.read_bytes()),
        (["audit", folder], None),
    ]
    for arguments, given in asked:
        shown = CliRunner().invoke(app, arguments, input=given)
        assert shown.exit_code == 0, (arguments, shown.output)
        if arguments[0] == "evaluate":
            assert 0 < json.loads(shown.stdout)["nats_per_token"] < 10
