"""No table cuts what it says, on a terminal of 60 columns or of 200."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from dyadlm.cli import main, recall
from dyadlm.console import print_table

SENTENCE = "The loss falls by 0.146 bits per token from position 50 to position 500, and then it rises."
TITLES = ("probe", "model", "headline", "value", "95 % interval", "reading")
ROWS = [
    ("position", "a-model-of-some-name", "far_minus_near", "-0.1461", "-0.5398 to 0.1854", SENTENCE),
    ("leak", "another", "largest_change", "0", "", Text(SENTENCE, "green")),
]


def printed(width: int, titles=TITLES, rows=ROWS, right=("value",), terminal=True) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, no_color=True, highlight=False, markup=False)
    print_table(titles, rows, right, console)
    plain = Text.from_ansi(file.getvalue()).plain
    return [line.rstrip() for line in plain.splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_nothing_is_cut_at_any_width(width):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    words = " ".join(lines).split()
    for row in ROWS:
        for word in " ".join(map(str, row)).split():
            assert words.count(word) >= " ".join(map(str, row)).split().count(word), word


def test_a_wide_terminal_shows_rows_and_a_narrow_one_blocks():
    assert printed(200)[0].split()[:3] == ["probe", "model", "headline"]
    narrow = printed(60)
    assert narrow[0] == "position"
    assert narrow[1].split() == ["model", "a-model-of-some-name"]
    assert not any(line.startswith("probe") for line in narrow)


def test_empty_cells_have_no_line_in_a_block():
    lines = printed(60)
    assert not any("interval" in line for line in lines[lines.index("leak") :])


def test_a_file_gets_rows_whatever_their_width():
    titles = ["measure", *(f"layer {number}" for number in range(40))]
    rows = [["segment length", *["0.123"] * 40]]
    lines = printed(60, titles, rows, right=titles[1:], terminal=False)
    assert len(lines) == 2
    assert lines[1].count("0.123") == 40


def test_square_brackets_are_no_markup():
    assert "[/red] [bold]" in printed(60, ("a", "b"), [("x", "[/red] [bold]")], ())[1]


@pytest.mark.parametrize("width", [60, 80])
def test_recall_keeps_its_accuracies_on_a_narrow_terminal(width, monkeypatch, capsys):
    part = {"accuracy": 0.9961, "interval": [0.99, 0.998], "chance": 1 / 64}
    result = {
        "parts": {"length=512,pairs=64,vocabulary=8192": part, "length=1024,pairs=128,vocabulary=8192": part},
        "state_numbers": {"256": 100, "512": 131_072}, "milliseconds_per_step": 123.0, "steps": 12_000,
        "stopped": "time",
    }  # fmt: skip
    from dyadlm.recall import Cell

    cell = Cell("llama", 1e-3, 0, {"hidden_size": 128, "num_hidden_layers": 4})
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    recall.show([cell], {cell.name: result})
    lines = Text.from_ansi(capsys.readouterr().out).plain.splitlines()
    shown = "".join(lines)
    assert max(len(line.rstrip()) for line in lines) <= width
    assert shown.count("0.9961") == 2
    for figure in ("0.990–0.998", "0.001", "131,072 (grows)", "12,000", "time", "chance 0.0156"):
        assert figure in shown


@pytest.mark.parametrize("command", [("data", "list"), ("diagnose", "--list")])
def test_lists_are_whole_on_a_narrow_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(list(command))
    lines = Text.from_ansi(capsys.readouterr().out).plain.splitlines()
    assert len(lines) > 3
    assert max(len(line.rstrip()) for line in lines) <= 60
    assert "…" not in "".join(lines)


def test_a_long_training_says_how_far_it_is_without_a_terminal(monkeypatch, capsys):
    now = iter([0.0, 10.0, 61.0, 61.0, 70.0, 130.0, 130.0])
    monkeypatch.setattr(recall.time, "monotonic", lambda: next(now))
    with recall._bar("[1/1] tiny") as progress:
        for done in (0.1, 0.5, 0.6, 0.9):
            progress(done, "some steps")
    assert capsys.readouterr().err.splitlines() == ["[1/1] tiny: 50%, some steps", "[1/1] tiny: 90%, some steps"]
