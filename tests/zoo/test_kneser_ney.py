"""The counts are those of interpolated Kneser-Ney, beside a definition with dictionaries."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from dyadlm.zoo.kneser_ney import KneserNeyConfig, KneserNeyForCausalLM

VOCABULARY, DISCOUNT = 5, 0.75


def made(**fields) -> KneserNeyForCausalLM:
    return KneserNeyForCausalLM(KneserNeyConfig(vocab_size=VOCABULARY, order=3, entries=2**16, **fields))


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))


def defined(texts, context: tuple[int, ...]) -> list[float]:
    """Chances of every token after a context, order 3."""
    rows = [tuple(row) for row in texts.tolist()]
    counts = {3: Counter(row[at - 2 : at + 1] for row in rows for at in range(2, len(row)))}
    for order in (2, 1):
        counts[order] = Counter(gram[1:] for gram in counts[order + 1])
    chances = [1 / VOCABULARY] * VOCABULARY
    for order in range(1, len(context) + 2):
        last = context[len(context) - order + 1 :]
        found = {gram: n for gram, n in counts[order].items() if gram[:-1] == last}
        if total := sum(found.values()):
            freed = DISCOUNT * len(found) / total
            chances = [
                max(found.get((*last, token), 0) - DISCOUNT, 0) / total + freed * chances[token]
                for token in range(VOCABULARY)
            ]
    return chances


def test_chances_are_those_of_the_definition(texts):
    model = made().train()
    for row in texts:
        model(row[None])
    model.eval()
    ids = torch.tensor([[4, 0, 3, 3, 1, 2]])
    found = model(ids).logits[0].exp()
    for time in range(ids.shape[1]):
        expected = defined(texts, tuple(ids[0, max(0, time - 1) : time + 1].tolist()))
        torch.testing.assert_close(found[time].tolist(), expected, atol=1e-5, rtol=1e-5)


def test_counting_a_batch_at_once_is_counting_its_rows(texts):
    one, other = made(), made()
    one.count(texts)
    for row in texts:
        other.count(row[None])
    for name, table in one.named_buffers():
        assert torch.equal(table, dict(other.named_buffers())[name])


def test_a_batch_is_scored_before_it_is_counted(texts):
    model = made().train()
    loss = model(texts, labels=texts).loss
    assert loss.item() == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), rel=1e-5)
    assert model(texts, labels=texts).loss < loss
    loss.backward()


def test_crowded_tables_invent_no_counts():
    many = torch.randint(0, 50, (8, 400), generator=torch.Generator().manual_seed(1))
    model = KneserNeyForCausalLM(KneserNeyConfig(vocab_size=50, order=3, entries=2**9)).train()
    for row in many:
        model.count(row[None])
    chances = model.eval()(many[:1, :50]).logits.exp().sum(-1)
    assert chances.max() <= 1 + 1e-4  # what is not counted is missing, and nothing is there twice
    assert (model.counts.sum(1) <= model.totals.sum(1)).all()


def test_more_text_makes_it_better():
    rows = torch.arange(64)[:, None] * 7 % 13
    steps = torch.randint(1, 4, (64, 200), generator=torch.Generator().manual_seed(2))
    texts = (rows + steps.cumsum(1)) % 13
    model = KneserNeyForCausalLM(KneserNeyConfig(vocab_size=13, order=5, entries=2**16))
    losses = []
    for part in texts[:-8].split(14):
        model.train().count(part)
        losses.append(model.eval()(texts[-8:], labels=texts[-8:]).loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1.2  # log 3 is the least


def test_discounts_learn(texts):
    model = made().train()
    model.count(texts)
    model(texts, labels=texts).loss.backward()
    assert (model.discounts.grad != 0).all()
    assert model.embed_tokens.weight.grad.abs().max() > 0


def test_in_pieces_as_whole_and_saved_as_made(texts, tmp_path):
    model = made()
    model.count(texts)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    whole, cache, pieces = model(texts).logits, None, []
    for begin, end in [(0, 1), (1, 2), (2, 12), (12, 20)]:
        output = loaded(texts[:, begin:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
