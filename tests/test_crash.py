"""Killed, or out of disk, at any of its writes, a command leaves what was there before, nothing, or the whole."""

import pytest

import crash_program
from processes import shown_in

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize(("verb", "least"), [("prepare", 8), ("export", 6), ("state", 2)])
def test_stopped_at_every_write_a_command_leaves_no_half(tmp_path, verb, least, how, forkserver):
    shown = tmp_path / "shown"
    process = forkserver.Process(target=shown_in, args=(shown, crash_program.main, verb, how, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, shown.read_text()[-3000:]
    assert int((tmp_path / "writes").read_text()) >= least
