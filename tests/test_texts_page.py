"""docs/texts.md is the page of its JSON file, and the figures there are those of the texts."""

import json
from pathlib import Path

import numpy as np

from dyadlm.diagnose.probes.loop import loop_onset, repeated_fours

ROOT = Path(__file__).parent.parent


def test_the_page_and_its_figures_are_those_of_the_texts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import texts

    found = json.loads((ROOT / "benchmarks/results/texts.json").read_text())
    assert [each["prompt"] for each in found["texts"]] == [prompt for kind in texts.PROMPTS.values() for prompt in kind]
    for said in (each[name] for each in found["texts"] for name in texts.DECODING):
        tokens = np.frombuffer(said["text"].encode(), np.uint8)
        assert (said["seq_rep_4"], said["onset"]) == (round(repeated_fours(tokens), 4), loop_onset(tokens))
    page = texts.page(found["texts"], found["circumstances"]["versions"]["dyadlm"])
    assert page == (ROOT / "docs/texts.md").read_text()
