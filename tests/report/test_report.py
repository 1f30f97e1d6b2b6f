"""Pictures are PNGs of what they were given; wrong input is told."""

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.errors import UserError
from dyadlm.model import DyadConfig, DyadForCausalLM
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
    return DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=3)).eval()


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


@pytest.mark.parametrize("text", ["a", "To be, or not\nto be", "日本語 é", "long " * 60])
def test_the_tower_is_drawn_as_it_speaks(dyad, tmp_path, figures, text):
    draw_tower(dyad, byte_tokenizer(), text, tmp_path / "tower.png")
    with Image.open(tmp_path / "tower.png") as image:
        assert image.format == "PNG"
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        lengths = dyad.model.level_contributions(ids).numpy()
    images = [
        np.asarray(image.get_array()) for part in figures[0].subfigs for axes in part.axes for image in axes.images
    ]
    np.testing.assert_allclose(images[0], lengths.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.stack(images[1:4]), lengths, rtol=1e-5)
    above = figures[0].subfigs[0].axes[0]
    if len(text) < 50:
        assert len(above.get_xticklabels()) == ids.shape[1]
    assert [label.get_text() for label in above.get_yticklabels()][:3] == ["1", "2", "4"]


def test_what_has_no_tower_is_told(dyad, tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UserError, match="no tower"):
        draw_tower(llama, byte_tokenizer(), "text", tmp_path / "tower.png")
    for text in ("", "x" * 513):
        with pytest.raises(UserError, match="1 to 512 tokens"):
            draw_tower(dyad, byte_tokenizer(), text, tmp_path / "tower.png")
    assert not any(tmp_path.iterdir())


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
    draw_tower(dyad, byte_tokenizer(), "text", tmp_path / "tower.png")
    assert dict(matplotlib.pyplot.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []


def test_a_sample_cannot_close_its_fence():
    assert _fenced("a ``` b ```` c").startswith("`````text\n")
    assert _fenced("plain") == "```text\nplain\n```"
