"""Conversations: each turn reads only what is new, and turns are taken back, forked, saved and loaded."""

from contextlib import closing

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.data import byte_tokenizer
from dyadlm.data.chat import ChatTurns
from dyadlm.engine import Engine
from dyadlm.generate import EngineModel, Session
from dyadlm.generate.conversation import MOST_BRANCHES, MOST_UNDONE, Conversation, Settings
from dyadlm.memory import ContextMemory, MemoryOptions

GREEDY = Settings(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, slot_layers=[1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, eos_token_id=258, **sizes)).eval()


@pytest.fixture(params=["engine", "torch", "memory", "another model"])
def conversation(request, folder):
    if request.param == "another model":
        return Conversation(Session(llama(), byte_tokenizer()), byte_tokenizer(), settings=GREEDY)
    model = DyadForCausalLM.from_pretrained(folder).eval() if request.param == "torch" else EngineModel(folder)
    memory = ContextMemory(MemoryOptions(entries=256)) if request.param == "memory" else None
    return Conversation(Session(model, byte_tokenizer(), memory), byte_tokenizer(), settings=GREEDY)


def of(folder, **options) -> Conversation:
    return Conversation(Session(EngineModel(folder), byte_tokenizer()), byte_tokenizer(), settings=GREEDY, **options)


def say(conversation: Conversation, text: str) -> str:
    return "".join(conversation.say(text))


def test_turns_are_one_text(conversation, monkeypatch):
    """After some turns the model stands where it stands after reading all of them at once."""
    session, ids = conversation.session, []
    reader, begin = session._reader, session.snapshot()
    read, read_next = reader.read, reader.read_next
    monkeypatch.setattr(reader, "read", lambda tokens: (ids.extend(tokens), read(tokens))[1])
    monkeypatch.setattr(reader, "read_next", lambda token, first: (ids.append(token), read_next(token, first))[1])
    for text in ("To be", ", or not", ""):
        say(conversation, text)
    logits = session.logits
    monkeypatch.undo()
    session.restore(begin)
    session.read(ids)
    assert len(ids) > 20
    np.testing.assert_allclose(session.logits, logits, rtol=1e-3, atol=1e-3)


def test_each_turn_reads_only_its_own_tokens(folder, monkeypatch):
    read = []
    original = Engine.read
    monkeypatch.setattr(
        Engine, "read", lambda engine, state, ids: (read.append(len(ids)), original(engine, state, ids))[1]
    )
    conversation = of(folder)
    for text in ("a" * 300, "bc", "", "def"):
        say(conversation, text)
    assert read == [300, 2, 3]
    assert conversation.tokens_read == 305
    conversation.undo()
    conversation.undo()
    say(conversation, "g")
    assert read == [300, 2, 3, 1]


def test_undo_goes_back_turn_by_turn(conversation):
    first = say(conversation, "To be")
    logits, position = conversation.session.logits.copy(), conversation.session.position
    second = say(conversation, " or not")
    assert conversation.turns == 2
    conversation.undo()
    assert (conversation.turns, conversation.session.position) == (1, position)
    np.testing.assert_allclose(conversation.session.logits, logits, rtol=1e-5, atol=1e-5)
    assert say(conversation, " or not") == second
    conversation.undo()
    conversation.undo()
    assert conversation.session.begins
    assert say(conversation, "To be") == first
    conversation.undo()
    with pytest.raises(UserError, match="no turn to take back"):
        conversation.undo()


def test_a_bounded_number_of_turns_is_kept(folder):
    conversation = of(folder)
    conversation.settings = Settings(temperature=0, max_new_tokens=1)
    for _ in range(MOST_UNDONE + 3):
        say(conversation, "x")
    for _ in range(MOST_UNDONE):
        conversation.undo()
    assert conversation.turns == 3
    with pytest.raises(UserError, match="no turn to take back"):
        conversation.undo()


def test_branches_go_on_by_themselves(conversation):
    say(conversation, "Once")
    assert conversation.fork() == "fork-1"
    mine = say(conversation, " upon a time")
    conversation.switch("main")
    assert conversation.turns == 1
    other = say(conversation, " there was")
    conversation.switch("fork-1")
    assert conversation.turns == 2
    conversation.undo()
    assert say(conversation, " upon a time") == mine
    conversation.switch("main")
    conversation.undo()
    assert say(conversation, " there was") == other
    with pytest.raises(UserError, match="already"):
        conversation.fork("main")
    with pytest.raises(UserError, match="the nearest is fork-1"):
        conversation.switch("fork-2")


def test_branches_are_bounded(folder):
    conversation = of(folder)
    for _ in range(MOST_BRANCHES - 1):
        conversation.fork()
    with pytest.raises(UserError, match="no more are kept"):
        conversation.fork()


def test_saved_states_go_on_elsewhere(folder, tmp_path):
    conversation, path = of(folder), tmp_path / "a.state"
    say(conversation, "To be")
    assert conversation.unsaved == {"main": 1}
    conversation.save(path)
    assert conversation.unsaved == {}
    expected = say(conversation, ", or not")
    conversation.save(path)  # its own file may be replaced
    other = of(folder)
    say(other, "something else")
    with pytest.raises(UserError, match="already exists"):
        other.save(path)
    conversation.undo()
    conversation.save(path)
    other.load(path)
    assert say(other, ", or not") == expected
    other.undo()
    other.undo()  # the load
    assert other.turns == 1
    with pytest.raises(UserError, match="no state file"):
        other.load(tmp_path / "missing")
    assert other.turns == 1


def test_a_load_that_fails_changes_nothing(folder, tmp_path):
    path, conversation = tmp_path / "memory.state", of(folder)
    memory = ContextMemory(MemoryOptions(entries=256))
    other = Conversation(Session(EngineModel(folder), byte_tokenizer(), memory), byte_tokenizer(), settings=GREEDY)
    say(other, "abc")
    other.save(path)
    say(conversation, "xyz")
    position = conversation.session.position
    with pytest.raises(UserError, match="add --memory"):
        conversation.load(path)
    assert (conversation.session.position, conversation.turns) == (position, 1)


def test_states_of_other_models_cannot_be_saved(tmp_path):
    conversation = Conversation(Session(llama(), byte_tokenizer()), byte_tokenizer(), settings=GREEDY)
    say(conversation, "abc")
    assert conversation.unsaved == {}
    with pytest.raises(UserError, match="no state that can be saved"):
        conversation.save(tmp_path / "x")


def test_a_turn_that_fails_is_taken_back(conversation, monkeypatch):
    say(conversation, "To be")
    position = conversation.session.position

    def failing(*_, **__):
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.session, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        say(conversation, " or")
    assert (conversation.session.position, conversation.turns) == (position, 1)


def test_an_answer_that_is_closed_stays(folder):
    conversation = of(folder)
    with closing(conversation.say("To be")) as pieces:
        first = next(pieces)
    assert conversation.turns == 1
    assert conversation.session.position == 5 + len(first.encode())


def test_nothing_to_go_on_from(folder):
    with pytest.raises(UserError, match="nothing to go on from"):
        say(of(folder), "")


def test_an_unfinished_character_comes_when_the_answer_goes_on(folder, monkeypatch):
    conversation, written = of(folder), iter("aé→".encode() + b"bcd")
    monkeypatch.setattr(
        "dyadlm.generate.session.Sampler", lambda sampling: lambda logits: next(written)
    )  # writes these bytes
    conversation.settings = Settings(max_new_tokens=2)
    assert say(conversation, "x") == "a"
    assert say(conversation, "") == "é"
    assert say(conversation, "") == "→"
    assert say(conversation, "y") == "bc"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.25", 0.25),
        ("top_k", "5", 5),
        ("seed", "null", None),
        ("stop", "'\\n'", ("\\n",)),
        ("stop", '["a", b]', ("a", "b")),
        ("stop", "null", ()),
    ],
)
def test_settings(name, text, value):
    assert getattr(Settings().changed(name, text), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temprature", "1", "the nearest is temperature"),
        ("temperature", "hot", "takes a number"),
        ("temperature", "-1", "at least 0"),
        ("max_new_tokens", "0", "at least 1 token"),
        ("stop", "['']", "at least one character"),
        ("top_p", "[", "cannot be read"),
    ],
)
def test_settings_out_of_range(name, text, message):
    with pytest.raises(UserError, match=message):
        Settings().changed(name, text)


def test_the_seed_counts_turns():
    settings = Settings(seed=7)
    assert [settings.sampling(turn).seed for turn in (0, 1, 2)] == [7, 8, 9]
    assert Settings().sampling(3).seed is None


# ---- Chat


def test_turns_of_a_chat_are_the_text_of_the_template():
    """What is read and written, turn by turn, is the whole conversation under the template."""
    tokenizer = byte_tokenizer()
    turns = ChatTurns(tokenizer, "Be brief.")
    said, answers = ["Hi", "<|end|> is text", "bye"], [list(b"Hello"), list(b"Yes")]
    ids = turns.ids(said[0], first=True)
    for answer, text in zip(answers, said[1:], strict=True):
        ids += answer + turns.ids(text, first=False)
    end = tokenizer.eos_token_id
    expected = [*b"system:\nBe brief.", end, *b"\nuser:\nHi", end, *b"\nassistant:\nHello", end]
    expected += [*b"\nuser:\n<|end|> is text", end, *b"\nassistant:\nYes", end, *b"\nuser:\nbye", end]
    assert ids == [*expected, *b"\nassistant:\n"]
    assert turns.end_tokens == {end}


def test_a_template_that_writes_turns_anew_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="use `dyadlm repl`"):
        ChatTurns(tokenizer)


def test_a_chat_goes_on_after_an_answer(folder):
    """The end of the answer is read with the next turn, once."""
    turns = ChatTurns(byte_tokenizer())
    conversation = of(folder, chat=turns)
    position = 0
    for number, text in enumerate(("Hi", "and?")):
        expected = len(turns.ids(text, first=number == 0))
        with closing(conversation.say(text)) as pieces:
            for _ in pieces:
                pass
        assert conversation.tokens_read - position == expected
        position = conversation.tokens_read
