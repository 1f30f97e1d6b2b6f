"""Training on text that is not prepared: a run that was stopped goes on with the text that follows."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dyadlm import DyadForCausalLM
from dyadlm.cli.evaluate import say_what_was_trained_on
from dyadlm.data import byte_tokenizer
from dyadlm.data.encoding import decode_bytes
from dyadlm.data.streaming import FILE
from dyadlm.diagnose.candidates import load_material
from dyadlm.errors import UserError
from dyadlm.report.summary import write_report
from dyadlm.train import train
from dyadlm.train.checkpoint import MANIFEST_NAME, read_manifest, write_manifest

pytestmark = pytest.mark.slow

STREAMED = ("data.stream=true", "train.schedule=constant", "save_steps=3", "eval_steps=3", "logging_steps=1")


@pytest.fixture
def sources(tmp_path):
    """A folder of JSON lines and one file of text."""
    (tmp_path / "lines").mkdir()
    for name in ("a", "b"):
        texts = [json.dumps({"text": f"{name} {number} " * 30}) for number in range(40)]
        (tmp_path / "lines" / f"{name}.jsonl").write_text("\n".join(texts))
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps({"text": "notes of a day " * 20}) for _ in range(40)))
    return [f"{tmp_path / 'lines'}:3", f"file://{tmp_path}/notes.jsonl"]


def test_a_streamed_run_goes_on_with_the_text_that_follows(tmp_path, small, console, sources):
    whole = train(small(tmp_path / "whole", *STREAMED, "max_steps=6", data=sources), console=console)
    assert whole.validation_loss is not None
    train(small(tmp_path / "parts", *STREAMED, "max_steps=3", data=sources), console=console)
    parts = train(small(tmp_path / "parts", *STREAMED, "max_steps=6", data=sources, resume=True), console=console)
    first, second = (load_file(run.output / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    half = shutil.copytree(tmp_path / "parts", tmp_path / "half") / "checkpoint-6"
    (half / FILE).write_bytes(b"damaged")
    identity = read_manifest(tmp_path / "parts" / "checkpoint-6")["identity"]
    (half / MANIFEST_NAME).unlink()
    write_manifest(half, 6, identity)
    with pytest.raises(UserError, match="checkpoint-6 is damaged"):
        train(small(half.parent, *STREAMED, "max_steps=9", data=sources, resume=True), console=console)
    with pytest.raises(UserError, match="another data"):
        train(small(tmp_path / "parts", *STREAMED, "max_steps=9", data=sources[:1], resume=True), console=console)


@pytest.mark.parametrize("option", ["train.carry_state=true", "data.canaries=4", "dataloader_num_workers=1"])
def test_what_needs_prepared_text_is_refused(tmp_path, small, sources, option):
    with pytest.raises(UserError, match=r"cannot be used with data\.stream"):
        train(small(tmp_path / "run", *STREAMED, option, data=sources))


def test_what_was_held_out_is_what_is_scored_later(tmp_path, small, console, sources, capsys):
    """The last tenth of a source, which is the validation split of prepared text, was trained on."""
    run = train(small(tmp_path / "run", *STREAMED, "max_steps=3", data=sources), console=console)
    model, tokenizer = DyadForCausalLM.from_pretrained(run.output).eval(), byte_tokenizer()
    write_report(run.output, model, tokenizer, tmp_path / "report")
    scored = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert scored["nats_per_token"] == pytest.approx(run.validation_loss, rel=1e-2)
    assert "data.stream" in (tmp_path / "report" / "README.md").read_text()
    material = load_material(str(run.output), SimpleNamespace(tokenizer=tokenizer, vocabulary=259, name="run"), ())
    assert [decode_bytes(stream.tokens(0, 4)) for stream in material.text] == [b"a 0 ", b"note"]
    assert scored["tokens"] == sum(len(stream) for stream in material.text)
    with pytest.raises(UserError, match="no split 'test'"):
        load_material(str(run.output), SimpleNamespace(tokenizer=tokenizer, vocabulary=259, name="run"), (), "test")
    say_what_was_trained_on(str(run.output), {sources[0]: "validation"})
    assert "but for its beginning" in capsys.readouterr().err
