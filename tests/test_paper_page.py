"""docs/paper.md: every module that it names exists and has what it names there, and every command parses."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import typer

from dyadlm.cli.app import app, spread_lists
from dyadlm.diagnose.probes import PROBES
from dyadlm.recall.tasks import TASKS
from dyadlm.train import TrainSettings

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "paper.md").read_text()
PLACES = (ROOT / "src" / "dyadlm", ROOT)
VERDICTS = ("holds", "does not hold", "not tested yet", "built", "cannot be told", "no claim", "by definition")
CODE = re.findall(r"`([^`\n]+)`", PAGE)
INDENTED = re.findall(r"^    ((?:dyadlm|python) .*)$", PAGE, re.MULTILINE)
COMMANDS = list(dict.fromkeys(INDENTED + [text for text in CODE if text.startswith(("dyadlm ", "python "))]))


def rows() -> list[list[str]]:
    """The cells of every table with a verdict."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and line.count(" | ") + line.count(" |") >= 5]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if len(row) == 5 and row[0] not in ("claim", "sentence of the paper", "---")]


def found(path: str) -> Path | None:
    return next((place / path for place in PLACES if (place / path).is_file()), None)


def test_every_module_named_exists_and_has_what_is_named_beside_it():
    named = [text for text in CODE if re.fullmatch(r"[\w/]+\.py", text)]
    assert len(set(named)) > 40
    assert [path for path in named if found(path) is None] == []
    for path, name in re.findall(r"`([\w/]+\.py)` \(`([\w.]+)`\)", PAGE):
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", found(path).read_text()), (path, name)


def test_every_claim_has_a_verdict_and_a_figure_has_its_place():
    assert len(rows()) > 70
    for claim, _, command, measured, verdict in rows():
        assert any(word in verdict for word in VERDICTS) or measured, claim
        assert verdict, claim
        assert command or verdict.startswith(("not tested yet", "no claim")), claim


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("dyadlm ")])
def test_every_command_parses(line, tmp_path):
    verb, *rest = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[verb]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    values = command.make_context(verb, spread_lists(rest)).params
    if verb == "train":  # and its keys and values are known
        told = {"preset": values["preset"], "data": values["data"], "assignments": values["assignments"] or ()}
        TrainSettings.create(tmp_path / "run", **told)
    if verb == "diagnose":
        assert set(values["probe"] or ()) <= set(PROBES)
    if verb == "recall":
        assert values["task"] in TASKS


class Parsed(Exception):
    """Raised where a script has read its options."""


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python ")])
def test_every_benchmark_exists_and_takes_its_options(line, monkeypatch):
    _, script, *rest = shlex.split(line)
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")
