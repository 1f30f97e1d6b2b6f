"""Slots that hold the prompt alone: nothing that is written goes into them, in the engine, in torch, with a memory."""

import numpy as np
import pytest
import torch

from dyadlm.cli import main
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.errors import UserError
from dyadlm.generate import Sampling, Session, engine_model, generate_text, load_model
from dyadlm.generate.speculation import Drafts
from dyadlm.memory import ContextMemory, MemoryOptions
from dyadlm.model import DyadConfig, DyadForCausalLM

PROMPT = "ROMEO:\n"
GREEDY = Sampling(temperature=0.0)
COUNT = 96


def written(model, **options) -> str:
    return "".join(generate_text(model, byte_tokenizer(), PROMPT, max_new_tokens=COUNT, sampling=GREEDY, **options))


@pytest.fixture(scope="module")
def light():
    return engine_model("tiny-en", "cpu", "auto")


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-en", "cpu", "float32")[0]


def test_what_is_written_changes_no_table(light):
    session = Session(light, byte_tokenizer(), slots="prompt")
    session.read_prompt(PROMPT)
    before = session.state.tags.copy(), session.state.values.copy()
    "".join(session.write(COUNT, GREEDY))
    assert np.array_equal(session.state.tags, before[0])
    assert np.array_equal(session.state.values, before[1])
    session.read_prompt("THIRD SOLDIER:\n")  # what is read is remembered again
    assert not np.array_equal(session.state.tags, before[0])


def test_torch_and_engine_write_the_same(light, model, monkeypatch):
    alone = written(light, slots="prompt")
    assert alone != written(light)
    assert written(model, slots="prompt") == alone
    monkeypatch.setattr("dyadlm.generate.torch_reader.decoder_of", lambda model: None)  # and token by token in torch
    assert written(model, slots="prompt") == alone


def to_write(session: Session) -> torch.Tensor:
    """The context of the last token, which the next one writes."""
    return next(layer.slots[-1] for layer in session.state.layers if layer.slots)


@pytest.mark.parametrize("decoded", ["engine", "torch"])
def test_a_fork_remembers_what_it_read(decoded, model, monkeypatch):
    """Where it was forked, the context of the last token is still to be written, whatever the other one does."""
    if decoded == "torch":
        monkeypatch.setattr("dyadlm.generate.torch_reader.decoder_of", lambda model: None)
    session = Session(model, byte_tokenizer(), slots="prompt")
    session.read_prompt(PROMPT)
    kept = session.snapshot()
    pending = to_write(session).clone()
    assert (pending >= 0).any()
    next(session.write(1, GREEDY))
    session.restore(kept)
    assert torch.equal(to_write(session), pending)


def test_text_copies_itself_less(light):
    """The model goes round in a circle as it is, and does not with slots of the prompt alone."""

    def circles(text: str) -> bool:
        return any(text.endswith(3 * text[-period:]) for period in range(1, 33))

    long = {"max_new_tokens": 256, "sampling": GREEDY}
    found = [
        "".join(generate_text(light, byte_tokenizer(), PROMPT, **long, slots=slots)) for slots in ("all", "prompt")
    ]
    assert [circles(text) for text in found] == [True, False]


def test_a_memory_goes_with_it(light):
    memory = ContextMemory(MemoryOptions.of_vocabulary(259))
    session = Session(light, byte_tokenizer(), memory, slots="prompt")
    session.read_prompt(PROMPT)
    before = session.state.tags.copy()
    "".join(session.write(8, GREEDY))
    assert np.array_equal(session.state.tags, before)


def test_wrong_requests(model):
    bare = DyadForCausalLM(DyadConfig(hidden_size=32, num_hidden_layers=1, num_levels=2)).eval()
    with pytest.raises(UserError, match=r"has no slots \(slot_contexts\); leave out --slots prompt"):
        Session(bare, byte_tokenizer(), slots="prompt")
    session = Session(model, byte_tokenizer(), slots="prompt")
    session.read_prompt(PROMPT)
    with pytest.raises(UserError, match="leave out --speculate or --slots prompt"):
        next(session.write(8, GREEDY, drafts=Drafts()))


def test_the_command_takes_it(light, capsys):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "generate",
                "tiny-en",
                "--prompt",
                PROMPT,
                "--temperature",
                "0",
                "--max-new-tokens",
                "96",
                "--slots",
                "prompt",
            ]
        )
    assert not ended.value.code
    assert capsys.readouterr().out == PROMPT + written(light, slots="prompt") + "\n"
