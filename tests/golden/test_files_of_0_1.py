"""Models, states and runs that version 0.1 wrote (commit 3c2a5a6) load, go on, and give the same figures.

`run_0_1/run` was left by tests/train/program.py with a twin, stopped after its checkpoint of step 2; `expected.json`
has what version 0.1 computed from there on.
"""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dyadlm import DyadCache, DyadForCausalLM
from dyadlm.train import train

HERE = Path(__file__).parent / "run_0_1"
EXPECTED = json.loads((HERE / "expected.json").read_text())
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import program  # noqa: E402 - found by the line above


def test_a_model_and_a_state_continue_with_equal_logits():
    model = DyadForCausalLM.from_pretrained(HERE / "run").eval()
    cache = DyadCache.load(HERE / "session.state", model.config)
    ids = torch.tensor([EXPECTED["ids"]])
    with torch.no_grad():
        whole = model(ids).logits[0, -1]
        rest = model(ids[:, EXPECTED["read"] :], past_key_values=cache, use_cache=True).logits[0, -1]
    expected = torch.tensor(EXPECTED["logits"])
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest, expected, rtol=1e-5, atol=1e-5)


def test_a_run_with_a_twin_is_resumed_with_equal_losses(tmp_path):
    """Weights, moments of the optimizer, the twin and the random state are those of the checkpoint."""
    output = tmp_path / "run"
    shutil.copytree(HERE / "run", output)
    options = ("twin.conditioning=joint", "max_steps=4", "model.slot_entries=16", "model.level_rank=4")
    settings = program.small(output, *options, "model.slot_width=4", resume=True)
    console = Console(file=io.StringIO(), width=200)
    result = train(settings, program.words(), console)
    assert "Going on from" in console.file.getvalue()
    found = [line for line in result.metrics if line["step"] == 4]
    for mine, theirs in zip(found, EXPECTED["metrics"], strict=True):
        for name in theirs.keys() - {"step"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
