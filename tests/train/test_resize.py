"""A run goes on with another number of processes (gloo), sharded or not, as if there had always been one."""

import json
import shutil
import socket
from functools import partial

import program
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from dyadlm.errors import UserError
from dyadlm.train import train
from dyadlm.train.checkpoint import MANIFEST_NAME, read_manifest, write_manifest
from dyadlm.train.shards import OPTIMIZER_FOLDER, WEIGHTS_FOLDER, load_sharded_weights
from processes import shown_in

pytestmark = pytest.mark.slow

SHARED = (
    "model.dropout=0", "train.schedule=constant", "logging_steps=1", "save_steps=1", "save_total_limit=null",
    "adam_epsilon=1e-4", "train.windows_per_step=4",
)  # fmt: skip
KINDS = {
    "sharded": ("fsdp=true", "train.base_width=8"),
    "carried": ("train.carry_state=true", "gradient_accumulation_steps=2"),
}


def metrics(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [(OSError(5, "Input/output error"), OSError), (MemoryError(), MemoryError), (KeyError("weight"), RuntimeError)],
)
def test_a_disk_that_fails_is_no_damaged_checkpoint(tmp_path, monkeypatch, reason, kind):
    def load(*given, **options):
        raise CheckpointException("read", {1: (reason, None)})

    monkeypatch.setattr("dyadlm.train.shards.load", load)
    with pytest.raises(kind):
        load_sharded_weights(torch.nn.Linear(2, 2), tmp_path, ())


def launch_two(forkserver, file, runs: str) -> list[int]:
    """The exit codes of two processes, started as by `torchrun --nproc-per-node=2`, which imports torch three times."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in ("0", "1"):
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank}
        options = {"args": (file, program.main_of_runs, runs), "kwargs": {"environment": environment}}
        processes.append(forkserver.Process(target=shown_in, **options))
        processes[-1].start()
    for process in processes:
        process.join(240)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def test_runs_go_from_one_process_to_two_and_back(tmp_path, small, words, console, forkserver):
    expected = {}
    for name, options in KINDS.items():
        settings = small(tmp_path / f"one-{name}", *SHARED, *options, "max_steps=6")
        expected[name] = train(settings, words(), console).output
        train(small(tmp_path / name, *SHARED, *options, "max_steps=2"), words(), console)

    runs = [
        f"{tmp_path / name} {' '.join((*SHARED, *options))} max_steps=4 --resume" for name, options in KINDS.items()
    ]
    assert launch_two(forkserver, tmp_path / "shown", " -- ".join(runs)) == [0, 0], (tmp_path / "shown").read_text()
    checkpoint = tmp_path / "sharded" / "checkpoint-4"
    for folder in (WEIGHTS_FOLDER, OPTIMIZER_FOLDER):
        assert len(list((checkpoint / folder).glob("*.safetensors"))) == 2

    half = shutil.copytree(tmp_path / "sharded", tmp_path / "half")
    for folder in (OPTIMIZER_FOLDER, WEIGHTS_FOLDER):  # weights are read first
        first, second = sorted((half / "checkpoint-4" / folder).iterdir())
        for damage in (first.unlink, partial(shutil.copy, second, first), second.unlink, first.unlink):
            damage()
            (half / "checkpoint-4" / MANIFEST_NAME).unlink()
            write_manifest(half / "checkpoint-4", 4, read_manifest(checkpoint)["identity"])
            with pytest.raises(UserError, match="checkpoint-4 is damaged"):
                train(small(half, *SHARED, "fsdp=true", "max_steps=6", resume=True), words(), console)

    for name, options in KINDS.items():
        run = train(small(tmp_path / name, *SHARED, *options, "max_steps=6", resume=True), words(), console).output
        for figure, precision in (("loss", 1e-5), ("grad_norm", 1e-4)):
            found = metrics(run, figure)
            assert len(found) == 6
            assert found == pytest.approx(metrics(expected[name], figure), rel=precision)
        found, wanted = (load_file(folder / "model.safetensors") for folder in (run, expected[name]))
        for weight, value in wanted.items():
            torch.testing.assert_close(found[weight], value, rtol=1e-4, atol=2e-5)


def test_a_run_that_one_process_does_not_see_is_refused(tmp_path, small, words, console, forkserver):
    """As where each machine has a disk of its own; a run would begin anew there."""
    train(small(tmp_path / "run-0", *SHARED, "max_steps=1"), words(), console)
    (tmp_path / "run-1").mkdir()
    shown = tmp_path / "shown"
    assert launch_two(forkserver, shown, f"{tmp_path}/run-$RANK {' '.join(SHARED)} max_steps=2 --resume") == [1, 1]
    assert f"Process 1 does not see {tmp_path / 'run-1/checkpoint-1'}" in shown.read_text()


def test_what_the_first_process_refuses_is_refused_in_all(tmp_path, small, words, console, forkserver):
    """A process of its own mind would wait for the others."""
    train(small(tmp_path / "run", *SHARED, "max_steps=1"), words(), console)
    runs = f"{tmp_path}/run {' '.join(SHARED)} seed=7 max_steps=2 --resume"
    assert launch_two(forkserver, tmp_path / "shown", runs) == [1, 1]
    assert (tmp_path / "shown").read_text().count("seed: 42 there, 7 here") == 2
