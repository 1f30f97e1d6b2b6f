"""The page says what was found, to anyone, without the network; and calls a model best only where that can be told."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dyadlm.diagnose import PROBES, Curve, Diagnosis, ProbeResult, Reading, pool
from dyadlm.errors import UserError
from dyadlm.report import diagnosis as module
from dyadlm.report.comparison import compact, draw_curves, draw_readings, looks, to_svg
from dyadlm.report.diagnosis import described, write_diagnosis
from dyadlm.report.verdicts import compare, number, subjects, told, written

EVIL = "<script>alert('x')</script> & \"$\\frac$\" 語"
VOID = {"meta", "link", "input", "br", "hr", "img", "wbr", "source"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails where tags are not balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len({name for name, _ in attributes}) == len(attributes)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def reading(value: float, half: float | None = 0.1, better="lower", unit="bits/byte") -> Reading:
    return Reading(value, unit, better, None if half is None else (value - half, value + half))


def diagnosis(
    name: str, *results: ProbeResult, vocabulary: int = 256, text: str = "a text", tokens: int = 99, **identity: str
) -> Diagnosis:
    circumstances = {
        "subject": {"name": name, "vocabulary": vocabulary, "context": None, **identity},
        "material": {"name": text, "tokens": tokens},
        "budget": {"tokens": 1.0, "fast": False, "seed": 7},
        "versions": {"dyadlm": "0", "torch": "2"},
    }
    return Diagnosis(name, {result.probe: result for result in results}, circumstances)


def position(value: float, settings: int = 512) -> ProbeResult:
    x, y = [2.0, 8.0, 64.0, 512.0], [5.0, 4.0, 3.0, 2.0 + value]
    return ProbeResult(
        "position",
        {"far_minus_near": reading(value, 0.01), "slope": Reading(-0.1, "bits/token per e-fold", "lower")},
        {"loss by position": Curve(x, y, "position", "bits/token", [v - 0.1 for v in y], [v + 0.1 for v in y], True)},
        f"The loss falls by {-value} & so on.",
        {"length": settings, "nested": {"windows": 8}},
        left_out="what comes <after> 512",
    )


@pytest.fixture(scope="module")
def models() -> list[Diagnosis]:
    trained = Curve([0, 1, 2, 4, 8], [5, 4, 3, math.nan, 2.5], "step", "bits", log_x=True)
    invented = ProbeResult(
        "../my <own> probe", {"a_b": reading(math.nan, None, "profile")}, {"by step": trained}, "Own."
    )
    return [
        diagnosis("ours", position(-0.3), ProbeResult("loop", not_applicable="it cannot <write>"), invented),
        diagnosis(EVIL, position(-0.1, settings=256), ProbeResult("loop", failed="ValueError: no <luck>")),
        diagnosis("ours", position(-0.2)),
    ]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new"
    references = [diagnosis("random & init", position(0.0), text="another text")]
    assert write_diagnosis(models, output, references) == output / "index.html"
    return output


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page(folder / "index.html")


def test_page_needs_no_network_and_runs_no_script(folder, page):
    loaded = [
        (tag, name)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if re.search(r"https?:|//", value or "") and (tag, name) != ("a", "href")
    ]
    assert loaded == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert {"script", "link", "iframe", "img"}.isdisjoint(tag for tag, _ in page.elements)
    source = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", source)
    assert "default-src 'none'" in source


def test_what_looks_otherwise_on_phones_stays_what_it_is(folder, page):
    source = (folder / "index.html").read_text(encoding="utf-8")
    (table,) = re.findall(r'<table class="overview".*?</table>', source, re.DOTALL)
    kinds = {"table": {"table"}, "thead": {"rowgroup"}, "tbody": {"rowgroup"}, "tr": {"row"}, "td": {"cell"}}
    kinds["th"] = {"columnheader", "rowheader"}
    for tag, roles in kinds.items():
        opened = re.findall(rf"<{tag}\b[^>]*>", table)
        assert opened
        assert {*re.findall(r'role="(\w+)"', " ".join(opened))} == roles
        assert all("role=" in each for each in opened)
    assert "thead th:first-child { display: none" not in source


def test_colours_are_one_choice_with_a_name(page):
    assert [each["role"] for each in page.all("fieldset")] == ["radiogroup"]
    assert "Colours of this page auto light dark" in page.words


def test_nothing_glides_for_who_wants_no_motion(folder):
    source = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"[^\n]*scroll-behavior[^\n]*", source) == [
        "@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }"
    ]


def test_what_comes_from_outside_is_text(page):
    for shown in (EVIL, "it cannot <write>", "ValueError: no <luck>", "what comes <after> 512", "../my <own> probe"):
        assert shown in page.words


def test_page_can_be_read_by_anyone(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("title")) == 1
    assert all("scope" in head for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("svg")) == len(page.all("figcaption")) > 0
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    within = [
        value[1:]
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name == "href" and value and value.startswith("#")
    ]
    assert within
    assert set(within) <= set(ids)


def test_every_picture_stands_beside_the_page_as_png(folder, page):
    linked = {link["href"] for link in page.all("a") if (link["href"] or "").endswith(".png")}
    written_files = {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    assert linked == written_files
    assert len(linked) == len(page.all("svg")) == 3
    with Image.open(folder / "figures" / "position-loss-by-position.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_everything_that_was_found_is_said(page):
    for shown in (
        "Does more past help?",
        "The loss falls by 0.3 & so on.",
        "Not applicable: it cannot <write>.",
        "Failed: ValueError: no <luck>",
        "Left out: what comes <after> 512.",
        "−0.310 to −0.290",  # the interval
        "ours (2)",  # the same name twice
        "For reference ● random & init other text or budget",
        "Not asked alike. The text or the budget of random & init differs",
        "+ a predictor that counts, V = 64 −0.278 ± 0.03",  # the known answer
        "Definition L(t) = the mean surprise",
        "Published seq_rep_4_of_100 = 0.442",
        "nested windows 8",  # settings that all have
        "length ● ours : 512",  # and such as they do not
        "not a number",
        "seed 7",
    ):
        assert shown in page.words
    assert page.words.count("other text or budget") == 1


def test_what_others_found_stands_beside_the_results(page):
    assert page.words.count("Found elsewhere") == 1  # of the position in a text nobody else made a claim
    _, beside = page.words.split("Failed: ValueError: no <luck> ▲ ours (2) Not asked. ")
    found = "Found elsewhere: that models repeat short phrases before they write coherent text is supported"
    assert beside.startswith(f"{found} ( arXiv 2308.15419 ). What is measured")


def test_one_model_is_best_and_no_reference(page):
    cells = re.findall(r"best (−?[\d.]+)", page.words.split("At a glance")[1])
    assert cells == ["−0.300", "−0.300"]  # at a glance, and in its own table


def test_colours_follow_the_page(folder):
    source = (folder / "index.html").read_text(encoding="utf-8")
    pictures = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert "var(--model-0)" in pictures
    assert "var(--reference)" in pictures
    assert not re.search(r"(fill|stroke): (#|rgb|black)", pictures)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", source))
    for block in re.findall(r"(?:^| ):root[^{]*\{([^}]*--ink[^}]*)\}", source, flags=re.MULTILINE):
        assert used - {"--models"} <= set(re.findall(r"(--[a-z0-9-]+):", block))


def test_json_repeats_everything(folder, models):
    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((folder / "diagnoses.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored["format"] == "dyadlm-diagnosis-report"
    assert [each["subject"] for each in stored["diagnoses"]] == ["ours", EVIL, "ours"]
    again = ProbeResult.from_dict(stored["diagnoses"][1]["results"]["position"])
    assert again == models[1].results["position"]
    assert stored["diagnoses"][0]["results"]["../my <own> probe"]["readings"]["a_b"]["value"] is None
    assert stored["diagnoses"][0]["circumstances"] == models[0].circumstances
    assert stored["references"][0]["subject"] == "random & init"
    assert stored["controls"]["loop"][0]["expected"]["terminal_loops"] == [1.0, 0.0]


def test_nothing_is_overwritten_and_nothing_half_written(models, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="already exists"):
        write_diagnosis(models, tmp_path / "full")
    with pytest.raises(UserError, match="at least one"):
        write_diagnosis([], tmp_path / "new")
    monkeypatch.setattr(module, "_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_diagnosis(models[2:], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_model_alone_is_not_best(tmp_path):
    lone = diagnosis("alone", position(-0.3), ProbeResult("loop", {"seq_rep_4": reading(0.1)}))
    page = Page(write_diagnosis([lone], tmp_path / "new"))
    assert "best" not in page.words.replace("is better", "")
    assert len(page.all("svg")) == 1  # the curve


def test_a_model_of_several_seeds_says_so(tmp_path):
    seeds = [diagnosis(f"plain-seed{number}", position(-0.3 - number / 100)) for number in range(3)]
    output = tmp_path / "new"
    page = Page(write_diagnosis(pool(seeds), output, seeds=seeds))
    assert "Diagnosis of plain" in page.words
    assert "of plain, the mean of several seeds" in page.words
    assert "subject seeds 2 name plain-seed2" in page.words
    assert "Mean of 3 seeds: far minus near is −0.31 bits/byte" in page.words
    stored = json.loads((output / "diagnoses.json").read_text(encoding="utf-8"))
    assert [each["subject"] for each in stored["seeds"]] == ["plain-seed0", "plain-seed1", "plain-seed2"]


def test_cost_compares_whatever_the_tokens_are_but_on_one_device():
    def cost(value: float) -> ProbeResult:
        return ProbeResult("cost", {"r": reading(value, unit="exponent")})

    def best(*models: Diagnosis) -> int | None:
        return compare(subjects(models, [])[0], "cost", "r").best

    assert best(diagnosis("a", cost(1)), diagnosis("b", cost(2), vocabulary=9)) == 0
    assert best(diagnosis("a", cost(1), device="cpu"), diagnosis("b", cost(2), device="cuda")) is None


def one(value: float, half: float | None = 0.1, left_out: str = "", **others) -> ProbeResult:
    return ProbeResult("loop", {"r": reading(value, half, **others)}, left_out=left_out)


@pytest.mark.parametrize(
    ("models", "best", "word"),
    [
        ([diagnosis("a", one(1)), diagnosis("b", one(2))], 0, "lowest"),
        ([diagnosis("a", one(1, better="higher")), diagnosis("b", one(2, better="higher"))], 1, "highest"),
        ([diagnosis("a", one(1, 0.5)), diagnosis("b", one(2, 0.5))], None, "overlaps that of b"),
        ([diagnosis("a", one(1)), diagnosis("b", one(5)), diagnosis("c", one(5))], 0, "no other’s"),
        ([diagnosis("a", one(5)), diagnosis("b", one(1)), diagnosis("c")], 1, "not the other’s"),
        ([diagnosis("a", one(1, better="profile")), diagnosis("b", one(2, better="profile"))], None, "profile"),
        ([diagnosis("a", one(1, None)), diagnosis("b", one(2))], None, "interval"),
        ([diagnosis("a", one(1)), diagnosis("b", one(math.nan))], None, "interval"),
        ([diagnosis("a", one(1, None)), diagnosis("b", one(1))], None, "same value"),
        ([diagnosis("a", one(1)), diagnosis("b", one(2), text="other")], None, "same text"),
        ([diagnosis("a", one(1)), diagnosis("b", one(2), tokens=98)], None, "same text"),
        ([diagnosis("a", one(1)), diagnosis("b", one(2), vocabulary=9, tokens=98)], 0, "lowest"),
        (
            [diagnosis("a", one(1, unit="bits/token")), diagnosis("b", one(2, unit="bits/token"), vocabulary=9)],
            None,
            "different tokens",
        ),
        ([diagnosis("a", one(1, unit="share")), diagnosis("b", one(2, unit="share"), vocabulary=9)], None, "tokens"),
        ([diagnosis("a", one(1, unit="share")), diagnosis("b", one(2, unit="share"), tokenizer="x")], None, "tokens"),
        ([diagnosis("a", one(1)), diagnosis("b", one(2), tokenizer="x", tokens=98)], 0, "lowest"),
        ([diagnosis("a", one(1)), diagnosis("b", one(2, left_out="half"))], None, "left out"),
        ([diagnosis("a", one(1)), diagnosis("b", one(2, unit="nats"))], None, "same unit"),
        ([diagnosis("a", one(1)), diagnosis("b", ProbeResult("loop", failed="no"))], None, ""),
        ([*pool([diagnosis(f"a-seed{n}", one(n)) for n in (1, 2)]), diagnosis("b", one(99))], None, "means of seeds"),
        (pool([diagnosis(f"{m}-seed{n}", one(9 * (m == "b") + n / 9)) for m in "ab" for n in (1, 2)]), 0, "lowest"),
    ],
)
def test_best_only_where_it_can_be_told(models, best, word):
    verdict = compare(subjects(models, [])[0], "loop", "r")
    assert verdict.best == best
    assert word in verdict.sentence
    assert bool(verdict.sentence) == bool(word)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.0,), "0"), ((1.0,), "1.00"), ((12345.6,), "12,346"), ((1e-9,), "1e−9"), ((-2.5e8,), "−250M"),
        ((math.nan,), "not a number"), ((-math.inf,), "−∞"), ((-0.21345, 0.3, 0.02), "−0.213"),
        ((0.4417, 0.5, 0.0095), "0.4417"), ((224.48226, 224.5, 4e-4), "224.5"), ((-1e-9, 1.0), "0"),
        ((100.0, 130.0, 30.0), "100"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(arguments, expected):
    assert number(*arguments) == expected


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (0.44172, (0.401, 0.483), ("0.442", "0.401 to 0.483")),
        (1.0, (1.0, 1.0), ("1.00", "1.00 to 1.00")),
        (0.0, (0.0, 0.0), ("0", "0 to 0")),
        (0.9999, (0.9999, 0.9999001), ("0.9999", "0.9999 to 0.9999")),
        (2.7e-9, (0.0, 8.1e-9), ("2.7e−9", "0 to 8.1e−9")),
        (math.nan, (math.nan, 1.0), ("not a number", "")),
    ],
)
def test_an_interval_gives_the_digits(value, interval, expected):
    assert written(Reading(value, "", "lower", interval)) == expected


def test_a_curve_is_told_in_one_sentence():
    (look,) = looks(["m"], [])
    curve = Curve([1, 8, 64], [1.0, 0.2, 0.7], "step", "bits")
    assert told([(look, curve)]) == "By step, in bits: m falls from 1.00 at 1 to 0.700 at 64, lowest 0.200 at 8."
    flat = Curve([1, 2], [3.0, 3.01], "step", "bits")
    assert told([(look, flat)]) == "By step, in bits: m begins and ends near 3.01."
    assert told([(look, Curve([1, 2], [0.0, 1e-9], "step", "bits")), (look, curve)]).startswith(
        "By step, in bits: m begins and ends near 0; m falls"
    )
    assert "5 models end between 0.700 and 3.01 bits" in told([(look, curve)] * 4 + [(look, flat)])


def test_names_can_be_told_apart():
    names = [look.name for look in looks(["a", "a", "", "b\n\x00c", "\ud800"], ["a"])]
    assert names == ["a", "a (2)", "unnamed", "b c", "unnamed (2)", "a (3)"]
    shown = looks([str(number) for number in range(9)], ["r", "s"])
    assert len({(look.colour, look.dash) for look in shown}) == len({(*look[1:4],) for look in shown}) == 11
    assert len(looks(["x" * 99], [])[0].short) == 26


@pytest.mark.parametrize(
    ("x", "ticks"),
    [
        ([0, 1, 2, 4, 8, 16], ["0", "1", "2", "4", "8", "16"]),  # a step before the first
        ([2.0**power for power in range(4, 15)], ["16", "64", "256", "1024", "4096", "16.4k"]),
        ([1, 30, 1000], ["1", "10", "100", "1000"]),
        ([3, 30], ["5", "10", "20"]),
    ],
)
def test_logarithmic_axes_have_plain_ticks(x, ticks):
    (look,) = looks(["m"], [])
    figure = draw_curves([(look, Curve(x, [1.0] * len(x), "step", "bits", log_x=True))])
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    shown = [
        label.get_text()
        for label, place in zip(figure.axes[0].get_xticklabels(), figure.axes[0].get_xticks(), strict=True)
        if low <= place <= high
    ]
    assert shown == ticks


@pytest.mark.parametrize(
    ("y", "scale", "ticks"),
    [
        ([0.001, 0.01, 0.1], "log", ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]),
        ([1e3, 1e5, 1e7], "log", ["1000", "10k", "100k", "1M", "10M"]),
        ([3.0, 3.1, 3.2], "log", ["1", "2", "5"]),  # a decade at least: what hardly grows looks so
        ([0.0, 1.0, 2.0], "linear", None),
    ],
)
def test_a_logarithmic_height_has_plain_ticks(y, scale, ticks):
    (look,) = looks(["m"], [])
    figure = draw_curves([(look, Curve([1, 2, 4], y, "tokens", "seconds", log_x=True, log_y=True))])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    if ticks:
        assert [label.get_text() for label in axes.get_yticklabels()] == ticks


def test_curves_keep_their_band_their_colour_and_any_name():
    models = looks([EVIL, "_hidden"], ["r"])
    curves = [(look, Curve([1, 2], [1.0, 2.0], "layer", "bits", [0.9, 1.9], [1.1, 2.1])) for look in models]
    figure = draw_curves(curves)
    axes = figure.axes[0]
    assert len(axes.collections) == 3
    assert [line.get_color() for line in axes.get_lines()] == ["#0072b2", "#d55e00", "#868e9c"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [look.short for look in models]
    svg = to_svg(figure, "key", 'a "title"')
    assert svg == to_svg(figure, "key", 'a "title"')
    assert "_hidden" in svg
    assert "<script" not in svg
    large = draw_curves([(models[0], Curve([1, 2], [1e7, 2e7], "tokens", "bytes"))]).axes[0]
    assert large.yaxis.get_major_formatter()(2e7) == "20M"
    flat = draw_curves([(models[0], Curve([1, 2], [1.0, 1.00001], "layer", "bits"))]).axes[0]
    assert flat.get_ylim() == pytest.approx((0.98, 1.02), abs=1e-3)
    single = draw_curves([(models[0], Curve([3], [1.0], "layer", "bits", [0.9], [1.1]))])
    assert len(single.axes[0].collections) == 1
    assert not single.legends


def test_references_far_away_do_not_flatten_the_models():
    model, reference = looks(["m"], ["r"])

    def drawn(height: float):
        curves = [(model, Curve([1, 2], [2.0, 3.0], "step", "bits")), (reference, Curve([1, 2], [height] * 2, "", ""))]
        figure = draw_curves(curves)
        return figure.axes[0].get_ylim(), [text.get_text() for text in figure.legends[0].get_texts()]

    assert drawn(8.0) == ((1.95, 3.05), ["m", "r (beyond the scale)"])
    limits, names = drawn(3.5)
    assert limits[0] < 2
    assert limits[1] > 3.5
    assert names == ["m", "r"]


def test_readings_are_drawn_with_their_intervals():
    model, reference = looks(["m"], ["r"])
    axes = draw_readings([(model, reading(1.0)), (reference, reading(2.0, None))]).axes[0]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[0.9, 1.1], [1.0], [2.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["m", "r"]


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_every_probe_says_what_it_measures(probe):
    summary, parts = described(probe.__doc__)
    assert summary
    assert {"Definition", "Units", "Direction", "Paper", "Pitfalls"} <= dict(parts).keys()
    assert all(len(text) > 2 for _, text in parts)


def test_papers_and_code_are_marked():
    _, parts = described("It.\n\nDefinition: a `b < c`.\n  More. Units: bits.\nPaper: X 2020 (arXiv 1908.04319).")
    assert dict(parts) == {
        "Definition": "a <code>b &lt; c</code>. More.",
        "Units": "bits.",
        "Paper": 'X 2020 (<a href="https://arxiv.org/abs/1908.04319">arXiv 1908.04319</a>).',
    }


def test_large_counts_are_written_in_few_letters():
    assert [compact(value) for value in (0, 0.5, 9999, 16384, 2e6, -3e9)] == ["0", "0.5", "9999", "16.4k", "2M", "−3G"]
