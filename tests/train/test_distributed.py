"""Two processes on one machine (gloo) train like one: replicated, and sharded by FSDP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dyadlm.train import train
from dyadlm.train.checkpoint import last_complete
from dyadlm.train.companions import COMPANIONS_NAME
from dyadlm.train.shards import OPTIMIZER_FOLDER

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).with_name("program.py"))
# The first steps of AdamW move every weight by the learning rate, whatever the size of its gradient, so that rounding
# would show in weights whose gradient is nearly zero; a larger epsilon keeps it small.
SHARED = (
    "model.dropout=0", "train.schedule=constant", "logging_steps=1", "save_steps=1", "save_total_limit=null",
    "adam_epsilon=1e-4",
)  # fmt: skip
HISTORIES = ("train.carry_state=true", "train.carry_lanes=2", "train.history_weight=0.5")

MECHANISMS = (
    "model.num_levels=4", "model.semantic_levels=[word]", "model.selector=topk", "model.selector_heads=4",
    "model.selector_balance=0.01", "model.slot_contexts=[1,2]", "model.slot_entries=64", "model.slot_gate=true",
    "train.base_width=4",
)  # fmt: skip
PLANNER = (
    "model.planner=stack", "model.planner_futures=2", "model.consensus=0.9", "planner.teacher=0.3",
    "planner.teacher_until=1",
)  # fmt: skip
# With fingerprints beside it, whose draw knows nothing of processes; without cooldown, which follows from max_steps.
TWIN = (
    "twin.conditioning=reverse", "twin.weight=0.5", "fingerprint.shown=true", "fingerprint.dropout=0.4",
    "fingerprint.cooldown=0",
)  # fmt: skip

MUON = ("train.optimizer=muon", "train.base_width=8", "model.ngram_sizes=[2,word]", "model.ngram_entries=64")


def metrics(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_two_processes_train_like_one(tmp_path, small, words, console):
    """One launch for all, because importing torch takes longest."""
    names = ("replicated", "sharded", "carried", "selecting", "selecting-shards", "twins", "planned", "muon", "shards")
    replicated, sharded, carried, selecting, selecting_shards, twins, planned, muon, muon_shards = (
        tmp_path / name for name in names
    )
    halved = (*SHARED, "per_device_train_batch_size=2")
    runs = [
        (replicated, *halved, "max_steps=4"),
        (sharded, *halved, "fsdp=true", "max_steps=1"),
        (sharded, *halved, "fsdp=true", "max_steps=2", "--resume"),
        (carried, *halved, *HISTORIES, "max_steps=2"),
        (carried, *halved, *HISTORIES, "max_steps=4", "--resume"),
        # Not in two parts: how many levels topk takes follows from max_steps.
        (selecting, *halved, *MECHANISMS, "max_steps=4"),
        (selecting_shards, *halved, *MECHANISMS, "max_steps=4", "fsdp=true"),
        (twins, *halved, *TWIN, "max_steps=2"),
        (twins, *halved, *TWIN, "max_steps=4", "--resume"),
        (planned, *halved, *PLANNER, "max_steps=2"),
        (muon, *halved, *MUON, "train.ema=0.5", "max_steps=4"),
        (muon_shards, *halved, *MUON, "max_steps=1", "fsdp=true"),
        (muon_shards, *halved, *MUON, "max_steps=4", "fsdp=true", "--resume"),
    ]
    command = " -- ".join(" ".join(map(str, run)) for run in runs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM]
    done = subprocess.run([*launcher, *command.split()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "view tensor" not in done.stderr

    train(small(tmp_path / "one", *SHARED, "max_steps=4"), words(), console)
    for name, count in (("loss", 4), ("eval_loss", 2)):
        expected = metrics(tmp_path / "one", name)
        assert len(expected) == count
        assert metrics(replicated, name) == pytest.approx(expected, rel=1e-5)
    assert metrics(sharded, "loss") == pytest.approx(metrics(tmp_path / "one", "loss")[:2], rel=1e-5)

    whole = train(small(tmp_path / "one-carried", *SHARED, *HISTORIES, "max_steps=4"), words(), console)
    for name in ("loss", "grad_norm"):
        assert metrics(carried, name) == pytest.approx([line[name] for line in whole.metrics if name in line], rel=1e-5)
    files = sorted(file.name for file in (carried / "checkpoint-4").glob("carried_state*"))
    assert files == ["carried_state_0.safetensors", "carried_state_1.safetensors"]

    whole = train(small(tmp_path / "one-selecting", *SHARED, *MECHANISMS, "max_steps=4"), words(), console)
    for name in ("loss", "cost", "grad_norm", "eval_loss", "eval_largest_load", "eval_hits_2"):
        expected = [line[name] for line in whole.metrics if name in line]
        assert metrics(selecting, name) == pytest.approx(expected, rel=1e-4)
        assert metrics(selecting_shards, name) == pytest.approx(expected, rel=1e-4)
    expected = load_file(tmp_path / "one-selecting" / "model.safetensors")
    for run in (selecting, selecting_shards):
        found = load_file(run / "model.safetensors")
        for name in (name for name in expected if name.endswith("selector.bias")):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
            assert found[name].any()

    whole = train(small(tmp_path / "one-twin", *SHARED, *TWIN, "max_steps=4"), words(), console)
    for name in ("loss", "twin_loss", "fingerprint_shown", "cost", "grad_norm"):
        assert metrics(twins, name) == pytest.approx([line[name] for line in whole.metrics if name in line], rel=1e-4)
    for name in ("model.safetensors", COMPANIONS_NAME):
        expected, found = (load_file(run / "checkpoint-4" / name) for run in (tmp_path / "one-twin", twins))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)

    # Muon computes in bfloat16, and sums of shards are rounded in another order.
    one_muon = train(small(tmp_path / "one-muon", *SHARED, *MUON, "train.ema=0.5", "max_steps=4"), words(), console)
    losses = [line["loss"] for line in one_muon.metrics if "loss" in line]
    assert metrics(muon, "loss") == pytest.approx(losses, rel=1e-4)
    assert metrics(muon_shards, "loss") == pytest.approx(losses, rel=5e-4)
    assert metrics(muon, "eval_loss") == pytest.approx(metrics(tmp_path / "one-muon", "eval_loss"), rel=1e-4)
    assert metrics(tmp_path / "one", "loss") != pytest.approx(losses, rel=5e-3)

    # In passes of the same rows: how much better forecasts are than persistence is found in each pass by itself.
    passes = (*halved, "gradient_accumulation_steps=2")
    whole = train(small(tmp_path / "one-planned", *PLANNER, *passes, "max_steps=2"), words(), console)
    for name in ("loss", "skill_1", "skill_4", "proposal_loss", "artist_loss", "teacher_loss", "cost", "grad_norm"):
        assert metrics(planned, name) == pytest.approx([line[name] for line in whole.metrics if name in line], rel=1e-4)
    assert metrics(planned, "eval_loss") == pytest.approx(
        [line["eval_loss"] for line in whole.metrics if "eval_loss" in line], rel=1e-4
    )

    # Passes together are one batch, where nothing but the ratio of forecasts tells them apart.
    plain = (*PLANNER, "planner.forecast=0", "max_steps=2")
    passed = train(small(tmp_path / "one-passes", *plain, *passes), words(), console)
    whole = train(small(tmp_path / "one-batch", *SHARED, *plain), words(), console)
    for name in ("loss", "proposal_loss", "artist_loss", "teacher_loss", "cost", "grad_norm"):
        found, expected = ([line[name] for line in run.metrics if name in line] for run in (passed, whole))
        assert found == pytest.approx(expected, rel=1e-4)

    one = load_file(tmp_path / "one" / "model.safetensors")
    two = load_file(replicated / "model.safetensors")
    after_two_steps = load_file(tmp_path / "one" / "checkpoint-2" / "model.safetensors", "cpu")
    from_shards = load_file(sharded / "model.safetensors")
    assert one.keys() == from_shards.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(from_shards[name], after_two_steps[name], rtol=1e-4, atol=2e-5)

    # FSDP really sharded: its own checkpoint is there, and is what the second part resumed from.
    assert len(list((sharded / "checkpoint-1" / OPTIMIZER_FOLDER).glob("*.safetensors"))) == 2
    assert f"Going on from {sharded / 'checkpoint-1'}" in done.stdout
    assert last_complete(sharded) == sharded / "checkpoint-2"
    # Only the first process writes and prints.
    shown = [line for line in done.stdout.splitlines() if line.startswith("step 4/4 ")]
    alone = [line for line in console.file.getvalue().splitlines() if line.startswith("step 4/4 ")]
    assert len(shown) * 5 == len(alone) * 7  # of the runs above, 7 came to the end in pairs and 5 alone
    assert len(list((replicated / "tensorboard").iterdir())) == 1
