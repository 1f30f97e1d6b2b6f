"""Two processes on one machine (gloo): the same run as one process."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dyadlm.train import train
from dyadlm.train.checkpoint import last_complete


def torchrun(program, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program[1], *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )


def losses(result):
    return [line[name] for line in result for name in ("loss", "eval_loss") if name in line]


def test_two_processes_give_the_loss_of_one(tmp_path, small, words, console, program):
    output = tmp_path / "two"
    shared = ("model.dropout=0", "data.canaries=0", "logging_steps=1", "max_steps=4")
    done = torchrun(program, str(output), *shared, "per_device_train_batch_size=2")
    assert done.returncode == 0, done.stderr
    one = train(small(tmp_path / "one", *shared), words(), console)
    two = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert losses(two) == pytest.approx(losses(one.metrics), rel=1e-5)
    assert len(losses(two)) == 6
    # Only the first process writes and prints.
    assert len(re.findall(r"^step 4/4 ", done.stdout, re.MULTILINE)) == len(
        re.findall(r"^step 4/4 ", console.file.getvalue(), re.MULTILINE)
    )
    assert len(list((output / "tensorboard").iterdir())) == 1
    first, second = (load_file(folder / "model.safetensors") for folder in (one.output, output))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5)


def test_fsdp_trains_saves_and_resumes(tmp_path, program):
    output = tmp_path / "run"
    shared = ("model.dropout=0", "per_device_train_batch_size=2", "fsdp=true", "save_steps=1")
    done = torchrun(program, str(output), *shared, "max_steps=1")
    assert done.returncode == 0, done.stderr
    assert last_complete(output) == output / "checkpoint-1"
    AutoModelForCausalLM.from_pretrained(output)
