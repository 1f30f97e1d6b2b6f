"""What a run prints: a bar on a terminal, elsewhere few lines, each validation loss once."""

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from dyadlm.train.progress import ProgressDisplay


def run(total: int, log_every: int, validate_every: int, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    display, state, control = ProgressDisplay(console, total), TrainerState(), TrainerControl()
    display.on_train_begin(None, state, control)
    for step in range(1, total + 1):
        state.global_step = step
        display.on_step_end(None, state, control)
        if step % log_every == 0:
            logs = {"loss": 2.0 + 1 / step, "bits_per_byte": 2.9, "tokens_per_second": 1000.0, "steps_per_second": 2.0}
            display.on_log(None, state, control, logs)
        if step % validate_every == 0:
            display.on_log(None, state, control, {"eval_loss": 1.0 + step / 10_000, "eval_bits_per_byte": 1.5})
    display.close()
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("total", "log_every", "validate_every"), [(10, 1, 5), (1500, 10, 100), (9999, 1, 3), (1, 1, 1)]
)
def test_a_run_prints_at_most_thirty_lines(total, log_every, validate_every):
    lines = run(total, log_every, validate_every).splitlines()
    assert 0 < len(lines) <= 30
    validations = [line for line in lines if "validation" in line]
    assert len(validations) == len(set(validations))
    for line in validations:  # the figure of this very step
        step = int(re.match(r"step (\d+)/", line)[1])
        assert f"{1.0 + step / 10_000:.4f}" in line
    last = total // log_every * log_every
    if last == total:
        assert re.search(rf"step {total}/{total}  loss .*bits/byte.*tokens/s.*left", "\n".join(lines))
    if total % validate_every == 0:
        assert any(line.startswith(f"step {total}/{total}  validation") for line in lines)


def test_the_first_lines_come_early_and_the_rest_evenly():
    steps = [int(re.match(r"step (\d+)/", line)[1]) for line in run(1000, 10, 2000).splitlines()]
    assert steps[0] == 10
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) <= 1.3 * 1000 / 15


def test_a_terminal_has_a_bar_and_a_line_for_each_validation():
    shown = run(100, 10, 50, terminal=True)
    assert "100/100" in shown
    assert shown.count("validation 1.0050") == shown.count("validation 1.0100") == 1
