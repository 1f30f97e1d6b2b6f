"""What README and the guide show is true: Python blocks run, commands and their options exist, links lead somewhere."""

import json
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli.app import app, spread_lists
from dyadlm.data import byte_tokenizer
from dyadlm.train.settings import NAMESPACES

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


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / "docs" / name for name in ("anomalies.md", "diagnose.md", "recall.md"))], ids=name
)
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


def settings_page() -> str:
    """docs/settings.md, made of the docstrings of the records."""
    lines = [
        "# Settings of a training run",
        "",
        "`dyadlm train --set key=value ...` takes these keys, the fields of `transformers.TrainingArguments` by their",
        "names (`max_steps`, `learning_rate`, `per_device_train_batch_size`, ...), and the fields of the model as",
        "`model.FIELD`. A YAML or JSON file of the same keys: `--config FILE`. This page is made from the code;",
        "`tests/test_documents.py` says when it is out of date.",
        "",
    ]
    for space, kind in NAMESPACES.items():
        lines += [f"## {space}", "", "| key | default | meaning |", "| --- | --- | --- |"]
        meanings = meanings_of(kind.__doc__, {entry.name for entry in fields(kind)})
        for entry in fields(kind):
            default = json.dumps(entry.default)
            lines.append(f"| `{space}.{entry.name}` | `{default}` | {meanings[entry.name]} |")
        lines.append("")
    lines += ["## model", "", "| key | default | meaning |", "| --- | --- | --- |"]
    text = DyadConfig.__doc__.partition("Args:")[2].partition("Raises:")[0]
    meanings = meanings_of(text, set(DyadConfig.field_types()))
    for name in meanings:
        default = json.dumps(getattr(DyadConfig, name, None))
        lines.append(f"| `model.{name}` | `{default}` | {meanings[name]} |")
    return "\n".join([*lines, ""])


def meanings_of(docstring: str, known: set[str]) -> dict[str, str]:
    """`name: meaning` and `name, name: meaning` entries of a docstring, of these names; several may share a line."""
    text = " ".join(line.strip() for line in docstring.splitlines())
    name = "|".join(sorted(known, key=len, reverse=True))
    found = re.split(rf"(?:^|(?<=\s))((?:{name})(?:, (?:{name}))*): ", text)
    meanings = {}
    for names, meaning in zip(found[1::2], found[2::2], strict=True):
        for each in names.split(", "):
            meanings[each] = meaning.strip().rstrip(".").replace("|", "\\|")
    return meanings


def test_the_page_of_settings_is_that_of_the_code():
    page = ROOT / "docs" / "settings.md"
    made = settings_page()
    if os.environ.get("DYADLM_WRITE_SETTINGS"):
        page.write_text(made)
    assert page.read_text() == made, "run the tests once with DYADLM_WRITE_SETTINGS=1"
