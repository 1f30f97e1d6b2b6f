"""Probes find what levels hold, where they hold it, and nothing where there is nothing."""

import json
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.data import byte_tokenizer
from dyadlm.evaluate.level_probe import probe_levels, ridge_classes, sentences_of, words_of
from dyadlm.model.tower import Tower
from dyadlm.model.trace import level_features


def make(**fields) -> DyadForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_levels": 5, "semantic_levels": ["word"], "salience": True}
    model = DyadForCausalLM(DyadConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def story(sentences: int = 120) -> bytes:
    """Sentences of three words that differ in the first letter alone."""
    draw = random.Random(0)
    words = ["xab", "yab", "zab", "wab", "uab"]
    parts = [f"{draw.choice(words[:4])} {draw.choice(words)} {draw.choice(words)}. " for _ in range(sentences)]
    return "".join(parts).encode()


def test_words_and_sentences():
    text = b"Don't go, Romeo! I... will. Yes."
    words = [(text[a:b], label) for a, b, label in words_of(text)]
    assert words[:3] == [(b"Don't", "don't"), (b"go", "go"), (b"Romeo", "romeo")]
    assert [label for _, label in words[3:]] == ["i", "will", "yes"]
    found = [(text[a:b], label) for a, b, label in sentences_of(text)]
    assert found == [(b"Don't go, Romeo!", "don't")]  # the others have one word before their first stop


def test_ridge_is_the_least_penalised_square():
    torch.manual_seed(0)
    x, labels, asked = torch.randn(60, 3).double(), torch.randint(0, 3, (60,)), torch.randn(40, 3).double()
    scaled, other = (x - x.mean(0)) / x.std(0), (asked - x.mean(0)) / x.std(0)
    weights = torch.zeros(3, 3).double().requires_grad_()
    target = torch.nn.functional.one_hot(labels, 3).double()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-10)

    def loss():
        optimizer.zero_grad()
        rest = target - target.mean(0) - scaled @ weights
        value = rest.square().sum() + 0.01 * 60 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    expected = (other @ weights + target.mean(0)).argmax(1)
    assert torch.equal(ridge_classes(x, labels, asked, 3), expected)
    assert len(set(expected.tolist())) == 3


@pytest.mark.parametrize("tower", ["layer", "input"])
def test_features_are_what_the_levels_say_in_a_forward_pass(tower, monkeypatch):
    model = make(tower=tower)
    ids = torch.tensor([list(story()[:48]), list(story()[50:98])])
    found = level_features(model, ids)
    heard = []
    listen = Tower.read_levels
    monkeypatch.setattr(Tower, "read_levels", lambda *a: (heard.append(listen(*a)), heard[-1])[1])
    with torch.no_grad():
        model(ids)
    assert len(found) == len(heard) == (2 if tower == "layer" else 1)
    for levels, (said, _) in zip(found, heard, strict=True):
        assert list(levels) == list(range(6))
        for level in (0, 1, 2, 3, 5):
            torch.testing.assert_close(levels[level], said.features[level])
        assert levels[4].shape == (2, 48, said.features[4].shape[-1])
        assert torch.equal(levels[4][:, 7:15], said.features[4][:, 1:2].expand(-1, 8, -1))  # nodes every 8 tokens
        assert torch.equal(levels[4][:, 15:23], said.features[4][:, 2:3].expand(-1, 8, -1))
        assert not levels[4][:, :7].any()


def test_probes_find_what_levels_hold():
    model = make().train()
    result = probe_levels(model, byte_tokenizer(), story(), window=64, classes=4)
    assert model.training
    content = story()
    count = len(content) // 64
    fitted = int(0.75 * count)
    for scores, spans in ((result.word, words_of(content)), (result.sentence, sentences_of(content))):
        whole = [span for span in spans if span.begin // 64 == (span.end - 1) // 64 < count]
        known = [span for span in whole if span.label in scores.classes]
        assert scores.fitted == sum(span.begin // 64 < fitted for span in known)
        assert scores.tested == len(known) - scores.fitted
        tested = [span.label for span in known if span.begin // 64 >= fitted]
        assert scores.chance == pytest.approx(tested.count(scores.classes[0]) / len(tested))
        assert len(scores.classes) == 4
        assert [(score.block, score.level) for score in scores.levels] == [
            (block, name) for block in (0, 1) for name in ("1", "2", "4", "8", "16", "word")
        ]
        assert all(abs(score.shuffled - scores.chance) < 0.35 for score in scores.levels)
        assert scores.mean() == pytest.approx(sum(score.accuracy for score in scores.levels) / 12)
    one, word = result.word.levels[0], result.word.levels[5]
    assert abs(one.accuracy - result.word.chance) < 0.2  # two tokens, which are the same in every word
    assert word.accuracy > 0.95
    assert word.interval[0] <= word.accuracy <= word.interval[1]
    assert json.loads(json.dumps(result.to_dict()))["word"]["levels"][5]["level"] == "word"


def test_nothing_is_found_where_there_is_nothing():
    model = make()
    with torch.no_grad():
        for layer in model.model.layers:
            for bottleneck in layer.tower.bottlenecks:
                bottleneck.weight.zero_()
    result = probe_levels(model, byte_tokenizer(), story(), window=64, classes=4)
    for scores in (result.word, result.sentence):
        assert all(score.accuracy == pytest.approx(scores.chance) for score in scores.levels)


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(UserError, match="fills 1 windows of 256 tokens; give a longer text"):
        probe_levels(make(), byte_tokenizer(), story(40)[:300])
    with pytest.raises(UserError, match="too few words or sentences"):
        probe_levels(make(), byte_tokenizer(), b"a b c d. " * 64, window=32)
    llama = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UserError, match="llama model has no levels to probe"):
        probe_levels(LlamaForCausalLM(llama), byte_tokenizer(), story())
