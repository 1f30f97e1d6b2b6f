"""What README and the guide show is true: Python blocks run, commands and their options exist, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli.app import app, spread_lists
from dyadlm.data import byte_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md"]
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def name(page: Path) -> str:
    return page.name


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which `runs/first` is a model."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "slot_layers": [1]}
    DyadForCausalLM(DyadConfig.from_preset("tiny", **small)).save_pretrained(tmp_path / "runs" / "first")
    byte_tokenizer().save_pretrained(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_run_one_after_the_other(page, place, capsys):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    known: dict = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), known)
    assert capsys.readouterr().out.strip()


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page: indented, of dyadlm, with what stands behind `dyadlm`."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:.*\| )?dyadlm (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "recall.md", ROOT / "docs" / "diagnose.md"], ids=name)
def test_commands_and_their_options_exist(page):
    group = typer.main.get_command(app)
    found = commands(page)
    assert found
    for arguments in found:
        command, rest = group, arguments
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        if "--self-test" not in rest and "--list" not in rest:
            command.make_context(arguments[0], spread_lists(rest))  # parses, and refuses what it does not know


def test_a_wrong_option_is_found():
    command = typer.main.get_command(app).commands["generate"]
    with pytest.raises(Exception, match="--promt"):
        command.make_context("generate", ["model", "--promt", "x"])


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"^    .*$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        there = page if not path else page.parent / path
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target
