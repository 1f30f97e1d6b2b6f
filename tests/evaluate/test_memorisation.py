"""Measures of what is known by heart, against models that know everything or nothing."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.data.canaries import CanaryPlan, draw_references, plan_canaries
from dyadlm.evaluate.memorisation import (
    Estimate,
    even_windows,
    exposures,
    forced_positions,
    forced_scores,
    generalisation_gap,
    lexicon,
    memorisation,
    memorisation_of_run,
    read,
    recite,
    whiteout,
)

LIKELY = 12.0


class Scripted(nn.Module):
    """A model over bytes whose guess for the next token is a function of the tokens so far; None: it has no idea."""

    device = torch.device("cpu")

    def __init__(self, guess, likely=LIKELY):
        super().__init__()
        self.guess, self.likely = guess, likely
        self.table = nn.Embedding(259, 1)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, use_cache):
        assert not self.training
        logits = torch.zeros(*input_ids.shape, 259)
        for row, tokens in enumerate(input_ids.tolist()):
            for at in range(len(tokens)):
                said = self.guess(tokens[: at + 1])
                if said is not None:
                    logits[row, at, said] = self.likely
        return type("Output", (), {"logits": logits})


def knows(strings, letters=0):
    """Goes on with a string that it has by heart, once it has read `letters` of it."""
    after = {tuple(tokens[:at]): tokens[at] for tokens in strings for at in range(letters, len(tokens))}

    def guess(tokens):
        return next((after[tuple(tokens[i:])] for i in range(len(tokens)) if tuple(tokens[i:]) in after), None)

    return guess


@pytest.fixture(scope="module")
def plan():
    return plan_canaries(1, 3, byte_tokenizer(), 85, 40)


def test_who_knows_members_by_heart_is_exposed_to_the_last_bit(plan):
    known = [canary.tokens for canary in plan.members if canary.repetitions >= 16]
    model = Scripted(knows(known, letters=5)).train()
    result = memorisation(model, plan, byte_tokenizer(), references=63)
    assert model.training
    assert result.most == 6
    assert [group.repetitions for group in result.groups] == [1, 4, 16, 64]
    for group in result.groups:
        by_heart = group.repetitions >= 16
        assert group.exposure.mean == 6 if by_heart else group.exposure.mean < 2
        assert group.extracted.mean == by_heart
        assert group.twin_extracted.mean == 0
        nats = np.log(259) * 5 + 19 * np.log1p(258 * np.exp(-LIKELY)) if by_heart else np.log(259) * 24
        assert group.nats.mean == pytest.approx(nats / 24, rel=1e-5)
        assert group.twin_nats.mean == pytest.approx(np.log(259), rel=1e-5)
        assert group.exposure.interval is None  # of a single canary
    assert (result.together.exposure.units, result.together.extracted.mean) == (4, 0.5)
    assert result.together.twin_exposure.mean < 2


@pytest.mark.parametrize(("prefix", "extracted"), [(11, 0.0), (12, 1.0)])
def test_what_is_given_need_not_be_known(plan, prefix, extracted):
    model = Scripted(knows([canary.tokens for canary in plan.members], letters=12)).eval()
    result = memorisation(model, plan, byte_tokenizer(), references=1, prefix=prefix)
    assert result.together.extracted.mean == extracted


def test_strings_that_nobody_knows_are_exposed_by_chance():
    random = np.random.default_rng(0)
    bits = exposures(random.normal(size=20_000), random.normal(size=20_000))
    assert bits.mean() == pytest.approx(math.log2(math.e), abs=4 * math.log2(math.e) / 20_000**0.5 + 0.02)
    # To whom all strings are alike, each is in the middle.
    assert exposures(np.zeros(3), np.zeros(1023)) == pytest.approx([10 - math.log2(1 + 1023 / 2)] * 3)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=20)
)  # few numbers: ties
def test_exposure_is_that_of_a_slow_rank(strings, references):
    expected = []
    for nats in strings:
        rank = 1.0
        for other in references:
            rank += 1.0 if other < nats else 0.5 if other == nats else 0.0
        expected.append(math.log2(len(references) + 1) - math.log2(rank))
    assert exposures(np.array(strings, float), np.array(references, float)) == pytest.approx(expected)


def test_references_are_drawn_like_canaries_and_are_others(plan):
    tokenizer = byte_tokenizer()
    drawn = draw_references(50, plan.seed, tokenizer)
    assert drawn == draw_references(50, plan.seed, tokenizer) != draw_references(50, plan.seed + 1, tokenizer)
    canaries = [canary.tokens for canary in [*plan.members, *plan.twins]]
    assert {len(tokens) for tokens in drawn} == {24} == {len(tokens) for tokens in canaries}
    assert not {tuple(tokens) for tokens in drawn} & {tuple(tokens) for tokens in canaries}


def test_reciting_is_greedy_decoding():
    """Strings of unequal length, each after the same context, against decoding token by token."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=1)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    context, strings = [7, 8, 9], []
    for number in range(6):
        tokens = [*context, 20 + number, 40, 50]
        for _ in range(3 + number):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        strings.append(tokens[3:])
    strings[2][-1] ^= 1
    strings[3][3] ^= 1  # the first to complete
    strings[4][1] ^= 1  # a given one: another beginning, and another completion
    nats, completed = recite(partial(read, model), strings, context, prefix=3)
    assert completed.tolist()[:4] + completed.tolist()[5:] == [True, True, False, False, True]
    for tokens, found in zip(strings, nats, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + tokens])).logits[0].log_softmax(-1)
        expected = -sum(logits[2 + at, token].item() for at, token in enumerate(tokens))
        assert found == pytest.approx(expected, rel=1e-4)


def test_estimates_have_intervals():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    estimate = Estimate.of(values)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.interval == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.04)


def test_a_run_is_asked_for_what_it_planted(tmp_path, plan):
    torch.manual_seed(0)
    DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"data\.canaries"):
        memorisation_of_run(tmp_path)
    (tmp_path / "canaries.json").write_text("[]")
    with pytest.raises(UserError, match="no record of canaries"):
        memorisation_of_run(tmp_path)
    (tmp_path / "canaries.json").write_text(json.dumps(plan.to_dict()))
    result = memorisation_of_run(tmp_path)
    assert (result.references, result.most, result.together.exposure.units) == (1023, 10, 4)
    assert CanaryPlan.from_dict(json.loads((tmp_path / "canaries.json").read_text())) == plan


# ---- Gap


def test_the_gap_is_what_was_learned_of_the_training_text():
    training, validation = (TokenStream.from_tokens(np.full(500, ord(letter))) for letter in "ab")
    gap = generalisation_gap(Scripted(lambda tokens: ord("a"), 2.5), training, validation, window=16)
    assert gap.gap == pytest.approx(2.5, rel=1e-5)
    assert gap.interval == pytest.approx((2.5, 2.5), rel=1e-5)
    assert gap.training.mean == pytest.approx(math.log(math.exp(2.5) + 258) - 2.5, rel=1e-5)
    assert (gap.training.units, gap.validation.units) == (31, 31)
    mixed = TokenStream.from_tokens(np.repeat([ord("a"), ord("b")], 250))
    gap = generalisation_gap(Scripted(lambda tokens: ord("a"), 2.5), training, mixed, window=16)
    assert gap.interval[0] < gap.gap < gap.interval[1]
    assert gap.gap == pytest.approx(2.5 * 15 / 31, abs=0.1)


@given(size=st.integers(2, 300), window=st.integers(1, 40), tokens=st.integers(1, 300))
@settings(deadline=None)
def test_windows_are_disjoint_and_spread(size, window, tokens):
    if window >= size:
        window = size - 1
    rows, starts = even_windows(TokenStream.from_tokens(np.arange(size)), window, tokens)
    assert (rows == starts[:, None] + np.arange(window + 1)).all()
    assert len(set(rows[:, 1:].ravel().tolist())) == rows[:, 1:].size  # every target once
    assert rows.max() < size
    assert 1 <= len(rows) <= math.ceil(tokens / window)
    assert len(rows) >= min((size - 1) // window, tokens // window / 2)


# ---- Whiteout

TEXT = b"the then than, Hamlet! hamlet; xylophone the"
WORDS = lexicon(b"The the then than Hamlet hamlets")


def test_a_letter_is_forced_if_one_word_begins_so():
    starts = forced_positions(TEXT, WORDS)
    forced = "".join(chr(byte) if start >= 0 else "." for byte, start in zip(TEXT, starts, strict=True))
    assert forced == "." * 12 + "n" + "." * 3 + "amlet" + "." * 23
    assert starts[12] == 9
    assert set(starts[16:21]) == {15}


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=8), st.text("ab ", max_size=40))
def test_forced_positions_are_those_of_a_slow_search(words, text):
    words = {word.encode() for word in words}
    expected, start = [], 0
    for at, letter in enumerate(text):
        if at and text[at - 1] == " ":
            start = at
        word, before = text[start:].split(" ")[0].encode(), text[start:at].encode()
        one = sum(other.startswith(before) for other in words) == 1
        expected.append(start if letter != " " and before and word in words and one else -1)
    assert forced_positions(text.encode(), words).tolist() == expected


def test_scores_are_those_of_the_forced_letters():
    tokens = [*TEXT, 258, *TEXT]
    stream = TokenStream.from_tokens(np.array(tokens), 258)
    right = Scripted(lambda read: ord("a"))  # of the forced letters, the first of "Hamlet"
    bits, hits, counts = forced_scores(right, stream, WORDS, window=13)
    # Windows begin at targets 1, 14, 27, 40, 53, 66; forced are 12 and 16-20 and the same 45 later.
    assert counts.tolist() == [1, 5, 0, 0, 6, 0]
    assert hits.tolist() == [0, 1, 0, 0, 1, 0]
    wrong = math.log2(math.exp(LIKELY) + 258)
    assert bits == pytest.approx(counts * wrong - hits * LIKELY / math.log(2), rel=1e-5)
    # A special token ends a word.
    apart = TokenStream.from_tokens(np.array([*b"than", 258, *b"Hamlet"]), 258)
    assert forced_scores(right, apart, WORDS, window=10)[2].tolist() == [6]
    # A word that began before its window is not forced there: with windows of 10, "than" is cut.
    assert forced_scores(right, stream, WORDS, window=10)[2].tolist()[:2] == [0, 5]


@pytest.mark.parametrize(
    ("bits", "accuracy", "regained", "forgotten"),
    [
        ((0.9, 0.5, 0.2, 0.5), (0.2, 0.6, 0.9, 0.5), 0.3, 0.4),
        ((0.9, 0.5, 0.4, 0.1), (0.2, 0.6, 0.7, 0.9), 0.0, 0.0),
    ],
)
def test_whiteout_is_what_was_learned_and_lost(bits, accuracy, regained, forgotten):
    counts = np.array([10.0, 0.0, 30.0, 20.0])
    scores = np.stack([np.stack([b * counts, a * counts, counts]) for b, a in zip(bits, accuracy, strict=True)])
    found = whiteout(scores)
    assert found.regained == pytest.approx(regained)
    assert found.forgotten == pytest.approx(forgotten)
    assert found.interval == pytest.approx((regained, regained))
    assert (found.bits, found.accuracy) == (pytest.approx(list(bits)), pytest.approx(list(accuracy)))
    assert found.characters == 60
    assert whiteout(scores[:, :, 2:3]).interval is None


def test_intervals_of_whiteout_are_over_windows():
    random = np.random.default_rng(0)
    counts = np.full(200, 5.0)
    best, last = random.gamma(2, 1, size=(2, 200))
    found = whiteout(np.stack([[part, 0 * part, counts] for part in (best + 9, best, last + 2)]))
    error = 1.96 * (last - best).std() / 5 / 200**0.5
    assert found.interval == pytest.approx((found.regained - error, found.regained + error), abs=0.2 * error)


def test_reading_leaves_a_model_as_it_was():
    model = Scripted(lambda tokens: None).train()
    nats, likeliest = read(model, np.array([[1, 0, 3], [4, 5, 6]]))
    assert model.training
    assert nats == pytest.approx(np.full((2, 2), np.log(259)))
    assert likeliest.tolist() == [[True, False], [False, False]]  # of equals the first
