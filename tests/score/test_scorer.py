"""What a scorer says of lines, against token-by-token surprisals; the state, and learning while reading."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dyadlm.data.encoding import encode_bytes
from dyadlm.errors import UserError
from dyadlm.generate import Session, load_model, open_session
from dyadlm.memory import ContextMemory, MemoryOptions
from dyadlm.score import Drift, Reading, Scorer, chunks, units_of
from dyadlm.score.learning import BLOCK, RATE, Learner
from dyadlm.score.lines import Numbering
from dyadlm.score.scorer import identity_of_weights
from dyadlm.state_file import read_beside

TEXT = b"".join(
    [b"one two\n", b"\n", b"\r\n", b"no UTF-8 \xff\xfe\x80\n", "wide é €\n".encode(), b"z" * 5000 + b"\n", b"the end"]
)


def placed(content: bytes, document="a"):
    numbering = Numbering(document)
    return [numbering.place(line) for line in content.splitlines(keepends=True)]


def scorer_of(model, learner=None) -> Scorer:
    return Scorer(Session(model, model.tokenizer), model.tokenizer, Drift(), learner)


def learner_of(model) -> Learner:
    return Learner(model.fields["vocab_size"], model.fields["hidden_size"])


def bits_of(scorer, lines, grouped=chunks):
    return np.concatenate([scored.bits for chunk in grouped(lines) for scored in scorer.read(chunk)])


def one_by_one(folder, tokens) -> np.ndarray:
    """Bits of each token but the first: the model reads a single token at a time."""
    model, _ = load_model(folder, "cpu", "float32")
    state, bits = None, []
    with torch.no_grad():
        for token, following in pairwise(tokens):
            output = model(torch.tensor([[token]]), past_key_values=state, use_cache=True)
            state = output.past_key_values
            bits.append(-torch.log_softmax(output.logits[0, -1], -1)[following].item() / math.log(2))
    return np.array(bits)


def test_bits_are_those_of_single_tokens(folder, model):
    text = TEXT.replace(b"z" * 5000, b"z" * 50)
    lines = placed(text)
    expected = one_by_one(folder, [257, *text])
    at = 0
    scorer = scorer_of(model)
    for unit in units_of(scorer.read(lines), Reading()):
        assert unit.bits == pytest.approx(expected[at : at + unit.size].sum(), rel=1e-4)
        at += unit.size
    assert at == len(text)
    assert (scorer.lines, scorer.size) == (len(lines), len(text))
    assert scorer.bits == pytest.approx(expected.sum(), rel=1e-4)


def test_documents_are_parted_by_the_token_that_ends_them(folder, model):
    lines = [*placed(b"first\n"), *placed(b"second", "b")]
    found = bits_of(scorer_of(model), lines)
    expected = one_by_one(folder, [257, *b"first\n", 258, *b"second"])
    assert found == pytest.approx(np.delete(expected, 6), rel=1e-4)


def single(lines):
    return [[line] for line in lines]


def odd(lines):
    return [lines[:1], lines[1:4], lines[4:5], lines[5:]]


@pytest.mark.parametrize("grouped", [single, odd])
@pytest.mark.parametrize("learn", [False, True])
def test_it_makes_no_difference_which_lines_are_read_at_once(model, grouped, learn):
    lines = placed(TEXT)
    whole, parted = (scorer_of(model, learner_of(model) if learn else None) for _ in range(2))
    assert bits_of(parted, lines, grouped) == pytest.approx(bits_of(whole, lines), abs=2e-3)


def test_a_text_of_words_is_tokenised_by_line_and_spread_over_bytes(folder):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["?", "é", "two", " ", "\n"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=64)).eval()
    scorer = Scorer(Session(model, tokenizer), tokenizer, Drift())
    (first, second) = scorer.read(placed("é two\ntwo é\n".encode()))
    assert first.starts.tolist() == [0, 2, 3, 6]
    ids = torch.tensor([[5, 1, 3, 2, 4, 2, 3, 1, 4]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    bits = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").numpy() / math.log(2)
    assert first.bits.sum() == pytest.approx(bits[:4].sum(), rel=1e-5)
    assert first.bits[3:6] == pytest.approx([bits[2] / 3] * 3, rel=1e-5)
    assert second.bits.sum() == pytest.approx(bits[4:].sum(), rel=1e-5)
    with pytest.raises(UserError, match="a, line 1 is not UTF-8"):
        scorer.read(placed(b"\xff\n"))
    with pytest.raises(UserError, match="cannot learn"):
        Scorer(Session(model, tokenizer), tokenizer, Drift(), Learner(8, 8))
    other = GPT2LMHeadModel(model.config)
    assert identity_of_weights(model) != identity_of_weights(other)


def test_learning_is_a_step_down_the_loss_of_what_was_read():
    """Against autograd: the change of the output matrix after one block."""
    draw = np.random.default_rng(0)
    logits, hidden = draw.normal(size=(BLOCK, 7)).astype(np.float32), draw.normal(size=(BLOCK, 5)).astype(np.float32)
    ids = draw.integers(7, size=BLOCK)
    learner = Learner(7, 5)
    nats = learner.nats(logits, hidden, ids)
    delta = torch.zeros(7, 5, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits) + torch.from_numpy(hidden) @ delta.T, torch.from_numpy(ids), reduction="none"
    )
    assert nats == pytest.approx(losses.detach().numpy(), abs=1e-5)
    (losses / torch.from_numpy((hidden**2).sum(1))).sum().backward()
    assert learner.delta == pytest.approx(-RATE * delta.grad.numpy(), abs=1e-6)
    assert learner.nats(logits, hidden, ids).sum() < nats.sum()


def test_learning_stays_finite_on_any_line():
    learner = Learner(7, 5)
    hidden = np.tile(np.array([[30.0, 0, 0, 0, 0]], np.float32), (4096, 1))
    logits = np.tile(np.array([[100.0, 0, 0, 0, 0, 0, 0]], np.float32), (4096, 1))
    nats = learner.nats(logits, hidden, np.full(4096, 3))
    assert np.isfinite(nats).all()
    assert nats[-1] < 0.1 < 90 < nats[0]


def test_learning_lowers_the_surprise_of_what_comes_again_and_leaves_the_weights(folder, model):
    weights = (folder / "model.safetensors").read_bytes()
    lines = placed(b"".join(b"%d of the same kind\n" % (number % 7) for number in range(200)))
    plain, learning = scorer_of(model), scorer_of(model, learner_of(model))
    bits_of(plain, lines)
    bits_of(learning, lines)
    assert learning.bits < 0.7 * plain.bits
    assert (folder / "model.safetensors").read_bytes() == weights
    assert bits_of(scorer_of(model), lines).sum() == pytest.approx(plain.bits, rel=1e-5)


@pytest.mark.parametrize("learn", [False, True])
def test_a_saved_state_goes_on_to_the_bit(folder, tmp_path, learn):
    """In torch; the engine's state is the same up to rounding."""
    model, tokenizer = load_model(folder, "cpu", "float32")
    config = model.config

    def scorer(session):
        learner = Learner(config.vocab_size, config.hidden_size) if learn else None
        return Scorer(session, tokenizer, Drift(), learner)

    lines = placed(TEXT * 3)
    before, after = list(chunks(lines[:9])), list(chunks(lines[9:]))
    whole = scorer(Session(model, tokenizer))
    for chunk in before:
        whole.read(chunk)
    whole.save(tmp_path / "state")
    session = open_session(model, tokenizer, tmp_path / "state")
    resumed = scorer(session)
    assert resumed.load(tmp_path / "state") is None
    for chunk in after:
        for one, other in zip(whole.read(chunk), resumed.read(chunk), strict=True):
            assert one.bits.tobytes() == other.bits.tobytes()
    assert resumed.drift.numbers() == whole.drift.numbers()
    if learn:
        assert resumed.learner.delta.tobytes() == whole.learner.delta.tobytes()
        assert np.abs(whole.learner.delta).max() > 0


MEMORY = MemoryOptions(lengths=(1, 2, 4), entries=64)


@pytest.mark.parametrize("learn", [False, True])
def test_a_memory_is_that_of_a_reader_of_single_tokens(model, learn):
    """The slow reference: its memory is handed the model's nats token by token; the bits are equal to the last."""

    def read(memory):
        session = Session(model, model.tokenizer, memory)
        scorer = Scorer(session, model.tokenizer, Drift(), learner_of(model) if learn else None)
        return [scored for chunk in chunks(lines) for scored in scorer.read(chunk)]

    lines = placed(b"the same kind of line\n" * 20 + TEXT)
    plain, mixed = read(None), read(ContextMemory(MEMORY))
    assert all(
        one.bits.tobytes() == two.bits.tobytes() for one, two in zip(mixed, read(ContextMemory(MEMORY)), strict=True)
    )
    reference = ContextMemory(MEMORY)
    reference.read(np.array([257]), np.array([np.nan]))
    for one, two in zip(plain, mixed, strict=True):
        nats = (one.bits * math.log(2)).astype(np.float32)
        ids = encode_bytes(one.line.content)
        slow = np.concatenate([reference.read(ids[[at]], nats[[at]]) for at in range(len(ids))])
        assert two.bits.tobytes() == (slow.astype(np.float64) / math.log(2)).tobytes()
    assert sum(scored.bits.sum() for scored in mixed[5:20]) < 0.2 * sum(scored.bits.sum() for scored in plain[5:20])


@pytest.mark.parametrize("learn", [False, True])
def test_a_saved_memory_goes_on_to_the_bit(folder, tmp_path, learn):
    model, tokenizer = load_model(folder, "cpu", "float32")

    def scorer(state=None):
        session = open_session(model, tokenizer, state, memory=ContextMemory(MEMORY))
        return Scorer(session, tokenizer, Drift(), Learner(259, model.config.hidden_size) if learn else None)

    lines = placed(TEXT * 3)
    before, after = list(chunks(lines[:9])), list(chunks(lines[9:]))
    whole = scorer()
    for chunk in before:
        whole.read(chunk)
    whole.save(tmp_path / "state")
    resumed = scorer(tmp_path / "state")
    resumed.load(tmp_path / "state")
    for chunk in after:
        for one, other in zip(whole.read(chunk), resumed.read(chunk), strict=True):
            assert one.bits.tobytes() == other.bits.tobytes()


def test_the_state_of_a_scorer_serves_other_commands_and_theirs_a_scorer(folder, model, tmp_path):
    scorer = scorer_of(model)
    scorer.read(placed(b"one line\n"))
    scorer.save(tmp_path / "own")
    session = open_session(model, model.tokenizer, tmp_path / "own")
    session.read(encode_bytes(b"and on"))
    session.save(tmp_path / "plain")
    assert read_beside(tmp_path / "plain") == {}
    resumed = Scorer(open_session(model, model.tokenizer, tmp_path / "plain"), model.tokenizer, Drift())
    assert resumed.load(tmp_path / "plain") is None
    (scored,) = resumed.read(placed(b"xy\n"))
    assert scored.bits[0] == 0  # nothing predicts it
    assert (scored.bits[1:] > 0).all()


def test_states_of_other_learning_are_refused(model, tmp_path):
    for learn, remedy in ((False, "leave out --learn"), (True, "add --learn")):
        scorer = scorer_of(model, learner_of(model) if learn else None)
        scorer.read(placed(b"one line\n"))
        scorer.save(tmp_path / remedy)
        other = Scorer(
            open_session(model, model.tokenizer, tmp_path / remedy),
            model.tokenizer,
            Drift(),
            None if learn else learner_of(model),
        )
        with pytest.raises(UserError, match=remedy):
            other.load(tmp_path / remedy)


def test_the_identity_of_weights_is_that_of_the_state_files(folder, model):
    in_torch, _ = load_model(folder, "cpu", "float32")
    assert identity_of_weights(model) == identity_of_weights(in_torch)
