"""Killed, or out of disk, at any of its writes, a command leaves what was there before, nothing, or the whole."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize(("verb", "least"), [("prepare", 8), ("export", 6), ("state", 2)])
def test_stopped_at_every_write_a_command_leaves_no_half(tmp_path, verb, least, how):
    program = Path(__file__).parent / "crash_program.py"
    done = subprocess.run([sys.executable, str(program), verb, how, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= least
