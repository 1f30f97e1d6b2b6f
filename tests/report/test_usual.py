"""The page says of every figure how to read it and what is usual, and invents no range that was not measured."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from dyadlm.diagnose import PROBES, Diagnosis, ProbeResult, Reading
from dyadlm.report.diagnosis import DIRECTIONS, FAILURE_MODES, write_diagnosis
from dyadlm.report.usual import usual, usual_of_all

ROOT = Path(__file__).resolve().parents[2]


def diagnosis(parameters: int | None, vocabulary: int = 259, **subject) -> Diagnosis:
    results = {
        "loop": ProbeResult("loop", {"seq_rep_4": Reading(0.5, "share", "lower", (0.4, 0.6))}, sentence="It loops."),
        "bounds": ProbeResult("bounds", {"gain": Reading(0.1, "F1", "higher")}, sentence="It has segments."),
    }
    circumstances = {"subject": {"vocabulary": vocabulary, **subject}, "size": {"parameters": parameters}}
    return Diagnosis("mine", results, circumstances)


def words(folder: Path, *diagnoses: Diagnosis) -> str:
    source = write_diagnosis(diagnoses, folder).read_text(encoding="utf-8")
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", source, flags=re.DOTALL).split())


def test_ranges_are_those_of_the_stored_answers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = __import__("usual")
    assert json.loads(module.USUAL.read_text()) == module.ranges()
    del sys.modules["usual"]


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        (diagnosis(1_038_368), ["dyadlm-1M", "llama-1M", "mamba2-1M"]),
        (diagnosis(300_000), ["dyadlm-0.3M"]),
        (diagnosis(4_000_000), ["dyadlm-3M"]),
        (diagnosis(100_000_000), []),
        (diagnosis(None), []),
        (diagnosis(1_038_368, vocabulary=50257), []),
    ],
)
def test_ranges_are_of_models_of_the_same_size_and_tokens(asked, kinds):
    assert [kind.name for kind in usual(asked)] == kinds


def test_a_training_is_set_beside_trainings():
    over_time = diagnosis(1_038_368, last={"vocabulary": 259}, steps=[1, 2])
    assert {kind.over_time for kind in usual(over_time)} == {True}
    assert {kind.over_time for kind in usual(diagnosis(1_038_368))} == {False}


def test_page_shows_the_measured_range_and_says_where_there_is_none(tmp_path):
    low, high = 1.0, 0.0
    for kind in usual(diagnosis(1_038_368)):
        low, high = min(low, kind.ranges["loop"]["seq_rep_4"][0]), max(high, kind.ranges["loop"]["seq_rep_4"][1])
    shown = words(tmp_path / "near", diagnosis(1_038_368))
    assert f"Usual at this size: {low:.2f} to {high:.2f} share." in shown
    assert "1,038,368 parameters" in shown
    far = words(tmp_path / "far", diagnosis(100_000_000))
    assert "Usual at this size" not in far
    assert far.count("No range measured.") == 2


def test_every_probe_says_how_to_read_it_in_one_sentence():
    for name, probe in PROBES.items():
        assert re.fullmatch(r"[A-Z][^.]*(\d\.\d[^.]*)*\.", probe.meaning), name
        assert len(probe.meaning) < 170, name


def test_legend_explains_every_mark_of_the_page(tmp_path):
    shown = words(tmp_path / "page", diagnosis(1_038_368), diagnosis(1_038_368))
    legend = shown[shown.index("What the marks on this page mean") : shown.index("Headline of each probe")]
    for mark in (*DIRECTIONS.values(), "best", "not applicable", "failed", "not asked", "Left out", "usual", "budget"):
        assert mark in legend, mark
    modes = {mode for probe in PROBES.values() for mode in probe.failure_mode.split(", ")}
    assert modes <= FAILURE_MODES.keys()
    for mode, what in FAILURE_MODES.items():
        assert f"{mode} {what}" in legend


def test_probes_and_their_sentences_stand_at_a_glance_and_in_their_section(tmp_path):
    shown = words(tmp_path / "page", diagnosis(1_038_368))
    assert shown.count(PROBES["loop"].meaning) == 2


def test_models_of_several_sizes_have_no_common_range():
    small, large = diagnosis(300_000), diagnosis(3_000_000)
    assert usual_of_all([small, small]) == usual(small)
    assert usual_of_all([small, large]) == []


@pytest.mark.parametrize(
    "circumstances", [{"size": 5}, {"size": {"parameters": "many"}}, {"subject": "x"}, {"subject": {"last": 3}}]
)
def test_odd_circumstances_have_no_range(circumstances):
    odd = diagnosis(1_038_368)
    assert usual(dataclasses.replace(odd, circumstances={**odd.circumstances, **circumstances})) == []
