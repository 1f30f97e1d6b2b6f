"""N-gram identity: it begins silent, reads only what was read, and nothing of it is there where it is off."""

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.accounting import parameters, state_bytes
from dyadlm.model.trace import ngram_shares

from .conftest import make_model, random_ids, text_ids

SIZES = {"ngram_sizes": [2, 3, "word"], "ngram_entries": 50, "ngram_width": 4}


def pair(**fields):
    """A model with n-grams as it is initialised, and one without that shares all other weights."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, **SIZES, **fields))
    plain = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, **fields))
    weights = {name: value for name, value in model.state_dict().items() if ".ngrams." not in name}
    plain.load_state_dict(weights)
    return model.eval(), plain.eval()


def test_a_new_model_is_the_one_without():
    model, plain = pair()
    ids = text_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    names = {"model.ngrams.tables.weight", "model.ngrams.project.weight"}
    assert model.state_dict().keys() - plain.state_dict().keys() == names
    assert parameters(model.config) - parameters(plain.config) == 3 * 50 * 4 + 12 * 32
    assert plain.model.ngrams is None
    # What slots keep of the text is enough for these n-grams: the state is the same.
    assert state_bytes(model.config) == state_bytes(plain.config)


def test_the_state_is_the_last_tokens_and_the_open_word():
    config = DyadConfig(hidden_size=16, num_hidden_layers=1, num_levels=2, **(SIZES | {"ngram_sizes": [5, "word"]}))
    state = DyadForCausalLM(config)(random_ids(2, 9), use_cache=True).past_key_values.tensors()
    assert state["text.contexts.0"].tolist() == random_ids(2, 9)[:, -4:].tolist()
    assert state["text.contexts.1"].shape == (2, 3)
    plain = DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=1, num_levels=2))
    state = plain(random_ids(2, 9), use_cache=True).past_key_values.tensors()
    assert not any(name.startswith("text") for name in state)


def test_no_embedding_depends_on_a_token_that_was_not_read():
    model = make_model(**SIZES)
    ids = text_ids(1, 30)
    embedded = []
    model.model.identity_norm.register_forward_hook(lambda module, inputs, output: embedded.append(inputs[0]))
    for t in range(1, 30):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1 + random_ids(1, 30 - t, seed=t, vocabulary=200)) % 256
        embedded.clear()
        with torch.no_grad():
            model(ids)
            model(changed)
        assert torch.equal(embedded[0][:, :t], embedded[1][:, :t])
        assert not torch.equal(embedded[0][:, t], embedded[1][:, t])


def test_an_ngram_stays_in_its_document():
    """The first two tokens of a packed document say what they say at the start of a text."""
    model = make_model(**SIZES)
    ids = text_ids(1, 20)
    positions = torch.cat([torch.arange(11), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits[:, 11:]
        torch.testing.assert_close(packed, model(ids[:, 11:]).logits, rtol=1e-9, atol=1e-9)
        told_nothing = model(ids).logits[:, 11:]
    assert not torch.allclose(packed, told_nothing)


def test_tables_learn_where_their_rows_were_read():
    model, _ = pair()
    ids = text_ids(2, 30)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    ngrams = model.model.ngrams
    assert ngrams.project.weight.grad.abs().sum() > 0
    assert not ngrams.tables.weight.grad.any()  # while the projection is zero
    with torch.no_grad():
        ngrams.project.weight.normal_()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    moved = ngrams.tables.weight.grad.any(1)
    assert 0 < moved.sum() < 150


def test_a_larger_vocabulary_keeps_the_meaning_of_the_tables():
    model = make_model(preset="tiny", dtype=torch.float32, hidden_size=32, **SIZES)
    ids = text_ids(1, 30)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(300)
        torch.testing.assert_close(model(ids).logits[..., :259], before)


def test_how_much_they_add_is_told():
    model, plain = pair()
    ids = text_ids(2, 12)
    assert not ngram_shares(model, ids).any()
    assert ngram_shares(plain, ids) is None
    with torch.no_grad():
        model.model.ngrams.project.weight.normal_()
    shares = ngram_shares(model, ids)
    assert shares.shape == (2, 12)
    assert (shares > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngram_sizes": [0]}, "ngram_sizes names 0"),
        ({"ngram_sizes": ["line"]}, "ngram_sizes names 'line'"),
        ({"ngram_sizes": [True]}, "ngram_sizes names True"),
        ({"ngram_sizes": [2, 2]}, "ngram_sizes names something twice"),
        ({"ngram_entries": 0}, "ngram_entries is 0"),
        ({"ngram_width": 1.5}, "ngram_width is 1.5"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DyadConfig(**fields)


def test_embeddings_in_place_of_tokens_are_refused():
    model = make_model(**SIZES)
    with pytest.raises(UserError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.float64))
