"""`dyadlm repl` and `dyadlm chat`: piped lines are turns and commands, and a person at a terminal is asked."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli import main
from dyadlm.data import byte_tokenizer
from dyadlm.data.chat import DEFAULT_TEMPLATE
from dyadlm.state_file import require_whole


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which `model` is a model of bytes whose answers do not end by themselves; here they are letters."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, slot_layers=[1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dyadlm.generate.session.Sampler", lambda sampling: likeliest_letter)
    return tmp_path


def likeliest_letter(logits: np.ndarray) -> int:
    return ord("a") + int(logits[ord("a") : ord("z") + 1].argmax())


def piped(monkeypatch, lines: str | bytes, *arguments: str) -> int:
    content = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


# What a prompt begins with: the terminal is asked to mark what is pasted.
PROMPT = b"\x1b[?2004h"
REPL = ("repl", "model", "--max-new-tokens", "8", "--seed", "1")


def test_lines_are_turns_and_the_state_goes_on(place, monkeypatch, capsys):
    """Two runs, the second from the saved state, write what one run writes."""
    assert piped(monkeypatch, "To be\n, or\n", *REPL, "--temperature", "0") == 0
    together = capsys.readouterr().out
    assert len(together.splitlines()) == 2
    assert piped(monkeypatch, "To be\n", *REPL, "--temperature", "0", "--state-out", "a.state") == 0
    assert piped(monkeypatch, ", or\n", *REPL, "--temperature", "0", "--state-in", "a.state") == 0
    assert capsys.readouterr().out == together


def test_commands(place, monkeypatch, capsys):
    lines = "One\n/fork b\nTwo\n/undo\nTwo\n/switch main\nTwo\n/state\n/save s.state\n/switch b\n/set top_k 3\n/help\n"
    assert piped(monkeypatch, lines, *REPL) == 0
    out, err = capsys.readouterr()
    first, second, again, other = out.splitlines()
    assert second == again == other != first
    assert re.search(r"position 22 tokens; state [\d,]+ bytes; 12 tokens read here", err)
    assert re.search(r"\* main: 2 turns, 2 not saved\n  b: 2 turns, 2 not saved", err)
    assert re.search(r"top_k +3\n", err)
    assert all(f"\n{command} " in err for command in ("/undo", "/load", "/quit"))
    assert err.endswith("Turns that are not saved: 2 of branch b.\n")
    assert require_whole("s.state") == 22


def test_text_that_is_no_command(place, monkeypatch, capsys):
    """Two slashes begin a turn with one, and a backslash joins lines."""
    assert piped(monkeypatch, "//a\n/state\n", *REPL) == 0
    assert "2 tokens read here" in capsys.readouterr().err
    assert piped(monkeypatch, "a\\\nb\\", *REPL) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/sava x", "There is no command '/sava'; the nearest is /save"),
        ("/save", "/save needs a FILE"),
        ("/undo 3", "/undo takes nothing behind it"),
        ("/undo", "There is no turn to take back"),
        ("/load missing", "There is no state file missing"),
        ("/set temperature", "/set takes a name and a value"),
        ("", "There is nothing to go on from"),
        (b"\xff\xfe", "not UTF-8 text, and was not read"),
    ],
)
def test_wrong_lines_are_named_and_the_rest_is_done(place, monkeypatch, capsys, lines, message):
    """In a script the exit code says so; the state is saved all the same."""
    content = (lines if isinstance(lines, bytes) else lines.encode()) + b"\nOne\n"
    assert piped(monkeypatch, content, *REPL, "--state-out", "a.state") == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(out.splitlines()) == 1
    assert require_whole("a.state") == 11


def test_chat_is_refused_without_a_template(place, monkeypatch, capsys):
    assert piped(monkeypatch, "Hi\n", "chat", "model") == 2
    assert "model has no chat template" in capsys.readouterr().err


def test_chat_answers_in_the_template(place, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DEFAULT_TEMPLATE
    tokenizer.save_pretrained(place / "model")
    assert piped(monkeypatch, "Hi\n/state\n", "chat", "model", "--max-new-tokens", "4", "--system", "Be kind") == 0
    out, err = capsys.readouterr()
    read = len("system:\nBe kind") + 1 + len("\nuser:\nHi") + 1 + len("\nassistant:\n")
    assert f"{read} tokens read here" in err
    assert len(out.strip()) == 4


def test_a_memory_is_kept_with_the_state(place, monkeypatch, capsys):
    assert piped(monkeypatch, "abcabc\n", *REPL, "--memory", "--state-out", "m.state") == 0
    assert piped(monkeypatch, "/load m.state\n", *REPL) == 2
    assert "add --memory" in capsys.readouterr().err
    assert piped(monkeypatch, "/load m.state\nabc\n", *REPL, "--memory") == 0


def test_requests_that_are_refused_before_a_model_is_loaded(place, monkeypatch, capsys):
    assert piped(monkeypatch, "", "repl", "missing", "--top-p", "2") == 2
    assert "top-p is above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_person_at_a_terminal(place):
    """Ctrl-C stops an answer and not the program; unsaved turns are named at the first Ctrl-D; the second ends."""
    pytest.importorskip("prompt_toolkit")
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "dyadlm", "repl", "model", "--max-new-tokens", "100000000"]
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, start_new_session=True, preexec_fn=_own_terminal,
        env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
    )  # fmt: skip
    os.close(side)
    seen = b""

    def until(text: bytes, most: int = 10**9) -> None:
        """Read until the text is there, or so many bytes."""
        nonlocal seen
        deadline = time.monotonic() + 200
        while text not in seen and len(seen) < most:
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536)
        _, _, seen = seen.partition(text)
        time.sleep(0.2)  # what is typed before a prompt reads is let go

    try:
        until(PROMPT)
        os.write(terminal, b"To be\r")
        until(b"never", most=2000)  # the answer is being written
        process.send_signal(signal.SIGINT)
        until(PROMPT)
        os.write(terminal, b"/state\r")
        until(b"main: 1 turns, 1 not saved")
        until(PROMPT)
        os.write(terminal, b"\x04")
        until(b"/quit or Ctrl-D again ends.")
        until(PROMPT)
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def _own_terminal() -> None:
    """The child's standard input becomes the terminal that controls it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_home_of_nobody_is_refused_and_the_conversation_goes_on(place, monkeypatch, capsys):
    code = piped(monkeypatch, "hello\n/save ~nobodyhere/x\n/save kept\n", "repl", "model", "--max-new-tokens", "4")
    assert code == 2
    assert "home directory of nobody" in capsys.readouterr().err
    require_whole(place / "kept")
