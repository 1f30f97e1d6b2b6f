"""Schedules, decay groups, canaries, checkpoints on disk, metrics files: each part alone."""

import hashlib
import json
import os
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.data import TokenStream, TrainingWindows
from dyadlm.data.canaries import REPETITIONS, PlantedWindows, plan_canaries
from dyadlm.train.checkpoint import (
    checkpoint_path,
    checkpoints,
    discard,
    last_complete,
    read_manifest,
    remove_leftovers,
    remove_old,
    require_same,
    write_manifest,
)
from dyadlm.train.optimizer import decayed_parameters, learning_rate_factor
from dyadlm.train.progress import read_metrics
from dyadlm.train.settings import TrainOptions


def factors(schedule, steps=100, warmup=10, **options):
    options = TrainOptions(schedule=schedule, **options)
    return [
        learning_rate_factor(step, warmup_steps=warmup, max_steps=steps, options=options) for step in range(steps + 1)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules_warm_up_from_above_zero(schedule):
    values = factors(schedule)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values[10:]))
    assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_shapes_of_schedules():
    assert factors("cosine")[55] == pytest.approx(0.55)  # half-way between 10 and 100
    assert factors("cosine", final_learning_rate=0.0)[-1] == pytest.approx(0.0, abs=1e-12)
    wsd = factors("wsd", decay_fraction=0.2, final_learning_rate=0.0)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.5)
    assert factors("cosine", steps=5, warmup=0)[0] == 1.0
    # Of 25 steps a decay of 0.1 takes 2.5, so 3: the rate has begun to fall after step 22.
    short = factors("wsd", steps=25, warmup=0, decay_fraction=0.1, final_learning_rate=0.0)
    assert short[:23] == [1.0] * 23
    assert short[23] == pytest.approx(2 / 3)


def test_only_matrices_decay():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.norm = nn.LayerNorm(4)
            self.project = nn.Linear(4, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight

    assert decayed_parameters(Small()) == ["project.weight"]
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=1))
    decayed = set(decayed_parameters(model))
    assert decayed
    for name, value in model.named_parameters():
        assert (name in decayed) == (value.ndim >= 2 and name != "model.embed_tokens.weight")


class Windows:
    """Windows of zeros, every seventh label ignored."""

    def __init__(self, count, length):
        self.count, self.length = count, length

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        labels = torch.zeros(self.length, dtype=torch.int64)
        labels[::7] = -100
        return {"input_ids": torch.zeros(self.length, dtype=torch.int64), "labels": labels}


def test_canaries_follow_from_the_seed_and_members_alone_are_planted(words):
    tokenizer = words().tokenizer
    plan = plan_canaries(2, 5, tokenizer, 300, 40)
    assert plan == plan_canaries(2, 5, tokenizer, 300, 40)
    assert plan != plan_canaries(2, 6, tokenizer, 300, 40)
    assert [canary.repetitions for canary in plan.members] == [r for r in REPETITIONS for _ in range(2)]
    base = Windows(300, 40)
    planted = PlantedWindows(base, plan)
    texts = [bytes(planted[i]["input_ids"].tolist()) for i in range(len(planted))]
    for canary in plan.members:
        found = [i for i, text in enumerate(texts) if canary.text.encode() in text]
        assert found == canary.windows
        assert len(found) == canary.repetitions
        item = planted[found[0]]
        place = slice(canary.offsets[0], canary.offsets[0] + len(canary.tokens))
        counts = torch.arange(40)[place] % 7 != 0
        assert item["input_ids"][place].tolist() == canary.tokens
        assert item["labels"][place].tolist() == torch.where(counts, item["input_ids"][place], -100).tolist()
    assert not [twin for twin in plan.twins if any(twin.text.encode() in text for text in texts)]
    with pytest.raises(UserError, match="plant fewer"):
        plan_canaries(4, 5, tokenizer, 300, 40)
    with pytest.raises(UserError, match=r"set data\.sequence_length"):
        plan_canaries(1, 5, tokenizer, 300, 24)


@pytest.mark.parametrize("lanes", [0, 5])
def test_no_document_begins_within_a_canary(words, lanes):
    tokenizer = words().tokenizer
    stream = TokenStream.from_text(["some words"] * 400, tokenizer)
    base = TrainingWindows([(stream, 1.0)], 40, 85, document_reset=True, lanes=lanes)
    plan = plan_canaries(1, 0, tokenizer, 85, 40)
    planted = PlantedWindows(base, plan)
    for canary in plan.members:
        for window, offset in zip(canary.windows, canary.offsets, strict=True):
            before, after = base[window], planted[window]
            end = offset + len(canary.tokens)
            fresh = before["position_ids"] == 0
            assert fresh[offset + 1 : end].any()  # documents of 11 tokens: there is something to heal
            fresh[offset + 1 : end] = False
            assert torch.equal(after["position_ids"] == 0, fresh)
            assert all(later in (0, now + 1) for now, later in pairwise(after["position_ids"].tolist()))
            assert torch.equal(after["labels"], torch.where(fresh, -100, after["input_ids"]))
            assert after["input_ids"][offset:end].tolist() == canary.tokens
            assert after["position_ids"][0] == before["position_ids"][0]
            outside = torch.ones(40, dtype=torch.bool)
            outside[offset:end] = False
            assert torch.equal(after["input_ids"][outside], before["input_ids"][outside])
    assert torch.equal(base[0]["input_ids"], TrainingWindows([(stream, 1.0)], 40, 1, lanes=lanes)[0]["input_ids"])


def make_checkpoint(run, step):
    folder = checkpoint_path(run, step)
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(step))
    (folder / "part" / "state").write_text("state")
    write_manifest(folder, step, {"data": "id"})
    return folder


def test_manifest_tells_complete_from_damaged(tmp_path):
    folder = make_checkpoint(tmp_path, 3)
    assert read_manifest(folder)["step"] == 3
    (folder / "extra").write_text("more files do not matter")
    assert read_manifest(folder)["identity"] == {"data": "id"}
    damages = {
        "weights": lambda file: file.write_bytes(b"\1\0\0"),
        "part/state": lambda file: file.unlink(),
        "checkpoint.json": lambda file: file.write_text('{"step": 3'),
    }
    for name, damage in damages.items():
        damage(folder / name)
        assert read_manifest(folder) is None
        assert last_complete(tmp_path) is None
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        make_checkpoint(tmp_path, 3)
    assert last_complete(tmp_path / "nowhere") is None


def test_a_manifest_tells_the_step_and_every_file(tmp_path):
    folder = make_checkpoint(tmp_path, 3)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert manifest == read_manifest(folder)
    assert (manifest["step"], manifest["identity"]) == (3, {"data": "id"})
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"part/state": 5, "weights": 3}
    assert list(manifest["files"]) == ["part/state", "weights"]
    assert manifest["files"]["weights"]["sha256"] == hashlib.sha256(bytes(3)).hexdigest()


@pytest.mark.parametrize("content", ["{}", "[]", "1", '{"files": 1}', '{"files": {"weights": {}}}', "\0"])
def test_what_is_no_manifest_is_none(tmp_path, content):
    folder = make_checkpoint(tmp_path, 3)
    (folder / "checkpoint.json").write_text(content)
    assert read_manifest(folder) is None


def test_the_newest_complete_checkpoint_is_the_last(tmp_path):
    folders = [make_checkpoint(tmp_path, step) for step in (9, 100, 20)]
    (tmp_path / "checkpoint-200").write_text("a file")
    (tmp_path / "checkpoint-300").mkdir()
    assert list(checkpoints(tmp_path)) == [9, 20, 100, 300]
    assert last_complete(tmp_path) == folders[1]
    (folders[1] / "weights").write_bytes(bytes(99))
    assert last_complete(tmp_path) == folders[2]


def test_what_differs_from_the_run_of_a_checkpoint_is_named(tmp_path):
    here = {"model": {"type": "dyadlm", "hidden_size": 16}, "data": "a", "companions": None}
    require_same(here | {"more": 1}, here, tmp_path)
    for found, message in (
        ({"data": "b"}, "was made with another data; resume with the settings"),
        ({"model": {"type": "dyadlm", "hidden_size": 24}}, r"another model \(hidden_size: 24 there, 16 here\); resume"),
        ({"model": {"type": "dyadlm"}}, r"another model \(hidden_size: None there, 16 here\); resume"),
        ({"model": here["model"] | {"rank": 3}}, r"another model \(rank: 3 there, None here\); resume"),
        (
            {"model": {}},
            r"another model \((type: None|hidden_size: None).*; (type: None|hidden_size: None).*\); resume",
        ),
        ({"model": "dyadlm"}, "was made with another model; resume"),
        ({"companions": ["twin", "planner"]}, r"another companions \(twin and planner there, none here\); resume"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))} .*{message}"):
            require_same(here | found, here, tmp_path)
    order = {"order of text": {"seed": 1, "windows_per_step": 8}}
    with pytest.raises(UserError, match=r"resume with --set train\.windows_per_step=4, or choose"):
        require_same({"order of text": {"seed": 1, "windows_per_step": 4}}, order, tmp_path)
    with pytest.raises(UserError, match="resume with the settings"):
        require_same({"order of text": {"seed": 2, "windows_per_step": 4}}, order, tmp_path)
    with pytest.raises(UserError, match=r"another companions \(none there, twin here\)"):
        require_same(here, here | {"companions": ["twin"]}, tmp_path)
    with pytest.raises(UserError, match="another data; resume"):
        require_same({}, here | {"model": None}, tmp_path)


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if the process ended here
        discard(folder)
    assert not folder.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".staging-")
    assert checkpoints(tmp_path) == {}
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_old_checkpoints_go_and_exempt_ones_stay(tmp_path):
    for step in (1, 2, 10, 20, 30):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    remove_old(tmp_path, None, ())
    assert list(checkpoints(tmp_path)) == [1, 2, 10, 20, 30]
    remove_old(tmp_path, 2, {1, 2})
    assert list(checkpoints(tmp_path)) == [1, 2, 20, 30]
    remove_old(tmp_path, 1, ())
    assert list(checkpoints(tmp_path)) == [30]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-30", "checkpoint-best"}


def test_leftovers_are_removed(tmp_path):
    (tmp_path / ".staging-a" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / ".staging-b").write_text("half")
    (tmp_path / "kept").write_text("kept")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_leftovers_that_cannot_be_removed_stop_nothing(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError("the test says so")

    (tmp_path / ".staging-a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", refused)
        remove_leftovers(tmp_path)
        discard(make_checkpoint(tmp_path, 3))
    assert checkpoints(tmp_path) == {}
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    half = tmp_path / ".staging-b"
    half.write_text("half")
    with monkeypatch.context() as patch:
        # As if another process removed it between the look at the folder and the removal.
        patch.setattr("pathlib.Path.is_dir", lambda path: path.unlink() if path == half else os.path.isdir(path))
        remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_metrics_cut_short_are_read_up_to_there(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0}]
    for damaged in (b"null", b"[]", b'{"loss": 2.0}', b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damaged + b"\n")
        assert read_metrics(file) == [{"step": 1, "loss": 2.0}]
