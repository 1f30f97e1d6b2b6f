"""The blocks of code of a page or notebook, and how tests run them: in order, in one folder, smaller than printed.

A fence marked `python` or `sh` is run, and so is an indented block that holds a command. Of a notebook each cell is
run; those of `%%sh` are commands. Marks stand in HTML comments, each on a line of its own, above the block:

    <!-- given: runs/first notes.txt -->    what is in the folder at first (`test_blocks.py` says what each is)
    <!-- not run: needs a GPU -->           the next block is not run, and why
    <!-- needs: peft -->                    the next block is run where this package is installed
    <!-- exit code: 1 -->                   the next block ends with this code, as the page says
    <!-- run by: tests/x.py -->             a test of its own runs this page
    <!-- tables: run -->                    cells of this page's tables that are a command are run; of other pages the
                                            tests check that their options exist

What is smaller than printed:

- `dyadlm train` takes four steps of a narrow model (`TRAINING`), and plants no strings
- `recall`, `diagnose`, `audit`, `plan` and `generate` do less (`LESS`)
- `shakespeare` is a text of some kilobytes; `tail -f` and `tail -F` end, as `cat` does
- what follows a file without end (`--follow`) is ended by SIGTERM when it has waited for a second
- in Python, `max_steps` is 2 and `max_new_tokens` 8
"""

import glob
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from dyadlm.cli import main

MARK = re.compile(r"<!-- (given|not run|needs|exit code|tables|run by): (.+?) -->")
IN_TABLE = re.compile(r"\| `((?:[^`]*\\\| )?dyadlm [^`]*)` \|")
COMMAND = re.compile(r"^(?:[^#|]*\| )?(?:dyadlm|make|pip|python|torchrun|source|docker|curl) ", re.MULTILINE)

TRAINING = [
    "max_steps=4", "save_steps=4", "eval_steps=4", "logging_steps=4", "per_device_train_batch_size=2",
    "data.sequence_length=32", "data.validation_tokens=256",
]  # fmt: skip
NARROW = ["model.hidden_size=16", "model.num_hidden_layers=2"]
LESS = {
    "recall": ["--steps", "2", "--questions", "8", "--learning-rates", "1e-3", "--batch-tokens", "512"],
    "generate": ["--max-new-tokens", "8"],
    "audit": ["--length", "24"],
    "plan": ["--set", *NARROW],
}


@dataclass
class Block:
    """language: python or sh. line: of the page, from 1."""

    language: str
    text: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """Why this block is not run here, None if it is."""
        if "not run" in self.marks:
            return self.marks["not run"]
        missing = [name for name in self.marks.get("needs", "").split() if find_spec(name) is None]
        return f"{', '.join(missing)} is not installed" if missing else None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are code to run, in order, each with its marks."""
    if page.suffix == ".ipynb":
        return cells(page)
    found: list[Block] = []
    marks: dict[str, str] = {}
    lines = page.read_text(encoding="utf-8").splitlines()
    tables = "<!-- tables: run -->" in lines
    number = 0
    while number < len(lines):
        line, start = lines[number], number
        number += 1
        if line.startswith("```"):
            while lines[number] != "```":
                number += 1
            language, text = line[3:].strip(), lines[start + 1 : number]
            number += 1
        elif line.startswith("    ") and not lines[start - 1].strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = [each[4:] for each in lines[start:number]]
            language = "sh" if COMMAND.search("\n".join(text)) else ""
        elif tables and (command := IN_TABLE.search(line)):
            found.append(Block("sh", command[1].replace("\\|", "|"), number, marks))
            continue
        elif line.startswith("|"):
            continue
        elif mark := MARK.fullmatch(line):
            marks[mark[1]] = mark[2]
            continue
        else:
            if line.strip():
                marks = {}
            continue
        if language in ("sh", "python"):
            found.append(Block(language, "\n".join(text), start + 1, marks))
        marks = {}
    return found


def run_by(page: Path) -> str | None:
    """The test of its own that runs a page, if there is one."""
    return next((name for kind, name in MARK.findall(page.read_text(encoding="utf-8")) if kind == "run by"), None)


def in_tables(page: Path) -> list[str]:
    """The commands that stand in the tables of a page."""
    return [command.replace("\\|", "|") for command in IN_TABLE.findall(page.read_text(encoding="utf-8"))]


def cells(notebook: Path) -> list[Block]:
    """The cells of a notebook that hold code. line: the number of the cell."""
    found = []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"], 1):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            commands = text.removeprefix("%%sh\n")
            found.append(Block("sh" if commands != text else "python", commands, number))
    return found


def given(page: Path) -> list[str]:
    """What the folder of a page holds at first."""
    marks = MARK.findall(page.read_text(encoding="utf-8"))
    return [name for kind, names in marks if kind == "given" for name in names.split()]


def dyadlm_commands(block: Block) -> Iterator[list[str]]:
    """What stands behind `dyadlm`, of every command of a block."""
    for line in logical_lines(block.text):
        for stage, _ in stages(line):
            if stage[:1] == ["dyadlm"]:
                yield stage[1:]


def logical_lines(text: str) -> list[str]:
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def stages(line: str) -> list[tuple[list[str], str | None]]:
    """The commands of a pipe, and the file that each writes to, if any."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|>")
    reader.whitespace_split = True
    found: list[tuple[list[str], str | None]] = [([], None)]
    for word in reader:
        if word == "|":
            found.append(([], None))
        elif word == ">":
            found[-1] = (found[-1][0], reader.get_token())
        else:
            found[-1][0].extend(sorted(glob.glob(word)) or [word] if "*" in word else [word])
    return found


def smaller(arguments: list[str]) -> list[str]:
    """The arguments of dyadlm, for a test: less work, and no corpus from elsewhere."""
    verb = arguments[0]
    arguments = ["shakespeare.txt" if word == "shakespeare" else word for word in arguments]
    arguments = [word for word in arguments if not word.startswith("data.canaries=")]
    if verb == "train" and "--resume" not in arguments:
        added = [*TRAINING, *(NARROW if "--preset" in arguments else [])]
        return [*arguments, "--set", *added]
    if verb == "diagnose" and not {"--probe", "--list"} & set(arguments):
        return [*arguments, "--probe", "octave" if "--over-time" in arguments else "leak"]
    return [*arguments, *LESS.get(verb, [])]


class Runner:
    """Runs the blocks of one page in the current folder. output: of the last block; outputs: of each command."""

    def __init__(self, capture):
        self.capture = capture
        self.names: dict = {"__name__": "example"}

    def run(self, block: Block) -> str:
        """What a block prints. Raises AssertionError where a command ends otherwise than it should."""
        if block.language == "python":
            text = re.sub(r"(max_steps ?= ?)\d+", r"\g<1>2", block.text)
            text = re.sub(r"(max_new_tokens ?= ?)\d+", r"\g<1>8", text).replace('"shakespeare"', '"shakespeare.txt"')
            exec(compile("\n" * block.line + text, "page", "exec"), self.names)
            return self.capture.readouterr().out
        expected = int(block.marks.get("exit code", 0))
        if "dyadlm " not in block.text:
            code, out = self._shell(block.text, b"")
            assert code == expected, block.text
            return out.decode()
        out = b""
        for line in logical_lines(block.text):
            content = b""
            for words, target in stages(line):
                if words[0] == "dyadlm":
                    code, content = self._dyadlm(words[1:], content)
                else:
                    code, content = self._shell(shlex.join(words), content)
                assert code == (expected if words[0] == "dyadlm" else 0), (line, code, content.decode())
                if target:
                    Path(target).write_bytes(content)
            out += content
        return out.decode()

    def _shell(self, command: str, content: bytes) -> tuple[int, bytes]:
        command = re.sub(r"\btail -[fF]\b", "cat", command)
        done = subprocess.run(["sh", "-ec", command], input=content, capture_output=True, timeout=60)
        return done.returncode, done.stdout + (done.stderr if done.returncode else b"")

    def _dyadlm(self, arguments: list[str], content: bytes) -> tuple[int, bytes]:
        endless = "--follow" in arguments
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(content))
        if endless:
            threading.Thread(target=end_when_waiting, daemon=True).start()
        try:
            main(smaller(arguments))
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdin = before
        shown = self.capture.readouterr()
        if endless and code == 128 + signal.SIGTERM:
            code = 0
        return code, (shown.out + (shown.err if code else "")).encode()


def end_when_waiting() -> None:
    """SIGTERM to this process, a second after it began to heed that signal (`dyadlm.cli.stopping`)."""
    until = time.monotonic() + 60
    while signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
