"""The byte tokenizer loses nothing, no text becomes a special token, and bytes are attributed to tokens exactly."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dyadlm.data import TokenStream, byte_tokenizer, decode_bytes, encode_bytes, load_tokenizer, tokenizer_identity
from dyadlm.data.encoding import SPECIAL_TOKENS, ByteTokenizer, TextEncoder
from dyadlm.errors import UserError

TOKENIZER = byte_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<|end|>", "a<|pad|>\r\n <|begin|>", "", " "]
)


def test_ids_are_the_bytes_and_specials_lie_above():
    assert [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id] == [256, 257, 258]
    assert len(TOKENIZER) == 259
    symbols = TOKENIZER.convert_ids_to_tokens(list(range(256)))
    assert len(set(symbols)) == 256
    assert TOKENIZER("aé\n")["input_ids"] == list("aé\n".encode())


@given(TEXTS)
def test_text_survives(text):
    """What spells a special token becomes that token in a prompt, and stays text in data (`TextEncoder`)."""
    ids = TOKENIZER(text)["input_ids"]
    assert ids == ByteTokenizer()(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    plain = ByteTokenizer(split_special_tokens=True)(text)["input_ids"]
    assert bytes(plain) == text.encode()
    assert plain == TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert TextEncoder(TOKENIZER).encode(text.encode())[0].tolist() == plain
    if not any(token in text for token in SPECIAL_TOKENS):
        assert bytes(ids) == text.encode()
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_an_end_that_a_template_or_a_trainer_spells_is_the_end():
    """TRL's SFTTrainer appends `eos_token` to each text; chat templates spell the specials."""
    assert TOKENIZER("hi" + TOKENIZER.eos_token)["input_ids"] == [*b"hi", 258]
    assert TOKENIZER.padding_side == "left"


@given(st.binary())
def test_any_bytes_survive(content):
    ids = encode_bytes(content)
    assert ids.dtype == np.int32
    assert decode_bytes([257, *ids, 258, 256]) == content


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        text = "naïve\n\n  'm 日本"
        assert loaded(text + "<|end|>")["input_ids"] == [*text.encode(), 258]
        assert loaded.padding_side == "left"
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.eos_token_id == 258
        assert tokenizer_identity(loaded) == tokenizer_identity(TOKENIZER)


def test_identity_survives_use_and_tells_tokenizers_apart(text_tokenizer, tmp_path):
    identity = tokenizer_identity(text_tokenizer)
    text_tokenizer(["a", "a b c"], truncation=True, max_length=2)
    assert tokenizer_identity(text_tokenizer) == identity != tokenizer_identity(TOKENIZER)
    text_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_identity(load_tokenizer(str(tmp_path))) == identity


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer 'someone/missing'"):
        load_tokenizer("someone/missing")
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_documents_need_an_end_token(text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    endless = AutoTokenizer.from_pretrained(tmp_path, eos_token=None)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        TextEncoder(endless)


def test_specials_in_text_stay_text(text_tokenizer):
    content = b"dyad <eos> tower"
    ids, _ = TextEncoder(text_tokenizer).encode(content)
    assert text_tokenizer.eos_token_id not in ids
    assert text_tokenizer.decode(ids).encode() == content
    assert 258 not in TextEncoder(TOKENIZER).encode(b"<|end|>")[0]


@given(text=TEXTS)
def test_bytes_of_tokens_add_up(text, text_tokenizer):
    stream = TokenStream.from_text(text, text_tokenizer)
    size = len(stream)
    assert stream.bytes_of(0, size) == len(text.encode())
    assert sum(stream.bytes_of(at, at + 1) for at in range(size)) == len(text.encode())
    assert stream.bytes_of(size - 1, size) == 0  # the end-of-document token


def test_a_file_is_a_tokenizer_too(tmp_path, text_tokenizer):
    text_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer_identity(loaded) == tokenizer_identity(text_tokenizer)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no tokenizer.json"):
        load_tokenizer(str(tmp_path / "other.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    text = json.dumps(content).replace(text_tokenizer.eos_token, "<|other|>")
    (tmp_path / "endless.json").write_text(text)
    with pytest.raises(UserError, match="no token that ends a text"):
        load_tokenizer(str(tmp_path / "endless.json"))
