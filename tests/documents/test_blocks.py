"""Every command and Python block of the documents and the notebook runs, or says in its source why it does not."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer

from dyadlm.cli.app import app, main, spread_lists

from .blocks import NARROW, TRAINING, Block, Runner, blocks, dyadlm_commands, given, in_tables, run_by

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # read by peft, not by us

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in (*TEXTS, NOTEBOOK) if blocks(page) and not run_by(page)]
WORDS = ["the", "king", "queen", "speaks", "of", "love", "and", "war", "in", "a", "dark", "wood"]
ODD = "SOMETHING ELSE!" * 40 + "\n"

# What a block prints, beyond ending as it should: page, a part of the command, a part of the output.
SHOWN = [
    ("anomalies.md", "score runs/log today.log --top", "SOMETHING"),
    ("anomalies.md", "score runs/log today.log --calibration normal.json --alert", "SOMETHING"),
    ("anomalies.md", "--follow app.log --calibration normal.json --alert 0.001 --state-out", "SOMETHING"),
    ("tour.ipynb", "score first lines.txt", "ERROR 2024"),
    ("diagnose.md", "class Bigrams", "leak No leak"),
    ("diagnose.md", "class Bigrams", "bytes Every byte is a token"),
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words(count: int) -> str:
    return " ".join(np.random.default_rng(count).choice(WORDS, count)) + ".\n"


FILES = {
    "notes.txt": words(300),
    "more.txt": words(301),
    "letters.jsonl": '{"text": "the king speaks of love and war in a dark wood"}\n' * 40,
    "shakespeare.txt": words(60) * 80,
    "train.log": words(400),
    "normal.log": words(12) * 1100,
    "today.log": words(12) * 20 + ODD,
    "app.log": words(12) * 20 + ODD,
    "chats.jsonl": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
    * 40,
}
RUNS = ("runs/first", "runs/second", "RUN", "MODEL", "plain-seed0", "plain-seed1", "dyad-seed0", "dyad-seed1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a narrow model, trained for four steps."""
    place = tmp_path_factory.mktemp("trained")
    (place / "text.txt").write_text(words(300))
    with pytest.raises(SystemExit) as ended:
        main([
            "train", "--preset", "tiny", "--data", str(place / "text.txt"), "--output", str(place / "run"),
            "--device", "cpu", "--set", *TRAINING, *NARROW, "train.log_spaced_checkpoints=true",
        ])  # fmt: skip
    assert not ended.value.code
    return place / "run"


def prepare(names: list[str], trained: Path) -> None:
    """What a page takes for given, in the current folder."""
    Path("shakespeare.txt").write_text(FILES["shakespeare.txt"])
    for entry in names:
        if entry in RUNS:
            shutil.copytree(trained, entry)
        else:
            Path(entry).write_text(FILES[entry])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_blocks_of_a_page_run_in_order(page, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(given(page), trained)
    capsys.readouterr()
    runner = Runner(capsys)
    for block in blocks(page):
        if block.missing:
            continue
        shown = runner.run(block)
        for other, command, expected in SHOWN:
            if other == page.name and command in block.text:
                assert expected in shown, block.text


def test_what_is_shown_stands_in_the_pages():
    for other, command, _ in SHOWN:
        assert any(command in block.text for page in PAGES if page.name == other for block in blocks(page)), command


def test_a_page_with_a_test_of_its_own_names_one_that_reads_it():
    for page in TEXTS:
        if place := run_by(page):
            assert page.name in (ROOT / place).read_text(encoding="utf-8"), place


def test_blocks_that_are_not_run_say_why():
    """`pytest -s` lists them."""
    everything = [(page, block) for page in PAGES for block in blocks(page)]
    left_out = [(page, block) for page, block in everything if block.missing]
    for page, block in left_out:
        print(f"{name(page)}:{block.line}: {block.missing}")
        assert re.match(r"(needs|takes|installs|builds|replaces|serves) \w+|.* is not installed$", block.missing)
    print(f"{len(left_out)} of {len(everything)} blocks are not run")
    assert len(left_out) < len(everything) / 4


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_commands_that_are_not_run_have_the_options_that_they_use(page):
    left_out = [block for block in blocks(page) if block.language == "sh" and (block.missing or run_by(page))]
    for block in [*left_out, *(Block("sh", command, 0) for command in in_tables(page))]:
        for arguments in dyadlm_commands(block):
            parse(arguments)


def parse(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if not {"--self-test", "--list"} & set(arguments):
        command.make_context("dyadlm", spread_lists(arguments))  # refuses what it does not know


def test_a_wrong_option_is_found():
    with pytest.raises(Exception, match="--promt"):
        parse(["generate", "model", "--promt", "x"])


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_python_stands_in_fences_that_say_so(page):
    """Else it would not be run."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^    (?:import|from) \w+|^    \w+ = \w+[.(]", prose, re.MULTILINE)


def test_the_notebook_has_its_outputs_and_is_small():
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


# ---- the mechanism itself


def test_commands_in_tables(tmp_path):
    page = tmp_path / "page.md"
    table = (
        "| a | b |\n| --- | --- |\n| `dyadlm x` | 1 |\n| b | `cat a \\| dyadlm y` |\n\n"
        "Prose with `dyadlm z`.\n\n| a |\n| --- |\n| `--data A\\|B` | of `dyadlm score` |\n"
    )
    page.write_text(table)
    assert in_tables(page) == ["dyadlm x", "cat a | dyadlm y"]
    assert not blocks(page)
    page.write_text("<!-- tables: run -->\n\n" + table)
    assert [block.text for block in blocks(page)] == in_tables(page)


def test_blocks_marks_and_pipes(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- given: a.txt -->\n\n```sh\nprintf 'b\\na\\n' | sort > b.txt\n```\n\n<!-- not run: needs a GPU -->\n\n"
        "```python\n1 / 0\n```\n\n    dyadlm --version | tr d D\n\nProse.\n\n    only text\n\n<!-- exit code: 2 -->\n"
        "```sh\ndyadlm verify nothing  # a comment\n```\n\n```python\nn = dict(max_steps=500)\nprint(n)\n```\n"
    )
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert given(page) == ["a.txt"]
    assert [(block.language, block.missing) for block in found] == [
        ("sh", None), ("python", "needs a GPU"), ("sh", None), ("sh", None), ("python", None),
    ]  # fmt: skip
    runner = Runner(capsys)
    assert runner.run(found[0]) == ""
    assert (tmp_path / "b.txt").read_text() == "a\nb\n"
    assert runner.run(found[2]).startswith("DyaDlm ")
    assert "nothing" in runner.run(found[3])
    assert runner.run(found[4]) == "{'max_steps': 2}\n"


@pytest.mark.parametrize("text", ["```sh\nfalse\n```", "```sh\ndyadlm verify nothing\n```", "```python\n1 / 0\n```"])
def test_a_block_that_fails_is_found(text, tmp_path, capsys, monkeypatch):
    (tmp_path / "page.md").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(tmp_path / "page.md")
    with pytest.raises((AssertionError, ZeroDivisionError)):
        Runner(capsys).run(block)
