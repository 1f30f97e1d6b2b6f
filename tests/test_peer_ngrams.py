"""N-grams beside a model of others: silent at first, those of ours, causal, and kept where a text is read in pieces."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.causal_lm import Continuation
from dyadlm.model.boundaries import TextState
from dyadlm.model.text import read_text
from dyadlm.ops import make_clock
from dyadlm.peer_ngrams import add_ngrams
from dyadlm.train.optimizer import matrix_parameters

SIZES = [2, 3, "word"]
TEXT = b"the cat sat on the mat, and the cat sat on the hat. What cat? "


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, max_position_embeddings=128)).eval()


def mamba() -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=259, **sizes, chunk_size=16)).eval()


@pytest.fixture(params=[llama, mamba])
def peer(request):
    return request.param()


def ids(length=48):
    return torch.tensor([list((TEXT * 3)[start : start + length]) for start in (0, 11)])


def with_ngrams(model, **options):
    ngrams = add_ngrams(model, SIZES, **({"entries": 40, "width": 4} | options))
    with torch.no_grad():
        ngrams.project.weight.normal_()
    return ngrams


@torch.no_grad()
def test_at_first_nothing_changes(peer):
    before = peer(ids()).logits
    add_ngrams(peer, SIZES, entries=40, width=4)
    assert torch.equal(peer(ids()).logits, before)


@torch.no_grad()
def test_rows_are_those_of_our_own_models(peer):
    ngrams = with_ngrams(peer)
    own = DyadForCausalLM(
        DyadConfig(hidden_size=16, num_hidden_layers=1, ngram_sizes=SIZES, ngram_entries=40, ngram_width=4)
    )
    rows = read_text(own.model, ids(), None, make_clock(2, 48), TextState())[2]
    seen = []
    ngrams.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    peer(ids())
    assert torch.equal(seen[0], rows)
    own.model.ngrams.load_state_dict(ngrams.state_dict(), strict=False)
    assert torch.equal(own.model.ngrams(rows), ngrams(rows))


@torch.no_grad()
def test_a_text_in_pieces_is_the_text_at_once(peer):
    with_ngrams(peer)
    whole, reader = peer(ids(), use_cache=False).logits, Continuation(peer)
    pieces = [reader.read(ids()[:, a:b]) for a, b in ((0, 9), (9, 10), (10, 31), (31, 48))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_goes_on_with_the_state():
    model = llama()
    with_ngrams(model)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    one = ids()[:1]
    with_state, without = (model.generate(one, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_state, without)


@torch.no_grad()
def test_no_token_to_come_is_hashed(peer):
    with_ngrams(peer)
    changed = ids()
    changed[:, 30:] = 65
    difference = (peer(ids()).logits - peer(changed).logits).abs().amax((0, 2))
    assert difference[:30].max() < 1e-5
    assert difference[30] > 1e-3


def test_they_are_trained_with_the_model(peer):
    with_ngrams(peer)
    tokens = ids()
    peer.train()(tokens, labels=tokens).loss.backward()
    assert peer.ngrams.tables.weight.grad.any()
    assert "ngrams.project.weight" in matrix_parameters(peer)
    assert "ngrams.tables.weight" not in matrix_parameters(peer)


@torch.no_grad()
def test_what_they_cannot_read_is_refused():
    model = llama()
    with_ngrams(model)
    mask = torch.ones_like(ids())
    mask[0, 0] = 0
    with pytest.raises(UserError, match="pad on the right"):
        model(ids(), attention_mask=mask)
    with pytest.raises(UserError, match="give each a row of its own"):
        model(ids(), position_ids=torch.arange(48)[None] % 20)
    with pytest.raises(UserError, match="has n-grams of its own"):
        add_ngrams(DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=1)), SIZES)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UserError, match="give the tokenizer"):
        add_ngrams(other, SIZES)
