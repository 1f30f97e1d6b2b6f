"""Models whose likelihoods are known exactly, and the laws that tie the three ways of cutting."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.causal_lm import continues
from dyadlm.data.streams import TokenStream
from dyadlm.errors import RunFailed, UserError
from dyadlm.evaluate import evaluate, require_same_vocabulary
from dyadlm.evaluate.bootstrap import ratio_interval
from dyadlm.evaluate.scoring import score
from dyadlm.evaluate.windows import disjoint_windows, one_window, rolling_windows

BEGIN, END = 27, 28


def letters(extra: tuple[str, ...] = ("<|begin|>", "<|end|>")) -> PreTrainedTokenizerFast:
    """A tokenizer of the letters a..z and the euro sign (ids 0..26), then the given specials."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz€")}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = dict(zip(("bos_token", "eos_token"), extra, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class KnownModel(torch.nn.Module):
    """Stands in for a causal LM: P(next | previous) is a table, sharpened by the inputs seen.

    Its state is the number of inputs seen, so what a window is shown is visible in its likelihoods.
    """

    def __init__(self, table: torch.Tensor, by_age: float = 0.0):
        super().__init__()
        self.table, self.by_age = table, by_age
        self.embedding = torch.nn.Embedding(len(table), 1)
        self.config = SimpleNamespace(max_position_embeddings=8)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.seen: list[list[int]] = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        self.seen.extend(input_ids.tolist())
        age = (past_key_values or 0) + torch.arange(input_ids.shape[1])
        logits = self.table[input_ids] * (1.0 + self.by_age * age)[:, None]
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + input_ids.shape[1])


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=BEGIN, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def letters_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(26, size=length)


def plain(ids) -> TokenStream:
    """One document without an end; every token is one byte."""
    return TokenStream.from_tokens(ids, byte_lengths=np.ones(len(ids)))


def ended(*documents) -> TokenStream:
    """Documents that end with `<|end|>`, as prepared data has them."""
    ids = np.concatenate([[*document, END] for document in documents])
    return TokenStream.from_tokens(ids, END, byte_lengths=ids != END)


def test_known_distribution_gives_exact_nats():
    probabilities = torch.rand(29, 29).softmax(-1)
    model = KnownModel(probabilities.log())
    ids = letters_of(37).tolist()
    expected = -sum(math.log(probabilities[a, b]) for a, b in zip([BEGIN, *ids], ids, strict=False))
    for options in ({}, {"window": 5}, {"mode": "rolling"}, {"mode": "stream"}, {"batch_size": 1}):
        result = evaluate(model, plain(letters_of(37)), letters(), **options)
        assert result.nats_per_token == pytest.approx(expected / 37, abs=1e-6)
        assert result.bits_per_byte == pytest.approx(expected / 37 / math.log(2), abs=1e-6)
        assert (result.tokens, result.bytes) == (37, 37)


def test_uniform_model_scores_the_logarithm_of_the_vocabulary():
    result = evaluate(KnownModel(torch.zeros(29, 29)), plain(letters_of(50)), letters())
    assert result.nats_per_token == pytest.approx(math.log(29), abs=1e-6)


def test_a_window_is_shown_one_token_of_context_and_a_fresh_state():
    model = KnownModel(torch.zeros(29, 29))
    evaluate(model, plain(range(8)), letters(), window=3)
    assert model.seen == [[BEGIN, 0, 1], [2, 3, 4], [5, 6, 0]]  # the last one is padded


def test_rolling_moves_the_last_window_back():
    model = KnownModel(torch.zeros(29, 29))
    evaluate(model, plain(range(8)), letters(), window=3, mode="rolling")
    assert model.seen == [[BEGIN, 0, 1], [2, 3, 4], [4, 5, 6]]


@pytest.mark.parametrize("cut", [disjoint_windows, rolling_windows, lambda a, b, n: one_window(a, b)])
@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 1), (0, 6), (0, 7), (5, 23), (5, 24)])
def test_every_token_is_scored_exactly_once(cut, begin, end):
    windows = list(cut(begin, end, 6))
    assert [t for w in windows for t in range(w.first, w.stop)] == list(range(begin, end))
    assert all(w.start < w.first and w.opening == (w.start < begin) for w in windows)


def test_rolling_is_what_lm_eval_scores():
    """The windows of `get_rolling_token_windows` and `make_disjoint_window`, for 7 tokens and 3."""
    windows = [(w.start, w.first, w.stop) for w in rolling_windows(0, 7, 3)]
    assert windows == [(-1, 0, 3), (2, 3, 6), (3, 6, 7)]


def test_pieces_are_in_place_however_they_are_cut(llama, monkeypatch):
    stream = plain(letters_of(53))
    ids = torch.tensor(np.append(BEGIN, stream.tokens(0, 53))).long()[None]
    with torch.no_grad():
        logp = llama(ids[:, :-1]).logits.log_softmax(-1)
    expected = -logp.gather(-1, ids[:, 1:, None])[0, :, 0].numpy()
    for longest in (4096, 7, 1):
        monkeypatch.setattr("dyadlm.evaluate.scoring.LONGEST_CHUNK", longest)
        got = np.full(53, np.nan)
        for first, piece in score(llama, stream, one_window(0, 53), BEGIN, batch_size=4):
            assert np.isnan(got[first : first + len(piece)]).all()
            got[first : first + len(piece)] = piece
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_disjoint_equals_rolling_when_the_length_divides(llama):
    for length, equal in ((48, True), (51, False)):
        a = evaluate(llama, plain(letters_of(length)), letters())
        b = evaluate(llama, plain(letters_of(length)), letters(), mode="rolling")
        assert (a.nats_per_token == pytest.approx(b.nats_per_token, abs=1e-6)) is equal


def test_stream_equals_one_long_window(llama, monkeypatch):
    stream = plain(letters_of(100))
    whole = evaluate(llama, stream, letters(), window=100).nats_per_token
    monkeypatch.setattr("dyadlm.evaluate.scoring.LONGEST_CHUNK", 9)
    assert evaluate(llama, stream, letters(), mode="stream").nats_per_token == pytest.approx(whole, abs=1e-5)
    stateful = KnownModel(torch.rand(29, 29), by_age=0.1)
    carried = evaluate(stateful, stream, letters(), mode="stream").nats_per_token
    assert carried == pytest.approx(evaluate(stateful, stream, letters(), window=100).nats_per_token, abs=1e-6)
    assert carried != pytest.approx(evaluate(stateful, stream, letters(), window=10).nats_per_token, abs=1e-2)


def test_batches_and_memory_limit_change_nothing(llama, monkeypatch):
    texts = ended(*(letters_of(n) for n in (3, 40, 17, 16, 33)))
    expected = evaluate(llama, texts, letters(), mode="rolling", batch_size=1)
    assert evaluate(llama, texts, letters(), mode="rolling").nats_per_token == pytest.approx(
        expected.nats_per_token, abs=1e-6
    )
    monkeypatch.setattr("dyadlm.evaluate.scoring.LOGITS_AT_ONCE", 29 * 5)
    assert continues(llama) == "in pieces"  # found out on a few tokens, which are not counted here
    sizes = []
    llama.register_forward_hook(lambda _, __, output: sizes.append(output.logits.numel()))
    assert evaluate(llama, texts, letters(), mode="rolling").nats_per_token == pytest.approx(
        expected.nats_per_token, abs=1e-5
    )
    assert max(sizes) <= 29 * 5


def test_the_memory_limit_counts_every_opinion_of_a_consensus(monkeypatch):
    planner = {"planner": "head", "planner_width": 4, "planner_futures": 3}
    model = DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=2, vocab_size=29, **planner)).eval()
    monkeypatch.setattr("dyadlm.evaluate.scoring.LOGITS_AT_ONCE", 29 * 30)
    seen = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits.numel()))
    for mass, largest in ((0.0, 29 * 30), (0.9, 29 * 6)):
        model.config.consensus = mass
        seen.clear()
        evaluate(model, plain(letters_of(90)), letters(), window=90)
        assert max(seen) == largest


def test_documents_of_a_prepared_stream(llama):
    documents = [range(6), range(6, 9), letters_of(40)]
    prepared, alone = ended(*documents), [plain(document) for document in documents]
    rolling = evaluate(llama, prepared, letters(), mode="rolling")
    apart = evaluate(llama, alone, letters(), mode="rolling")
    assert (rolling.tokens, rolling.bytes, rolling.documents) == (49, 49, 3)
    assert (apart.tokens, apart.bytes, apart.documents) == (49, 49, 3)
    assert rolling.bits_per_byte == pytest.approx(apart.bits_per_byte, abs=1e-6)
    disjoint = evaluate(llama, prepared, letters())
    assert (disjoint.tokens, disjoint.bytes, disjoint.documents) == (52, 49, 3)
    # No window crosses from one stream to the next.
    twice = evaluate(llama, [prepared, prepared], letters())
    assert (twice.tokens, twice.documents) == (104, 6)
    assert twice.nats_per_token == pytest.approx(disjoint.nats_per_token, abs=1e-6)


def test_interval_is_over_documents_or_blocks(llama):
    model = KnownModel(torch.rand(29, 29) * 3)
    few = evaluate(model, [plain(letters_of(9000))], letters(), window=64)
    assert few.interval_over == "blocks of 2048 tokens"
    assert few.interval[0] < few.bits_per_byte < few.interval[1]
    many = evaluate(model, ended(*(letters_of(n) for n in range(40, 70))), letters())
    assert (many.interval_over, many.documents) == ("documents", 30)
    assert many.interval[0] < many.bits_per_byte < many.interval[1]
    assert many.interval == evaluate(model, ended(*(letters_of(n) for n in range(40, 70))), letters()).interval
    assert evaluate(model, plain(range(3)), letters()).interval is None


@pytest.mark.slow
def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sizes = generator.integers(50, 500, size=60).astype(float)
        low, high = ratio_interval(generator.normal(2.0 * sizes, 20.0), sizes, seed=trial)
        covered += low <= 2.0 <= high
    assert 180 <= covered <= 198


def test_interval_narrows_with_the_root_of_the_number_of_units():
    generator = np.random.default_rng(1)
    width = {}
    for units in (100, 1600):
        low, high = ratio_interval(generator.normal(2.0, 0.5, units), np.ones(units))
        width[units] = high - low
        assert width[units] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(units), rel=0.25)


def test_a_text_is_one_document():
    result = evaluate(KnownModel(torch.zeros(29, 29)), "a€b", letters())
    assert (result.tokens, result.bytes, result.documents) == (4, 5, 1)
    assert evaluate(KnownModel(torch.zeros(29, 29)), "a€b", letters(), mode="rolling").tokens == 3


def test_result_is_json_and_the_model_keeps_its_mode(llama):
    llama.train()
    calls = []
    result = evaluate(llama, plain(letters_of(40)), letters(), progress=lambda *done: calls.append(done))
    assert llama.training
    assert calls[-1] == (40, 40)
    assert json.loads(json.dumps(result.to_dict()))["window"] == 16


def test_wrong_requests_are_told(llama):
    with pytest.raises(UserError, match="no text"):
        evaluate(llama, "", letters())
    with pytest.raises(UserError, match="at least 1 token, not 0"):
        evaluate(llama, plain(range(3)), letters(), window=0)
    with pytest.raises(UserError, match="not both"):
        evaluate(llama, plain(range(3)), letters(), window=3, mode="stream")
    with pytest.raises(UserError, match="29 tokens but the model knows 28"):
        evaluate(KnownModel(torch.zeros(28, 28)), plain(range(3)), letters())
    with pytest.raises(UserError, match="bos_token"):
        evaluate(llama, plain(range(3)), letters(extra=()))
    with pytest.raises(UserError, match="token 28 but the model knows only 28"):
        evaluate(KnownModel(torch.zeros(28, 28)), ended(range(2)), letters(extra=("<|begin|>",)))
    with pytest.raises(UserError, match="another vocabulary"):
        require_same_vocabulary(letters(), letters(extra=("<|begin|>",)))
    model = KnownModel(torch.zeros(29, 29))
    del model.config.max_position_embeddings
    with pytest.raises(UserError, match="give the window"):
        evaluate(model, plain(range(3)), letters())


def test_a_diverged_model_fails_rather_than_scores():
    with pytest.raises(RunFailed, match="not numbers"):
        evaluate(KnownModel(torch.full((29, 29), torch.nan)), plain(range(3)), letters())
