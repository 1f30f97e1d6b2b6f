"""How far a preparation is: what is counted, and how it is shown."""

import io

import pytest
from rich.console import Console

from dyadlm.data import Passage, Source, byte_tokenizer, prepare
from dyadlm.data.progress import preparation_progress

DOCUMENTS, SIZE = 30, 190


def passages():
    for number in range(DOCUMENTS):
        yield Passage(f"text {number}", b"to be or not to be\n" * 10)


def test_all_text_and_all_tokens_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("dyadlm.data.preparation.WORK_BYTES", 1000)
    told = []
    source = Source("made up", "CC0", "1", {"train": passages})
    manifest = prepare([source], tmp_path / "out", byte_tokenizer(), progress=lambda *told_: told.append(told_))
    size = DOCUMENTS * SIZE
    assert told[0] == ("measuring", SIZE, None, 0)
    measuring = [one for one in told if one[0] == "measuring"]
    assert measuring[-1] == ("measuring", size, None, 0)
    tokenising = told[len(measuring) :]
    assert {(what, total) for what, _, total, _ in tokenising} == {("tokenising", size)}
    assert tokenising == sorted(tokenising)
    assert tokenising[-1][1] == size
    ends = sum(split.documents for split in manifest.splits.values())
    assert tokenising[-1][3] == sum(split.tokens for split in manifest.splits.values()) - ends


def test_text_with_splits_of_its_own_has_no_known_size(tmp_path):
    told = []
    source = Source("made up", "CC0", "1", {"train": passages, "validation": passages})
    prepare([source], tmp_path / "out", byte_tokenizer(), progress=lambda *told_: told.append(told_))
    assert {(what, total) for what, _, total, _ in told} == {("tokenising", None)}
    assert told[-1][1] == 2 * DOCUMENTS * SIZE


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100, highlight=False, color_system=None)
    with preparation_progress(console) as progress:
        assert not shown.getvalue()  # before there is anything
        progress("tokenising", 1_000_000, 4_000_000, 7)
        if not terminal:
            assert not shown.getvalue()  # before a minute has passed
        monkeypatch.setattr("dyadlm.data.progress.SECONDS_A_LINE", 0.0)
        progress("measuring", 2_000_000, None, 0)
        progress("tokenising", 3_000_000, 4_000_000, 1234)
    if terminal:
        assert "tokenising" in shown.getvalue()
        assert "3.0/4.0 MB 1,234 tokens" in shown.getvalue()
    else:
        assert shown.getvalue() == "measuring: 2.0 MB, 0 tokens\ntokenising: 3.0 MB of 4.0 MB (75%), 1,234 tokens\n"
