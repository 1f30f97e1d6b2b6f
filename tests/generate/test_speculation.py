"""Speculation writes what the model writes greedily, whatever is foreseen, and leaves the same state."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dyadlm import UserError
from dyadlm.cli.app import app
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.generate import Sampling, Session, generate_text, speculation
from dyadlm.generate.speculation import Drafts

from ..model.conftest import VARIANTS, make_model

PROMPT = "To be, or not"
GREEDY = Sampling(temperature=0.0)


def make(name: str = "planner"):
    model = make_model(**VARIANTS[name], tie_word_embeddings=False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)  # as if trained, so that texts vary
        model.lm_head.weight[127:] = model.lm_head.weight[:32] = 0.0  # text of one character a token
    model.generation_config.eos_token_id = None
    return model


def written(model, count: int = 14, drafts: Drafts | None = None, stop=()) -> tuple[str, Session]:
    session = Session(model, byte_tokenizer())
    session.read_prompt(PROMPT)
    return "".join(session.write(count, GREEDY, stop, drafts)), session


def foreseeing(monkeypatch, text: str, right) -> list[int]:
    """Let the model propose what comes in a text, where `right(position)` says so. Returns the sizes of its passes."""
    passes, read = [], speculation.read_ahead

    def oracle(model, ids, state):
        before = state.columns_seen - len(PROMPT.encode())
        found = read(model, ids, state)
        passes.append(len(found))
        after_next = [before + place + 2 for place in range(len(found))]
        tokens = [ord(text[at]) if at < len(text) else 0 for at in after_next]
        return [
            (logits, token if right(at) else token ^ 1)
            for (logits, _), token, at in zip(found, tokens, after_next, strict=True)
        ]

    monkeypatch.setattr(speculation, "read_ahead", oracle)
    return passes


@pytest.mark.parametrize("name", ["planner", "everything"])
def test_it_writes_what_is_written_greedily_and_leaves_the_state(name):
    """In float64, with consensus of engineer and artist on or off."""
    for consensus in (0.0, VARIANTS[name]["consensus"]):
        model, drafts = make(name), Drafts()
        model.config.consensus = consensus
        plain, session = written(model)
        text, other = written(model, drafts=drafts)
        assert text == plain
        assert len(set(text)) > 2
        assert 0 < drafts.made <= 14
        assert 0 <= drafts.rate <= 1
        for key, tensor in session.state.tensors().items():
            assert torch.allclose(other.state.tensors()[key].double(), tensor.double(), rtol=0, atol=1e-9), key
        assert np.allclose(other.logits, session.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", [None, 7, 8])
def test_what_is_foreseen_saves_passes_and_changes_nothing(monkeypatch, stop):
    model = make()
    plain, _ = written(model, 18)
    for right, passes, accepted in (
        (lambda at: True, 10, 9),  # one to begin, then two tokens in each
        (lambda at: False, 18, 0),  # never more than tokens
        (lambda at: at % 3 > 0, None, None),
    ):
        with monkeypatch.context() as patch:
            seen, drafts = foreseeing(patch, plain, right), Drafts()
            text, session = written(model, stop or 18, drafts)
        assert text == plain[: stop or 18]
        assert session.state.columns_seen == len(PROMPT) + len(text)  # what is written has been read, and no more
        if stop is None and passes is not None:
            assert abs(len(seen) - passes) <= 1
            assert abs(drafts.accepted - accepted) <= 1
    with monkeypatch.context() as patch:
        foreseeing(patch, plain, lambda at: True)
        text, session = written(model, 18, Drafts(), stop=(plain[5:9],))
    assert text == plain[: plain.index(plain[5:9]) + 4]
    assert session.state.columns_seen == len(PROMPT) + len(text)


def test_the_rate_is_the_share_that_was_right():
    assert Drafts().rate == 0
    assert Drafts(made=8, accepted=2).rate == 0.25


def test_an_end_of_text_is_not_read(monkeypatch):
    model = make()
    plain, _ = written(model, 18)
    model.generation_config.eos_token_id = ord(plain[12])
    first = plain.index(plain[12])
    foreseeing(monkeypatch, plain, lambda at: True)
    text, session = written(model, 18, Drafts())
    assert text == plain[:first]
    assert session.state.columns_seen == len(PROMPT) + first


def test_what_cannot_speculate_is_refused(monkeypatch):
    """Before anything is read."""
    monkeypatch.setattr(Session, "read_prompt", lambda *_: pytest.fail("the prompt was read"))
    for model, sampling, message in (
        (make_model(), GREEDY, "a model with a planner"),
        (make(), Sampling(temperature=0.7), "temperature to 0, not 0.7"),
    ):
        with pytest.raises(UserError, match=message):
            next(generate_text(model, byte_tokenizer(), PROMPT, sampling=sampling, drafts=Drafts()))


def test_the_command_tells_how_many_were_right(tmp_path):
    make_model(torch.float32, **VARIANTS["planner"]).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["generate", str(tmp_path / "model"), "--prompt", "so", "--max-new-tokens", "4", "--device", "cpu"]
    told = CliRunner().invoke(app, [*arguments, "--temperature", "0", "--speculate"])
    assert told.exit_code == 0, told.output
    assert "tokens foreseen two ahead were right" in told.output
    plain = CliRunner().invoke(app, [*arguments, "--temperature", "0"])
    assert plain.stdout.strip() in told.output
