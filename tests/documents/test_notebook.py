"""The outputs of the notebook are stored as a terminal shows them."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs the extra `docs`")


def test_bars_and_colours_are_gone():
    as_shown = runpy.run_path(str(Path(__file__).parents[2] / "notebooks" / "run.py"))["as_shown"]
    assert as_shown("a\n\x1b[32m1/2\x1b[0m\r\x1b[2K2/2\nb") == "a\n2/2\nb"
    assert as_shown("a\nbar\n\x1b[1A\x1b[2Kdone") == "a\ndone"
    assert as_shown("one\rtwo three") == "two three"
