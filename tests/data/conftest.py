"""Text made up here, a cache of its own for every test, and a small tokenizer of text."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["dyad", "phase", "pyramid", "level", "über", "naïve", "the", "a", "of", "tower", "日本", "speaks"]


def make_text(words: int, seed: int = 0) -> str:
    """Lines of eight words, some with characters of several bytes."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + (".\n" if n % 8 == 7 else " ") for n in range(words))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYADLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def text_tokenizer():
    """A byte-pair tokenizer with merges, trained on `make_text`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([make_text(2000, seed=9)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
