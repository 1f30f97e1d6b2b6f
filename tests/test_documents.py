"""The links of the documents lead somewhere, and the pages made from the code are those of the code."""

import html
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from dyadlm import DyadConfig
from dyadlm.cli.app import app
from dyadlm.train.settings import NAMESPACES

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


def command_line_page() -> str:
    """docs/cli.md, made of the commands and their help."""
    lines = [
        "# Command line",
        "",
        "All commands with their arguments and options. `dyadlm COMMAND --help` prints the same. An option whose",
        "value ends with `...` takes several: `--data a.txt b.txt`. The exit code is 0 when all was done, 1 when the",
        "command ran and failed or found a fault, and 2 when the request was wrong. This page is made from the code;",
        "`tests/test_documents.py` says when it is out of date.",
        "",
    ]
    for path, function in commands_of(app, "dyadlm"):
        arguments, options = [], []
        for name, hint in get_type_hints(function, include_extras=True).items():
            if name == "return":
                continue
            kind, info = hint.__origin__, hint.__metadata__[0]
            default = inspect.signature(function).parameters[name].default
            if isinstance(info, typer.models.ArgumentInfo):
                arguments.append(info.metavar or name.upper())
                shown = arguments[-1]
            else:
                # In Annotated the first name of an option stands where a default might.
                names = [each for each in (info.default, *(info.param_decls or ())) if str(each).startswith("-")]
                names = names or ["--" + name.replace("_", "-")]
                shown = " ".join([", ".join(names), value_of(kind, info)]).strip()
            options.append(f"| {code(shown)} | {default_of(default)} | {cell(info.help)} |")
        usage = " ".join([path, *arguments, "[OPTIONS]"])
        lines += [f"## {path}", "", cell(function.__doc__), "", "```text", usage, "```", ""]
        lines += ["| | default | meaning |", "| --- | --- | --- |", *options, ""] if options else []
    return "\n".join(lines)


def commands_of(typed: typer.Typer, path: str) -> Iterator[tuple[str, Callable]]:
    """The functions of all commands, with the words that call them."""
    for group in typed.registered_groups:
        name = group.name if isinstance(group.name, str) else group.typer_instance.info.name
        yield from commands_of(group.typer_instance, f"{path} {name}")
    for command in typed.registered_commands:
        yield f"{path} {command.name or command.callback.__name__}", command.callback


VALUES = {int: "N", float: "NUMBER", Path: "FILE"}


def value_of(kind: Any, info: Any) -> str:
    """What stands for the value of an option; nothing for a flag."""
    choices = {option for part in [kind, *get_args(kind)] if get_origin(part) is Literal for option in get_args(part)}
    kinds = {kind, *get_args(kind)}
    if bool in kinds:
        return ""
    return (
        info.metavar
        or "|".join(sorted(choices))
        or next((name for each, name in VALUES.items() if each in kinds), "TEXT")
    )


def default_of(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "" if value is None or value is False else code(str(value))


def code(text: str) -> str:
    """Markdown differs on bars in code in tables: an entity is read alike everywhere."""
    return "<code>" + html.escape(text).replace("|", "&#124;") + "</code>" if "|" in text else f"`{text}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


@pytest.mark.parametrize(
    ("page", "made"), [("settings.md", settings_page), ("cli.md", command_line_page)], ids=["settings", "command line"]
)
def test_a_page_that_is_made_from_the_code_is_that_of_the_code(page, made):
    path = ROOT / "docs" / page
    if os.environ.get("DYADLM_WRITE_SETTINGS"):
        path.write_text(made())
    assert path.read_text() == made(), "run the tests once with DYADLM_WRITE_SETTINGS=1"


def test_no_meaning_of_a_setting_is_cut_off():
    """A field's name and a colon within the meaning of another would end it there."""
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert [row for row in rows if len(row.split(" | ")[2].rstrip(" |").split()) < 2] == []


def test_the_page_of_the_command_line_has_every_command_and_option():
    text = (ROOT / "docs" / "cli.md").read_text()
    for verb in ("train", "evaluate", "generate", "stream", "score", "diagnose", "audit", "data prepare"):
        assert f"\n## dyadlm {verb}\n" in text
    for option in ("--calibrate FILE", "--max-new-tokens N", "--over-time"):
        assert f"`{option}`" in text
