"""Generation writes what Hugging Face writes, from any state, in whole characters."""

import io
import math
import os
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dyadlm.data.encoding import encode_bytes
from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.engine import bridge
from dyadlm.errors import RunFailed, UserError
from dyadlm.evaluate import evaluate
from dyadlm.generate import Listener, Sampling, Session, generate_text, lines, load_model, torch_reader
from dyadlm.generate.decoding import IncrementalDecoder
from dyadlm.model import DyadConfig, DyadForCausalLM

PROMPT = "To be, or not to be"


def make(kind: str):
    torch.manual_seed(1)
    if kind == "dyadlm":
        config = DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, max_position_embeddings=16)
        model = DyadForCausalLM(config)
    else:
        config = LlamaConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=257, eos_token_id=258, pad_token_id=256,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)  # as if trained: new blocks say nothing, and all choices would be alike
    return model.eval()


@pytest.fixture(params=["dyadlm", "llama"])
def model(request):
    return make(request.param)


@pytest.fixture
def dyad():
    return make("dyadlm")


def hugging_face(model, **options) -> str:
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def write_ascii(model) -> None:
    """Let greedy text have as many characters as tokens."""
    with torch.no_grad():
        model.lm_head.weight[128:] = 0.0


def write(model, prompt=PROMPT, **options) -> str:
    return "".join(generate_text(model, byte_tokenizer(), prompt, **options))


def test_greedy_is_hugging_face_greedy(model):
    text = write(model, max_new_tokens=40, sampling=Sampling(temperature=0.0))
    assert text == hugging_face(model, max_new_tokens=40, do_sample=False)
    assert len(set(text)) > 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 20, 1.0), (1.1, 9, 0.8)]
)
def test_sampling_is_hugging_face_sampling(model, temperature, top_k, top_p):
    for seed in (0, 7):
        torch.manual_seed(seed)
        expected = hugging_face(
            model, max_new_tokens=30, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p
        )
        sampling = Sampling(temperature, top_k, top_p, seed)
        assert write(model, max_new_tokens=30, sampling=sampling) == expected


def test_seed_decides(model):
    texts = [write(model, max_new_tokens=30, sampling=Sampling(seed=seed)) for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_stop_strings_end_the_text(model):
    write_ascii(model)
    whole = write(model, max_new_tokens=60, sampling=Sampling(temperature=0.0))
    stop = whole[9:11]
    expected = whole[: whole.index(stop) + len(stop)]
    text = write(model, max_new_tokens=60, sampling=Sampling(temperature=0.0), stop=["never occurs", stop])
    assert text == expected
    assert text == hugging_face(model, max_new_tokens=60, do_sample=False, stop_strings=["never occurs", stop])


def test_end_of_text_ends(model):
    with torch.no_grad():
        model.lm_head.weight[258] = 100.0 * torch.randn(32)
    session = Session(model, byte_tokenizer())
    session.read_prompt(PROMPT)
    text = "".join(session.write(200, Sampling(seed=0)))
    assert len(text) < 200
    assert "<|end|>" not in text


def test_saved_state_continues_as_the_whole_text_would(dyad, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    greedy = Sampling(temperature=0.0)
    write_ascii(dyad)
    written = write(dyad, max_new_tokens=25, sampling=greedy, state_out=first)
    assert len(written.encode()) == 25
    on = " and then"
    resumed = write(dyad, on, max_new_tokens=25, sampling=greedy, state_in=first, state_out=second)
    assert resumed == write(dyad, PROMPT + written + on, max_new_tokens=25, sampling=greedy)
    # The same file may be carried along.
    write(dyad, on, max_new_tokens=25, sampling=greedy, state_in=first, state_out=first)
    torch.testing.assert_close(load_file(first), load_file(second), rtol=0, atol=0)


def test_state_has_constant_size(dyad, tmp_path):
    sizes = set()
    for length in (1, 700, 3000):
        session = Session(dyad, byte_tokenizer())
        session.read(np.arange(length) % 200)
        session.save(tmp_path / "state.safetensors")
        sizes.add(session.state.state_bytes())
    assert len(sizes) == 1


def test_states_that_do_not_fit_are_refused(dyad, tmp_path):
    path = tmp_path / "state"
    write(dyad, max_new_tokens=3, state_out=path)
    before = path.read_bytes()
    wider = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=48, num_hidden_layers=2))
    with pytest.raises(UserError, match="another shape"):
        write(wider, state_in=path)
    with pytest.raises(UserError, match="already exists"):
        write(dyad, state_out=path)
    with pytest.raises(UserError, match="no state that can be saved"):
        write(make("llama"), state_in=path)
    with pytest.raises(UserError, match="no state that can be saved"):
        write(make("llama"), state_out=tmp_path / "new")
    with pytest.raises(UserError, match="no state file"):
        write(dyad, state_in=tmp_path / "none")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_requests_are_told(dyad, tmp_path):
    with pytest.raises(UserError, match="prompt is empty"):
        write(dyad, "")
    for options in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match="not"):
            Sampling(**options)
    with pytest.raises(UserError, match="at least 1 new token"):
        write(dyad, max_new_tokens=0, state_out=tmp_path / "state")
    with pytest.raises(UserError, match="stop string"):
        write(dyad, stop=[""])
    with pytest.raises(UserError, match="nothing to continue"):
        next(Session(dyad, byte_tokenizer()).write(1, Sampling()))
    assert not any(tmp_path.iterdir())


def test_a_diverged_model_fails(dyad):
    with torch.no_grad():
        dyad.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match="not numbers"):
        write(dyad)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 text", "👩‍🚀🚀", "e\u0301", ""])
def test_decoder_shows_whole_characters_only(text):
    decoder = IncrementalDecoder(byte_tokenizer())
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert decoder.finish() == ""
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("content", [b"a\xff\xfe\xfd\xfc\xfb\xc3\xa9z\xe2\x82", b"\xf0\x9f\x92a\xe2\x82\xe2\x82\xac"])
def test_decoder_replaces_what_is_no_text_as_a_whole_decoding_does(content):
    decoder = IncrementalDecoder(byte_tokenizer())
    text = "".join(map(decoder.push, content)) + decoder.finish()
    assert text == byte_tokenizer().decode(list(content)) == content.decode(errors="replace")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As the tokenizers of Llama 2, Mistral and Gemma: what is not in the vocabulary becomes bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258, "▁a": 259}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", ["a é b", "a 日 b", "a 🙂 b", "日本🙂🙂é", "a", "👩‍🚀 a a b"])
def test_decoder_of_a_tokenizer_that_falls_back_to_bytes(text):
    tokenizer = with_byte_fallback()
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + decoder.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_decoder_begins_within_a_run_of_bytes():
    """Without the token of a word's beginning before them, as where a continuation begins; and again after the end."""
    decoder, text = IncrementalDecoder(with_byte_fallback()), "日本é"
    for _ in range(2):
        pieces = [decoder.push(byte) for byte in text.encode()]
        assert "".join(pieces) + decoder.finish() == text
        assert all("\ufffd" not in piece for piece in pieces)


def test_decoder_leaves_spaces_before_stops():
    """Of a tokenizer of words, whose text transformers would clean up."""
    words = {"Well": 0, ",": 1, "so": 2, ".": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=".")))
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.push, words.values())) + decoder.finish() == "Well , so ."
    assert tokenizer.decode(list(words.values()), clean_up_tokenization_spaces=True) == "Well, so."


def test_decoder_remembers_little_of_endless_noise():
    decoder = IncrementalDecoder(byte_tokenizer())
    shown, held = "", []
    for _ in range(1000):
        shown += decoder.push(255)
        held.append(len(decoder._tokens))
    assert shown + decoder.finish() == "\ufffd" * 1000
    assert max(held) == 64
    assert len(decoder._tokens) == 0


def test_listening_gives_the_loss_of_evaluation(model):
    text = "First line, é.\n\nAnd a second one, without an end"
    listener = Listener(Session(model, byte_tokenizer()), byte_tokenizer(), prefix_token=257)
    told = [surprise for line in lines(io.BytesIO(text.encode())) for surprise in listener.hear(line)]
    stream = evaluate(model, TokenStream.from_tokens(encode_bytes(text.encode())), byte_tokenizer(), mode="stream")
    assert len(told) == stream.tokens
    assert told[-1].mean_nats == pytest.approx(stream.nats_per_token, abs=1e-4)
    assert told[-1].bits_per_byte == pytest.approx(stream.bits_per_byte, abs=1e-4)
    assert told[-1].mean_nats == pytest.approx(math.log(2) * math.fsum(s.bits for s in told) / len(told))
    assert [s.position for s in told] == list(range(len(told)))
    assert [s.token for s in told] == list(text.encode())


def test_listening_takes_any_bytes_under_the_byte_tokenizer(dyad):
    listener = Listener(Session(dyad, byte_tokenizer()), byte_tokenizer(), prefix_token=257)
    assert [surprise.token for surprise in listener.hear(b"\xff\x00\x80")] == [255, 0, 128]


def test_long_reads_equal_short_ones(dyad):
    tokens = encode_bytes(bytes(np.random.default_rng(0).integers(97, 123, 1500, dtype=np.uint8)))
    whole, pieces = Session(dyad, byte_tokenizer()), Session(dyad, byte_tokenizer())
    nats = whole.read(tokens)
    assert np.isnan(nats[0])
    np.testing.assert_allclose(
        nats[1:],
        np.concatenate([pieces.read(part) for part in np.split(tokens, [1, 700, 701])])[1:],
        atol=1e-3,
    )


def test_lines_come_as_they_are_written():
    reading, writing = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reading:
        read = lines(reading)
        writing.write(b"one\n")
        writing.flush()
        assert next(read) == b"one\n"  # while the writer is still at work
        ender = threading.Thread(target=lambda: (writing.write(b"two"), writing.close()))
        ender.start()
        assert list(read) == [b"two"]
        ender.join()


def test_lines_without_end_stay_bounded_and_whole():
    content = ("€" * 5000 + "👩" * 3000).encode() + b"\xe2\x82"
    parts = list(lines(io.BytesIO(content)))
    assert b"".join(parts) == content
    assert max(map(len, parts)) <= 4096 + 3
    assert all(part.decode() for part in parts[:-1])
    assert b"".join(lines(io.BytesIO(b"\xff" * 9000))) == b"\xff" * 9000


@pytest.mark.parametrize("character", ["a", "\u0080", "߿", "ࠀ", "€", "\uffff", "\U00010000", "👩"])
def test_long_lines_are_cut_as_late_as_characters_allow(character):
    """The first and the last characters of each width, wherever the limit falls in them."""
    width = len(character.encode())
    for before in range(4):
        content = ("-" * before + character * 5000).encode()
        first, *rest = lines(io.BytesIO(content))
        assert len(first) == 4096 - (4096 - before) % width
        assert b"".join([first, *rest]) == content
        assert all(part.decode() for part in rest)


def test_loading_a_saved_model(dyad, tmp_path):
    dyad.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu", dtype="float32")
    assert not model.training
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    torch.testing.assert_close(model.state_dict(), dyad.state_dict())
    assert load_model(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_what_is_no_model_is_told(dyad, tmp_path):
    folder = tmp_path / "model"
    dyad.save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer"):
        load_model(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="no device 'nonsense'"):
        load_model(folder, device="nonsense")
    with pytest.raises(UserError, match="Unknown dtype"):
        load_model(folder, dtype="int8")
    with pytest.raises(UserError, match="is no model folder"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="There is no model"):
        load_model(tmp_path / "missing")
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not finished.*--resume.*checkpoint-20"):
        load_model(tmp_path / "run")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match="lack"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(dyad.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(folder)


def test_weights_changed_between_two_continuations_are_seen(dyad, monkeypatch):
    """The engine holds a copy of the weights; each continuation looks whether they are still the same."""
    write_ascii(dyad)
    assert bridge.decoder_of(dyad) is not None
    decoders = []
    found = bridge.decoder_of
    monkeypatch.setattr(torch_reader, "decoder_of", lambda model: decoders.append(1) or found(model))
    fast, slow = Session(dyad, byte_tokenizer()), Session(dyad, byte_tokenizer())
    told = []
    for changed in (False, True):
        for session in (fast, slow):
            if session is slow:
                monkeypatch.setattr(bridge, "refusal", lambda model: "the test says so")
            if not changed:  # the second continuation follows the first at once
                session.read_prompt(PROMPT)
            told.append(list(session._next_tokens(12, Sampling(temperature=0.0))))
            monkeypatch.undo()
            monkeypatch.setattr(torch_reader, "decoder_of", lambda model: decoders.append(1) or found(model))
        if not changed:
            with torch.no_grad():
                dyad.model.norm.weight.copy_(dyad.model.norm.weight.flip(0) * 3)
    assert min(map(len, told)) > 3
    assert told[0] == told[1]
    assert told[2] == told[3]
    assert told[0] != told[2]
    assert len(decoders) == 4  # once for each continuation


def test_an_end_of_text_is_not_read_into_the_state(dyad):
    """What ends a text is no part of it: the next prompt continues the text itself."""
    session = Session(dyad, byte_tokenizer())
    session.read_prompt("To be")
    session.end_tokens = frozenset(range(259))
    assert list(session.write(5, Sampling(0.0))) == []
    assert session.state.position.tolist() == [5]
