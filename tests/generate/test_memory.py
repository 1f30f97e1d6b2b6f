"""A memory on purpose: what one run of the program read is recalled by the next, in a new document."""

import pytest
import torch
from safetensors.torch import load_file

from dyadlm.cli import main
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.errors import UserError
from dyadlm.generate import Sampling, Session, generate_text
from dyadlm.model import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.model.loading import load_weights

pytestmark = pytest.mark.slow

READ, CUE, FOLLOWED = "qmzxvjwkbypf", "zx", "vjwkby"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learnt to repeat what it read in the document before; its slots last for a document by default.

    About three seconds of training.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_levels": 3, "slot_entries": 256, "semantic_levels": []}
    config = DyadConfig.from_preset("tiny", slot_contexts=[2], slot_scope="stream", **sizes)
    model = DyadForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    positions = torch.cat([torch.arange(24), torch.arange(24)])[None]
    for _ in range(150):
        read = torch.randint(97, 123, (16, 24))
        ids = torch.cat([read, read], 1)
        labels = torch.where(torch.arange(48) < 26, -100, ids)
        model(input_ids=ids, position_ids=positions, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.config.slot_scope = "document"
    folder = tmp_path_factory.mktemp("memory") / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_a_memory_goes_from_run_to_run(folder, tmp_path, capsys):
    state, second = tmp_path / "state.safetensors", tmp_path / "second.safetensors"
    greedy = ("--temperature", 0, "--device", "cpu")
    assert call("generate", folder, "--prompt", READ, "--max-new-tokens", 1, "--state-out", state, *greedy) == 0
    capsys.readouterr()

    def continued(*options) -> str:
        assert call("generate", folder, "--prompt", CUE, "--max-new-tokens", len(FOLLOWED), *greedy, *options) == 0
        return capsys.readouterr().out.rstrip("\n").removeprefix(CUE)

    recalls = ("--state-in", state, "--new-document", "--set", "slot_scope=stream")
    assert continued(*recalls, "--state-out", second) == FOLLOWED
    assert continued() != FOLLOWED
    assert call("generate", folder, "--prompt", CUE, "--state-in", state, "--new-document") == 2
    assert "--set slot_scope=stream" in capsys.readouterr().err
    assert load_file(second)["position"].tolist() == [len(CUE + FOLLOWED)]


def test_streams_recall_too(folder, tmp_path, capsys, monkeypatch):
    state = tmp_path / "state.safetensors"

    def stream(text: str, *options) -> list[float]:
        (tmp_path / "text").write_text(text)
        with (tmp_path / "text").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            assert call("stream", folder, "--device", "cpu", *options) == 0
        return [float(row.split()[1]) for row in capsys.readouterr().out.splitlines()]

    first = stream(READ, "--state-out", state)
    assert len(first) == len(READ)
    recalled = stream(CUE + FOLLOWED, "--state-in", state, "--new-document", "--set", "slot_scope=stream")
    forgotten = stream(CUE + FOLLOWED)
    assert len(recalled) == len(forgotten) == len(CUE + FOLLOWED)
    known = slice(len(CUE), None)
    assert sum(recalled[known]) < sum(forgotten[known]) - 2 * len(FOLLOWED)  # bits
    # The document goes on after a saved state, whose last token predicts nothing here.
    halves = stream(READ[:5], "--state-out", tmp_path / "half") + stream(READ[5:], "--state-in", tmp_path / "half")
    assert halves == pytest.approx(first[:5] + first[6:], abs=2e-3)


@pytest.mark.parametrize("scope", ["document", "stream"])
def test_of_the_open_document_only_the_slots_are_kept(scope):
    torch.manual_seed(0)
    everything = {
        "semantic_levels": ["word", "learned"], "semantic_memory": 2, "salience": True, "forgetting": True,
        "selector": "topk", "selector_margin": 0.5, "decision_slots": True, "slot_contexts": [1, 2, "word"],
    }  # fmt: skip
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_levels": 4, "slot_entries": 64}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", slot_scope=scope, **sizes, **everything)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    before, after = torch.tensor([list(b"the cat sat. ")]), torch.tensor([list(b"the mat")])
    cache = DyadCache()
    with torch.no_grad():
        model(input_ids=before, past_key_values=cache)
        tables = [layer.slots for layer in cache.layers]
        cache.start_document()
        assert cache.get_seq_length() == 0
        assert cache.position.tolist() == [0]
        for layer, slots in zip(cache.layers, tables, strict=True):
            assert all(torch.equal(*pair) for pair in zip(layer.slots, slots, strict=True))
        kept = {name for name in cache.tensors() if ".slots." not in name}
        assert kept == {"position"}
        here = model(input_ids=after, past_key_values=cache).logits
        alone = model(input_ids=after).logits
        packed = model(
            input_ids=torch.cat([before, after], 1),
            position_ids=torch.cat([torch.arange(before.shape[1]), torch.arange(after.shape[1])])[None],
        ).logits[:, before.shape[1] :]
    torch.testing.assert_close(here, packed, rtol=1e-4, atol=1e-5)
    assert torch.allclose(here, alone, rtol=1e-4, atol=1e-5) == (scope == "document")


def test_a_cache_that_saw_nothing_starts_anywhere():
    cache = DyadCache()
    cache.start_document()
    assert cache.is_empty


def test_what_cannot_recall_is_told(folder, tmp_path):
    state = tmp_path / "state.safetensors"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_levels": 3, "semantic_levels": [], "slot_contexts": []}
    plain = DyadForCausalLM(DyadConfig.from_preset("tiny", **sizes)).eval()
    for model, path in ((plain, state), (load_weights(folder), tmp_path / "other")):
        list(generate_text(model, byte_tokenizer(), READ, max_new_tokens=1, state_out=path))
    for model, options, message in (
        (plain, {"state_in": state}, "no slots"),
        (plain, {}, "--state-in"),
        (load_weights(folder), {"state_in": tmp_path / "other"}, "slot_scope=stream"),
    ):
        with pytest.raises(UserError, match=message):
            list(generate_text(model, byte_tokenizer(), CUE, new_document=True, **options))
    with pytest.raises(UserError, match="level_rank"):  # weights depend on it
        load_weights(folder, fields={"level_rank": 3})


def test_a_session_begins_documents_as_its_tokenizer_does(folder):
    model = load_weights(folder, fields={"slot_scope": "stream"})
    session = Session(model, byte_tokenizer())
    assert session.begins
    session.read_prompt(READ)
    assert not session.begins
    assert session.predicts
    session.start_document()
    assert session.begins
    assert not session.predicts
    session.read_prompt(CUE)
    assert "".join(session.write(len(FOLLOWED), GREEDY)) == FOLLOWED
