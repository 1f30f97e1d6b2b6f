"""Windows of text as it comes: what they hold, how sources are mixed, and that reading goes on anywhere."""

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from dyadlm.data import Passage, Source, byte_tokenizer
from dyadlm.data.encoding import END_ID, decode_bytes
from dyadlm.data.sources import open_source
from dyadlm.data.streaming import FILE, StreamedWindows, stream_text
from dyadlm.errors import UserError

from .conftest import make_text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def documents(letter, count=30):
    def passages():
        for number in range(count):
            yield Passage(f"{letter}{number}", f"{letter}{number} ".encode() * 8)
            yield Passage(f"{letter}{number}", f"{letter}{number}.".encode(), starts=False)

    return Source(letter, "CC0", letter, {"train": passages})


def windows(*sources, length=60, every=4, seed=0):
    text = stream_text([(source, weight) for source, weight in sources], byte_tokenizer(), 20, seed)
    return StreamedWindows(text.passages, text.encoder, 16, length, every)


def read(made, numbers):
    return torch.stack([made[number]["input_ids"] for number in numbers])


def test_one_source_is_read_in_its_order_but_for_what_is_held_out():
    text = stream_text([(documents("a"), 1.0)], byte_tokenizer(), 20, 0)
    (sample,) = text.samples
    assert decode_bytes(sample.tokens(0, len(sample))) == b"a0 " * 8 + b"a0."
    found = read(StreamedWindows(text.passages, text.encoder, 16, 60, 4), range(60)).flatten().tolist()
    round_ = []
    for number in range(1, 30):
        round_ += [END_ID, *(f"a{number} " * 8 + f"a{number}.").encode()]
    assert found[: len(round_)] == round_[: len(found)]


def test_sources_are_mixed_by_their_weights_again_and_again():
    found = read(windows((documents("a", 3), 3.0), (documents("b", 3), 1.0), length=400), range(400))
    parts = [(found == ord(letter)).sum().item() for letter in "ab"]
    assert 2 < parts[0] / parts[1] < 4
    other = read(windows((documents("a", 3), 3.0), (documents("b", 3), 1.0), length=400, seed=1), range(400))
    assert not torch.equal(found, other)


def test_documents_stay_whole_between_other_sources(monkeypatch):
    made = windows((documents("a"), 1.0), (documents("b"), 1.0), length=200)
    tokens = read(made, range(200)).flatten().tolist()
    whole = {(f"{letter}{number} " * 8 + f"{letter}{number}.").encode() for letter in "ab" for number in range(30)}
    text = b"".join(b"|" if token == END_ID else bytes([token]) for token in tokens)
    assert set(text.split(b"|")[1:-1]) <= whole
    monkeypatch.setattr("dyadlm.data.streaming.WORK_BYTES", 10)  # longer ones are read in parts
    text = stream_text([(documents("a"), 1.0)], byte_tokenizer(), 20, 0)
    found = read(StreamedWindows(text.passages, text.encoder, 16, 60, 4), range(60)).flatten().tolist()
    assert found[:3] == [*b"a0."]


def test_the_first_bad_byte_is_named_by_its_place_in_the_document(monkeypatch, text_tokenizer):
    monkeypatch.setattr("dyadlm.data.streaming.WORK_BYTES", 10)
    passages = [Passage("a", b"the tower "), Passage("a", b"speaks \xff", offset=10, starts=False)]
    with pytest.raises(UserError, match="a is not UTF-8 text: byte 17 is 0xff"):
        stream_text([(Source("a", "CC0", "a", {"train": lambda: iter(passages)}), 1.0)], text_tokenizer, 20, 0)


def test_reading_goes_on_anywhere(tmp_path):
    sources = ((documents("a", 5), 3.0), (documents("b", 7), 1.0))
    whole = read(windows(*sources), range(60))
    # One process of two, which reads every other batch of two windows.
    mine = [number for number in range(60) if number % 4 < 2]
    made = windows(*sources)
    assert torch.equal(read(made, mine), whole[mine])
    made = windows(*sources)
    for number in (0, 17, 0, 18, 0, 19, 20):  # the first one says how long windows are
        assert torch.equal(made[number]["input_ids"], whole[number])
    for number in (36, 60):
        for ahead in (number - 1, number + 5):
            made = windows(*sources)
            read(made, range(min(ahead, 60)))
            folder = tmp_path / f"{number} {ahead}"
            folder.mkdir(exist_ok=True)
            made.save(folder, number)
            resumed = windows(*sources, length=80)
            resumed.load(folder, number)
            passages = 0

            def counted(record, tokens=resumed._tokens):
                nonlocal passages
                passages += 1
                return tokens(record)

            resumed._tokens = counted
            rest = range(number, number + 10)
            assert torch.equal(read(resumed, rest), read(windows(*sources, length=80), rest))
            assert passages < 14  # none of the text before was tokenised
    with pytest.raises(UserError, match="does not say where"):
        made.load(tmp_path, 60)
    for told in ({"window": "36"}, {"passages": "{}"}, {"passages": "7"}, {"passages": "[1"}):
        with safe_open(str(folder / FILE), framework="np") as written:
            save_file({"left": written.get_tensor("left")}, tmp_path / FILE, {**written.metadata(), **told})
        with pytest.raises(ValueError):  # noqa: PT011 - of several makers
            made.load(tmp_path, 60)


def test_files_of_a_place_are_parts_of_their_own():
    system = fsspec.filesystem("memory")
    system.pipe({f"/many/{number}.txt": make_text(40, number).encode() for number in range(3)})
    source = open_source("memory://many")
    assert len(source.parts) == 3
    assert windows((source, 1.0), length=5)[4]["input_ids"].shape == (16,)
    system.rm("/many", recursive=True)


def test_text_that_cannot_be_streamed_is_said():
    with pytest.raises(UserError, match="a has 16 tokens in 1 passages"):
        windows((Source("a", "CC0", "a", {"train": lambda: iter([Passage("a", b"0123456789abcdef")])}), 1.0))
    with pytest.raises(UserError, match="a has 24 tokens in 1 passages"):
        windows((Source("a", "CC0", "a", {"train": lambda: iter([Passage("a", b"0123456789" * 2 + b"abcd")])}), 1.0))
    chat = Passage("talk", b"[]", kind="chat:conversation")
    with pytest.raises(UserError, match="talk is a conversation"):
        windows((Source("a", "CC0", "a", {"train": lambda: iter([chat])}), 1.0))


def test_a_place_that_is_no_longer_remembered_is_not_saved_as_another(tmp_path):
    made = windows((documents("a"), 1.0))
    read(made, range(60))
    with pytest.raises(AssertionError, match="no longer remembered"):
        made.save(tmp_path, 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("texts", [0, 9])
def test_text_that_changes_between_two_passes_is_refused(tmp_path, scheme, texts):
    """Else the run would go on with another text, or end without any."""
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "a text of some words for this test"}\n' * 9)
    made = windows((open_source(f"{scheme}{file}"), 1.0))
    assert made[0]["input_ids"].shape == (16,)
    file.write_text('{"text": "another text"}\n' * texts)
    with pytest.raises(UserError, match=r"lines\.jsonl has changed while it was read"):
        read(made, range(60))


def test_text_that_is_gone_is_said():
    """A `StopIteration` would end the run as if it had read everything."""
    left = iter([5, 5])  # for the sample, and for one pass
    source = Source("a", "CC0", "a", {"train": lambda: documents("a", next(left, 0)).splits["train"]()})
    with pytest.raises(UserError, match="no more text"):
        read(windows((source, 1.0)), range(60))
