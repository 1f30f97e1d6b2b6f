"""A model with a tokenizer of words: its states and carried states are saved, loaded and gone on with."""

import io

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dyadlm.data import prepare
from dyadlm.generate import Session, load_model, open_session
from dyadlm.memory import ContextMemory
from dyadlm.train import TrainSettings, train

pytestmark = pytest.mark.slow
WORDS = ["<unk>", "</s>", "the", "king", "queen", "speaks", "of", "."]
TEXT = "the king speaks of the queen . the queen speaks of the king .\n" * 60


@pytest.fixture
def data(tmp_path):
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    (tmp_path / "text.txt").write_text(TEXT)
    prepare([tmp_path / "text.txt"], tmp_path / "data", tokenizer)
    return tmp_path / "data"


def settings(data, output, *assignments, resume=False):
    return TrainSettings.create(
        output, preset="tiny", data=[str(data)], resume=resume, device="cpu", dtype="float32",
        assignments=[
            "model.hidden_size=16", "model.num_hidden_layers=1", "data.sequence_length=16", "max_steps=4",
            "per_device_train_batch_size=2", "save_steps=2", "eval_steps=0", *assignments,
        ],
    )  # fmt: skip


@pytest.mark.parametrize("remembers", [False, True])
def test_a_state_goes_on(data, tmp_path, remembers):
    train(settings(data, tmp_path / "run"), console=Console(quiet=True))
    model, tokenizer = load_model(tmp_path / "run", "cpu")

    def memory():
        return ContextMemory() if remembers else None

    ids = tokenizer(TEXT[:200])["input_ids"]
    whole = Session(model, tokenizer, memory()).read(ids)
    first = Session(model, tokenizer, memory())
    first.read(ids[:20])
    first.save(tmp_path / "state")
    second = open_session(model, tokenizer, tmp_path / "state", memory=memory())
    # A memory learns nothing of the first token after loading, which nothing predicts.
    assert second.read(ids[20:])[1] == pytest.approx(whole[21], rel=0.06 if remembers else 1e-3)


def test_a_run_that_carries_its_state_is_resumed(data, tmp_path):
    train(settings(data, tmp_path / "run", "train.carry_state=true"), console=Console(quiet=True))
    shown = Console(file=io.StringIO())
    longer = settings(data, tmp_path / "run", "train.carry_state=true", "max_steps=6", resume=True)
    assert train(longer, console=shown).steps == 6
    assert "Going on from" in shown.file.getvalue()


def test_a_finished_run_whose_weights_are_gone_is_published_again(data, tmp_path):
    train(settings(data, tmp_path / "run"), console=Console(quiet=True))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "run" / name).unlink()
    train(settings(data, tmp_path / "run", resume=True), console=Console(quiet=True))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
