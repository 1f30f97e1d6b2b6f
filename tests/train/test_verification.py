"""`dyadlm verify` names what is damaged, in everything that this package writes; so does a run that goes on."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from dyadlm import RunFailed, UserError
from dyadlm.data import prepare
from dyadlm.generate import generate_text, load_model
from dyadlm.train import export, train
from dyadlm.train.checkpoint import write_manifest
from dyadlm.train.damage import reading
from dyadlm.train.settings import read_record
from dyadlm.train.verification import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished, small, words, tmp_path):
    """A copy of a finished run, to be damaged."""
    if not finished.exists():
        train(small(finished), words(), Console(quiet=True))
    return shutil.copytree(finished, tmp_path / "run")


def damaged(path) -> dict[str, str]:
    return {entry.place.name: entry.what for entry in verify(path) if not entry.whole}


def flip(path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def test_what_is_whole_is_found_whole(run, tmp_path):
    assert not damaged(run)
    assert len(verify(run)) >= 6
    export(run, tmp_path / "exported")
    assert not damaged(tmp_path / "exported")
    assert not damaged(run / "checkpoint-6")
    model, tokenizer = load_model(run, "cpu")
    list(generate_text(model, tokenizer, "the", max_new_tokens=3, state_out=tmp_path / "state"))
    assert verify(tmp_path / "state")[0].what.endswith("after 6 tokens")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 50)
    prepare([tmp_path / "text.txt"], tmp_path / "data")
    assert not damaged(tmp_path / "data")


def test_damage_is_named(run, tmp_path):
    flip(run / "checkpoint-6" / "optimizer.pt")
    (run / "checkpoint-4" / "model.safetensors").unlink()
    (run / ".staging-rest").mkdir()
    found = damaged(run)
    assert found == {
        "checkpoint-4": "model.safetensors is missing",
        "checkpoint-6": "optimizer.pt is damaged (its checksum is not the manifest's)",
        ".staging-rest": "left by a command that was killed; the next one removes it",
    }
    (run / "checkpoint-6" / "checkpoint.json").unlink()
    assert damaged(run / "checkpoint-4") == {"checkpoint-4": "model.safetensors is missing"}
    assert damaged(run)["checkpoint-6"] == "no checkpoint.json: half of a checkpoint"
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight holds values that are not numbers" in damaged(run)["model.safetensors"]
    with pytest.raises(RunFailed, match=r"model.norm.weight holds values that are not numbers"):
        export(run, tmp_path / "exported")
    (run / "config.json").write_text("{")
    assert damaged(run)["config.json"] == "not JSON"
    with pytest.raises(UserError, match="no run, checkpoint, prepared data, model folder or state"):
        verify(tmp_path)
    (tmp_path / "file").write_text("text")
    assert damaged(tmp_path / "file")["file"].startswith("no readable state")


def test_a_resumed_run_says_which_checkpoints_it_passes_over(run, small, words):
    record = json.loads((run / "dyadlm.json").read_text())
    del record["result"]
    (run / "dyadlm.json").write_text(json.dumps(record))
    flip(run / "checkpoint-6" / "model.safetensors", 0.9)
    told = io.StringIO()
    train(small(run, resume=True), words(), Console(file=told, width=500))
    assert f"{run / 'checkpoint-6'} is damaged and left out" in told.getvalue()
    assert f"Going on from {run / 'checkpoint-4'}" in told.getvalue()


def optimizer(change):
    def apply(folder):
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        for moments in state["state"].values():
            if moments["exp_avg"].dim() > 1:
                change(moments)
        torch.save(state, folder / "optimizer.pt")

    return apply


def weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def state(**entries):
    def apply(folder):
        content = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps(content | entries))

    return apply


SIGNED = {
    "moments that are too short": optimizer(lambda m: m.update(exp_avg=m["exp_avg"][..., :-1].clone())),
    "moments of one number": optimizer(lambda m: m.update(exp_avg=torch.zeros(1).expand(m["exp_avg"].shape))),
    "sparse moments": optimizer(lambda m: m.update(exp_avg=m["exp_avg"].to_sparse())),
    "no moments": optimizer(lambda m: m.pop("exp_avg_sq")),
    "an optimizer of no state": lambda folder: torch.save(
        torch.load(folder / "optimizer.pt", weights_only=True) | {"state": {}}, folder / "optimizer.pt"
    ),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no schedule": lambda folder: (folder / "scheduler.pt").unlink(),
    "a schedule that is none": lambda folder: (folder / "scheduler.pt").write_bytes(b"none"),
    "noise for a random state": lambda folder: (folder / "rng_state.pth").write_bytes(b"noise"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights of another shape": weights(lambda weight: weight[:-1].clone()),
    "weights of whole numbers": weights(lambda weight: weight.to(torch.int32)),
    "a configuration that is none": lambda folder: (folder / "config.json").write_text("{"),
    "a state that is none": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "a state of another step": state(global_step=2),
    "a best checkpoint that is a number": state(best_model_checkpoint=2**70),
}


@pytest.mark.parametrize("damage", SIGNED)
def test_a_checkpoint_is_not_believed_because_its_checksums_fit(run, small, words, damage):
    """Compiled code of the optimizer would read and write past the ends of moments that are too short."""
    record = json.loads((run / "dyadlm.json").read_text())
    del record["result"]
    (run / "dyadlm.json").write_text(json.dumps(record))
    shutil.rmtree(run / "checkpoint-6")
    folder = run / "checkpoint-4"
    manifest = json.loads((folder / "checkpoint.json").read_text())
    SIGNED[damage](folder)
    (folder / "checkpoint.json").unlink()
    write_manifest(folder, manifest["step"], manifest["identity"])
    with pytest.raises(UserError, match=r"is damaged.* remove it to go on from an earlier"):
        train(small(run, resume=True), words(), Console(quiet=True))


def test_links_out_of_a_run_are_not_published(run, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (run / "notes.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match="is a link out of the folder"):
        export(run, tmp_path / "exported")


@pytest.mark.parametrize("name", ["settings", "order_of_text", "training_arguments", "model", "result"])
def test_a_record_of_other_types_is_refused(run, name):
    record = json.loads((run / "dyadlm.json").read_text())
    (run / "dyadlm.json").write_text(json.dumps(record | {name: True}))
    with pytest.raises(UserError, match=r"dyadlm\.json is (not the record of a run|damaged)"):
        read_record(run)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full"), OSError(5, "a disk that fails")])
def test_nobody_is_told_to_remove_a_checkpoint_that_could_not_be_read(error):
    with pytest.raises(type(error)) as raised, reading("run/checkpoint-2"):
        raise error
    assert raised.value is error
