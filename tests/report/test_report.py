"""Pictures are PNGs of what they were given; wrong input is told."""

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.errors import UserError
from dyadlm.evaluate.inspection import read_tower
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.trace import level_contributions
from dyadlm.report import draw_losses, draw_tower, write_report
from dyadlm.report.summary import _fenced


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn, as matplotlib holds them."""
    drawn: list[Figure] = []
    initialise = Figure.__init__

    def remember(self, *args, **options):
        drawn.append(self)
        initialise(self, *args, **options)

    monkeypatch.setattr(Figure, "__init__", remember)
    return drawn


@pytest.fixture
def dyad() -> DyadForCausalLM:
    return DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=3, **PLAIN)).eval()


# Whatever presets have.
PLAIN = {"semantic_levels": [], "selector": "none", "slot_contexts": []}


def metrics(steps: int) -> list[dict]:
    lines: list[dict] = []
    for step in range(10, steps + 1, 10):
        bits = 2.0 + 6.0 / step**0.5
        lines.append({"step": step, "tokens": step * 100, "loss": bits * 0.69, "bits_per_byte": bits})
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": bits * 0.7, "eval_bits_per_byte": bits + 0.1})
    return lines


def test_losses_are_drawn_over_tokens(tmp_path, figures):
    draw_losses(metrics(200), tmp_path / "loss.png", "A run")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert min(image.size) >= 500
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    axes = figures[0].axes[0]
    training, validation = axes.get_lines()
    assert training.get_xdata().tolist() == [step * 100 for step in range(10, 201, 10)]
    assert validation.get_xdata().tolist() == [5000, 10000, 15000, 20000]
    assert validation.get_ydata()[-1] == pytest.approx(2.0 + 6.0 / 200**0.5 + 0.1)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == (
        "tokens seen",
        "bits per byte",
        "A run",
    )


def test_losses_without_validation_and_without_anything(tmp_path):
    draw_losses(metrics(40), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()
    with pytest.raises(UserError, match="no loss to draw"):
        draw_losses([{"step": 1, "eval_loss": 2.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("text", ["a", "To be, or not\nto be", "日本語 é", "\x03\x7f control", "long " * 60])
def test_the_tower_is_drawn_as_it_speaks(dyad, tmp_path, figures, text):
    draw_tower(read_tower(dyad, byte_tokenizer(), text), tmp_path / "tower.png")
    with Image.open(tmp_path / "tower.png") as image:
        assert image.format == "PNG"
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        lengths = level_contributions(dyad, ids).numpy()
    images = [
        np.asarray(image.get_array()) for part in figures[0].subfigs for axes in part.axes for image in axes.images
    ]
    np.testing.assert_allclose(images[0], lengths.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.stack(images[1:4]), lengths, rtol=1e-5)
    above = figures[0].subfigs[0].axes[0]
    if len(text) < 50:
        assert len(above.get_xticklabels()) == ids.shape[1]
    assert [label.get_text() for label in above.get_yticklabels()][:3] == ["1", "2", "4"]


def panels(figure) -> dict[str, Axes]:
    """By title, without the scales of colours."""
    return {axes.get_title(loc="left"): axes for part in figure.subfigs for axes in part.axes if axes.images}


def test_mechanisms_are_drawn_as_they_were_measured(tmp_path, figures):
    torch.manual_seed(0)
    mechanisms = {
        "semantic_levels": ["word", "learned"], "selector": "topk", "selector_heads": 2, "slot_contexts": [1, "word"],
        "slot_entries": 64,
    }  # fmt: skip
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_levels": 4}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **sizes, **mechanisms)).eval()
    reading = read_tower(model, byte_tokenizer(), "a bad dad had a bad ad")
    draw_tower(reading, tmp_path / "tower.png")
    drawn = panels(figures[0])
    contributions, segments, hits, *layers = drawn.values()
    names = ["1", "2", "4", "8", "word", "learned"]
    assert [label.get_text() for label in contributions.get_yticklabels()] == names
    rows = [label.get_text() for label in segments.get_yticklabels()]
    assert rows == ["word", "learned, layer 1", "learned, layer 2", "learned, layer 3"]
    shades = np.asarray(segments.images[0].get_array())
    changes = (shades[:, 1:] != shades[:, :-1]).any(-1)
    seen = reading.behaviour
    begins = torch.cat([seen.segments["word"][:, 0], seen.segments["learned"][:, 0]]).numpy()
    np.testing.assert_array_equal(changes, begins[:, 1:])
    assert [label.get_text() for label in hits.get_yticklabels()] == ["1 token", "the open word"]
    known = np.asarray(hits.images[0].get_array()).sum(-1) < 2.5
    np.testing.assert_array_equal(known, torch.stack([seen.hits["1"][0], seen.hits["word"][0]]).numpy())
    for layer, axes in enumerate(layers[:3]):
        chosen = (np.asarray(axes.images[0].get_array()) < 1).any(-1)  # (K H, T): what is not chosen is white
        expected = (seen.routes[layer, 0] > 0).permute(2, 1, 0).flatten(0, 1).numpy()
        np.testing.assert_array_equal(chosen, expected)
    assert [text.get_text() for text in layers[0].get_legend().get_texts()] == ["head 1", "head 2"]


def test_forecasts_are_drawn_as_they_were_judged(tmp_path, figures):
    torch.manual_seed(0)
    fields = {**PLAIN, "semantic_levels": ["word"], "hidden_size": 32, "num_hidden_layers": 1, "num_levels": 3}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **fields, planner="head")).eval()
    torch.nn.init.normal_(model.model.forecasters.exits[0].weight)
    reading = read_tower(model, byte_tokenizer(), "a bad dad had a bad ad")
    draw_tower(reading, tmp_path / "tower.png")
    (drawn,) = [axes for title, axes in panels(figures[0]).items() if title.startswith("Forecasts")]
    shown = np.ma.filled(np.ma.asarray(drawn.images[0].get_array()), np.nan)
    np.testing.assert_allclose(shown, reading.behaviour.skills().numpy(), rtol=1e-5)
    assert (shown[0, 1:] != 0).all()
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["1", "2", "4", "word"]
    (drawn,) = [axes for title, axes in panels(figures[0]).items() if title.startswith("Probability")]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["proposal", "artist", "engineer"]
    rows = np.ma.filled(np.ma.asarray(drawn.images[0].get_array()), np.nan)
    np.testing.assert_allclose(rows[2], reading.opinions["engineer"].exp().numpy(), rtol=1e-5)


def test_what_cannot_be_measured_is_said(tmp_path, figures):
    fields = {**PLAIN, "slot_contexts": [1], "slot_gate": True, "hidden_size": 32, "num_hidden_layers": 1}
    config = DyadConfig.from_preset("tiny", **fields)
    reading = read_tower(DyadForCausalLM(config).eval(), byte_tokenizer(), "text")
    assert ["depends on more than the tokens" in note for note in reading.notes] == [True]
    draw_tower(reading, tmp_path / "tower.png")
    assert len(panels(figures[0])) == 2  # over all layers, and of the one


def test_what_has_no_tower_is_told(dyad):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UserError, match="no tower"):
        read_tower(llama, byte_tokenizer(), "text")
    for text in ("", "x" * 513):
        with pytest.raises(UserError, match="1 to 512 tokens"):
            read_tower(dyad, byte_tokenizer(), text)


def test_a_report_needs_a_finished_run(dyad, tmp_path):
    with pytest.raises(UserError, match=r"dyadlm\.json"):
        write_report(tmp_path / "run", dyad, byte_tokenizer(), tmp_path / "report")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dyadlm.json").write_text('{"settings": {"data": ["x"]}}')
    with pytest.raises(UserError, match="not finished"):
        write_report(tmp_path / "run", dyad, byte_tokenizer(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_drawing_leaves_no_global_state(dyad, tmp_path):
    before = dict(matplotlib.pyplot.rcParams)
    draw_losses(metrics(50), tmp_path / "loss.png")
    draw_tower(read_tower(dyad, byte_tokenizer(), "text"), tmp_path / "tower.png")
    assert dict(matplotlib.pyplot.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []


def test_a_sample_cannot_close_its_fence():
    assert _fenced("a ``` b ```` c").startswith("`````text\n")
    assert _fenced("plain") == "```text\nplain\n```"
