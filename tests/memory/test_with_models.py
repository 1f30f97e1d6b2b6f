"""The memory around models: sessions in torch and the engine, other architectures, states, scores and commands."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.cli import main
from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.data.encoding import ByteTokenizer
from dyadlm.evaluate import evaluate
from dyadlm.evaluate.scoring import remembered
from dyadlm.generate import EngineModel, Sampling, Session, generate_text, open_session
from dyadlm.memory import ContextMemory, MemoryOptions
from dyadlm.model.loading import load_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_levels": 3, "slot_entries": 64, "level_rank": 8}
TEXT = "pack my box with five dozen liquor jugs. " * 18
OPTIONS = MemoryOptions(lengths=(1, 2, 4), entries=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    DyadForCausalLM(DyadConfig.from_preset("tiny", vocab_size=259, **SIZES)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=257, eos_token_id=258, pad_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["torch", "engine", "llama"])
def model(request, folder, llama):
    return {"torch": lambda: load_weights(folder), "engine": lambda: EngineModel(folder), "llama": lambda: llama}[
        request.param
    ]()


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def test_a_session_mixes_it_in(model):
    ids = ids_of(TEXT)
    alone = Session(model, ByteTokenizer()).read(ids)
    session = Session(model, ByteTokenizer(), ContextMemory(OPTIONS))
    mixed = session.read(ids)
    assert np.isnan(mixed[0])
    np.testing.assert_allclose(mixed[1:], ContextMemory(OPTIONS).read(ids, alone)[1:], rtol=1e-3, atol=1e-4)
    assert mixed[400:].mean() < 0.2 * alone[400:].mean()
    # What is generated is drawn from the mixture, and read by the memory, too.
    assert "".join(session.write(30, Sampling(temperature=0))) == TEXT[:30]
    assert np.exp(session.logits.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["torch", "engine"])
def test_a_state_holds_it(folder, tmp_path, kind):
    model = load_weights(folder) if kind == "torch" else EngineModel(folder)
    other = EngineModel(folder) if kind == "torch" else load_weights(folder)
    tokenizer, cut, ids = ByteTokenizer(), 301, ids_of(TEXT)
    whole = Session(model, tokenizer, ContextMemory(OPTIONS)).read(ids)
    first = open_session(model, tokenizer, state_out=tmp_path / "state", memory=ContextMemory(OPTIONS))
    first.read(ids[:cut])
    first.save(tmp_path / "state")
    for continued in (model, other):
        second = open_session(continued, tokenizer, tmp_path / "state", memory=ContextMemory())
        # The first token after loading has no prediction.
        np.testing.assert_allclose(second.read(ids[cut:])[1:20], whole[cut + 1 : cut + 20], rtol=2e-2, atol=1e-3)
    with pytest.raises(UserError, match="holds a memory, which would be lost; add --memory"):
        open_session(model, tokenizer, tmp_path / "state")


def test_a_state_without_it_begins_an_empty_one(folder, tmp_path, caplog):
    model = EngineModel(folder)
    first = Session(model, ByteTokenizer())
    first.read(ids_of(TEXT))
    first.save(tmp_path / "state")
    second = open_session(model, ByteTokenizer(), tmp_path / "state", memory=ContextMemory(OPTIONS))
    assert "holds no memory; it begins empty" in caplog.text
    second.read(ids_of("pack"))


@pytest.mark.parametrize(("mode", "window"), [("disjoint", 64), ("rolling", 64), ("stream", None)])
def test_evaluate_carries_it_through_the_text_in_every_mode(folder, mode, window):
    model, tokenizer = load_weights(folder), byte_tokenizer()
    stream = TokenStream.from_text([TEXT, TEXT[::-1]], tokenizer)
    given = {"window": window, "mode": mode, "batch_size": 3}
    alone = evaluate(model, stream, tokenizer, **given)
    found = evaluate(model, stream, tokenizer, memory=ContextMemory(OPTIONS), **given)
    assert found.tokens == alone.tokens
    assert found.nats_per_token < 0.6 * alone.nats_per_token
    assert found.memory["entries"] == 1024
    assert alone.memory is None


def test_long_windows_are_read_in_order(folder, monkeypatch):
    """Windows that go through in chunks; several at once would come in turns."""
    monkeypatch.setattr("dyadlm.evaluate.scoring.LONGEST_CHUNK", 50)
    monkeypatch.setattr("dyadlm.evaluate.evaluation.LONGEST_CHUNK", 50)
    model, tokenizer = load_weights(folder), byte_tokenizer()
    stream = TokenStream.from_text(TEXT, tokenizer)
    found = evaluate(model, stream, tokenizer, window=120, memory=ContextMemory(OPTIONS))
    monkeypatch.setattr("dyadlm.evaluate.scoring.LONGEST_CHUNK", 4096)
    monkeypatch.setattr("dyadlm.evaluate.evaluation.LONGEST_CHUNK", 4096)
    once = evaluate(model, stream, tokenizer, window=120, memory=ContextMemory(OPTIONS))
    assert found.nats_per_token == pytest.approx(once.nats_per_token, rel=1e-4)


def test_what_is_not_scored_is_read(folder):
    stream = TokenStream.from_text(TEXT, byte_tokenizer())
    nats = np.full(100, 5.0, np.float32)
    ((_, first), (_, second)) = remembered([(0, nats), (200, nats)], stream, ContextMemory(OPTIONS))
    memory = ContextMemory(OPTIONS)
    assert np.array_equal(memory.read(stream.tokens(0, 100), nats), first)
    memory.read(stream.tokens(100, 200), np.full(100, np.nan))
    assert np.array_equal(memory.read(stream.tokens(200, 300), nats), second)


def test_a_memory_of_documents_reads_each_as_if_it_were_alone():
    """Wherever the pieces of the text end, and whether or not all of it is scored."""
    tokens, options = np.frombuffer(TEXT.encode() * 2, np.uint8)[:300], replace(OPTIONS, scope="document")

    class Documents:
        documents = ((0, 110, "a"), (110, 180, "b"), (180, 300, "c"))

        def tokens(self, start, stop):
            return tokens[start:stop].astype(np.int64)

    nats = np.linspace(0.1, 5, 300).astype(np.float32)
    alone = [ContextMemory(options).read(tokens[a:b].astype(np.int64), nats[a:b]) for a, b, _ in Documents.documents]
    for cuts in ((0, 300), (0, 50, 110, 300), (0, 200, 300)):
        pieces = [(a, nats[a:b]) for a, b in pairwise(cuts)]
        found = [mixed for _, mixed in remembered(pieces, Documents(), ContextMemory(options))]
        assert np.array_equal(np.concatenate(found), np.concatenate(alone))
    ((_, last),) = remembered([(250, nats[250:])], Documents(), ContextMemory(options))
    memory = ContextMemory(options)
    memory.read(tokens[180:250].astype(np.int64), np.full(70, np.nan))
    assert np.array_equal(last, memory.read(tokens[250:].astype(np.int64), nats[250:]))
    stream = next(remembered([(0, nats)], Documents(), ContextMemory(OPTIONS)))[1]
    assert stream[110:].sum() != np.concatenate(alone[1:]).sum()


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_the_commands(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    scores = []
    for options in ((), ("--memory",), ("--memory", "--memory-entries", 64)):
        assert call("evaluate", folder, "--data", tmp_path / "text.txt", "--device", "cpu", "--json", *options) == 0
        scores.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert scores[1] < scores[2] < scores[0]
    assert call("evaluate", folder, "--data", tmp_path / "text.txt", "--memory") == 0
    assert "With a memory of 4.1 MiB" in capsys.readouterr().out
    state = tmp_path / "state"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert call("stream", folder, "--memory", "--state-out", state) == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[1]) < 1
    greedy = ("--temperature", 0, "--max-new-tokens", 9)
    assert call("generate", folder, "--prompt", "pack m", "--state-in", state, "--memory", *greedy) == 0
    assert capsys.readouterr().out.startswith("pack my box wit")
    assert call("generate", folder, "--prompt", "pack m", "--state-in", state) == 2
    assert "add --memory" in capsys.readouterr().err
    assert call("generate", folder, "--prompt", "pack", "--state-in", state, "--memory", "--memory-entries", 64) == 2
    assert "has 16384 entries, which cannot change" in capsys.readouterr().err
    assert call("generate", folder, "--prompt", "pack", "--memory", "--speculate", "--temperature", 0) == 2
    assert "Speculation cannot use a memory" in capsys.readouterr().err
    again = ("--state-in", state, "--memory", "--memory-scope", "document")
    assert call("generate", folder, "--prompt", "pack", *again) == 2
    assert "has the scope stream, which cannot change" in capsys.readouterr().err
    assert call("generate", folder, "--prompt", "pack", "--memory-scope", "document") == 2
    assert "does nothing without --memory" in capsys.readouterr().err
    assert call("generate", folder, "--prompt", "pack", "--memory-entries", 64) == 2
    assert "does nothing without --memory" in capsys.readouterr().err
    assert call("generate", folder, "--prompt", "pack", "--memory", "--memory-entries", 63) == 2
    assert "power of two" in capsys.readouterr().err


def test_generate_text_takes_it(folder):
    memory = ContextMemory(OPTIONS)
    text = "".join(
        generate_text(
            load_weights(folder), ByteTokenizer(), TEXT, max_new_tokens=20, sampling=Sampling(0), memory=memory
        )
    )
    assert text == TEXT[:20]
