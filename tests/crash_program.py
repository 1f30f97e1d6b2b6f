"""Kills a command at every one of its writes, in turn, and looks at what is left (run by `test_crash.py`).

For k = 1, 2, ... a child process is killed (SIGKILL, no clean-up), or finds the disk full, when it opens a file for
writing, renames or removes something for the k-th time, until a child comes to its end without. After each, what stands
under the final name must be absent, as it was before, or whole. After a full disk nothing else may be left.
"""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dyadlm
from dyadlm import RunFailed, UserError
from dyadlm.data import byte_tokenizer, prepare
from dyadlm.engine import Engine
from dyadlm.train import export
from dyadlm.train.verification import verify

EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.copyfile", "shutil.rmtree")


def stopped_at(number: int, how: str) -> Callable[[], bool]:
    """From now on this process dies, or finds the disk full, at its `number`-th write. Returns whether it did."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in EVENTS:
            left -= 1
            if left == 0 and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(hook)
    return lambda: left <= 0


def sweep(command: Callable[[], object], output: Path, how: str) -> int:
    """How many writes the command has; it was stopped at each."""
    before = output.read_bytes() if output.is_file() else None
    number = 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            reached = stopped_at(number, how)
            try:
                command()
            except (OSError, UserError, RunFailed):
                os._exit(3)
            os._exit(4 if reached() else 0)  # 4: it got over it
        _, status = os.waitpid(child, 0)
        ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        assert ended or os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (3, 4), (number, status)
        if (output.is_dir() and any(output.iterdir())) or (output.is_file() and output.read_bytes() != before):
            damaged = [entry for entry in verify(output) if not entry.whole]
            assert not damaged, (number, damaged)
            if output.is_dir() and not ended:
                shutil.rmtree(output)
        else:
            assert (before is None) == (not output.is_file()), number
        if how == "full":
            left = [path.name for path in output.parent.glob(".staging-*")]
            assert not left, (number, left)
        if ended:
            return number - 1


def main(verb: str, how: str, folder: Path) -> None:
    """verb: prepare, export or state. how: kill or full. The number of writes is left in the file `writes`."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "slot_entries": 16, "slot_layers": [0], "intermediate_size": 16}
    dyadlm.DyadForCausalLM(dyadlm.DyadConfig.from_preset("tiny", **small)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("to be or not to be\n" * 200)
    if verb == "prepare":
        output = folder / "prepared"
        writes = sweep(lambda: prepare([folder / "text.txt"], output), output, how)
    elif verb == "export":
        output = folder / "exported"
        writes = sweep(lambda: export(folder / "model", output), output, how)
    else:
        output, engine = folder / "state", Engine.from_folder(folder / "model")
        state = engine.start()
        for token in np.frombuffer(b"to be", np.uint8).tolist():
            engine.step(state, token)
        engine.save_state(state, output)
        engine.step(state, 65)
        writes = sweep(lambda: engine.save_state(state, output), output, how)
    (folder / "writes").write_text(str(writes))
