"""A run killed with SIGKILL, again and again, ends with the weights of one that was left alone."""

import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from dyadlm.train import train
from dyadlm.train.checkpoint import checkpoints, last_complete, read_manifest

pytestmark = pytest.mark.slow

# With a carried state and an average of the weights, a checkpoint has the most to restore.
ASSIGNMENTS = (
    "max_steps=60", "save_steps=10", "eval_steps=15", "logging_steps=5", "save_total_limit=2", "train.carry_state=true",
    "train.optimizer=muon", "train.ema=0.9",
)  # fmt: skip


def wait_until(seen, process):
    """The process must not end by itself before."""
    deadline = time.monotonic() + 120
    while not seen():
        assert process.exitcode is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def run_until(launch, output, seen, *options):
    """Start a run and kill it with SIGKILL as soon as `seen()`."""
    process = launch(output, *ASSIGNMENTS, *options)
    wait_until(seen, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def staging(output):
    return list(output.glob(".staging-*"))


def test_killed_runs_resume_bit_equal(tmp_path, small, words, console, launch):
    output = tmp_path / "killed"
    # Before the first checkpoint.
    run_until(launch, output, lambda: (output / "metrics.jsonl").exists())
    assert last_complete(output) is None
    # While the second checkpoint is being written.
    first = output / "checkpoint-10"
    run_until(launch, output, lambda: first.exists() and any(path.is_dir() for path in staging(output)), "--resume")
    # Between checkpoints.
    lines = output / "metrics.jsonl"
    run_until(launch, output, lambda: '"step": 35' in lines.read_text(), "--resume")
    complete = [path for path in checkpoints(output).values() if read_manifest(path)]
    assert complete == list(checkpoints(output).values())
    assert 30 <= int(last_complete(output).name.removeprefix("checkpoint-")) < 60

    resumed = train(small(output, *ASSIGNMENTS, resume=True), words(), console)
    assert f"Going on from {output}" in console.file.getvalue()
    assert not staging(output)
    whole = train(small(tmp_path / "whole", *ASSIGNMENTS), words(), console)
    first, second = (load_file(result.output / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The record of the run has no gaps and nothing twice.
    for name in ("loss", "eval_loss"):
        kept = [(line["step"], line[name]) for line in resumed.metrics if name in line]
        assert kept == [(line["step"], line[name]) for line in whole.metrics if name in line]


def test_terminated_program_saves_and_ends_with_143(tmp_path, launch):
    output = tmp_path / "run"
    process = launch(output, "max_steps=100000", "save_steps=100000", "eval_steps=100000")
    metrics = output / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text(), process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert last_complete(output) is not None
    assert f"go on with: dyadlm train --output {output} --resume" in (tmp_path / "shown").read_text()


def test_disk_that_takes_no_more_loses_no_earlier_checkpoint(tmp_path, small, words, console, launch):
    """RLIMIT_FSIZE stands for the full disk: the next checkpoint's optimizer state does not fit."""
    output = tmp_path / "run"
    train(small(output, "max_steps=2"), words(), console)
    optimizer = (output / "checkpoint-2" / "optimizer.pt").stat().st_size
    process = launch(output, "--resume", "max_steps=6", largest_file=optimizer - 1)
    process.join(120)
    assert process.exitcode == 1
    shown = (tmp_path / "shown").read_text()
    assert (
        "could not be written (less was written than asked; the disk may be full); the last good checkpoint is "
        + str(output / "checkpoint-2")
        in shown
    )
    assert last_complete(output) == output / "checkpoint-2"
    assert not staging(output)
