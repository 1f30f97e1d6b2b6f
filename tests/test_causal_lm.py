"""Models of others are read on as they can: in pieces, token by token, or from the beginning; limits are told."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CTRLConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
    RecurrentGemmaConfig,
    ReformerConfig,
    RobertaConfig,
    RwkvConfig,
    XLNetConfig,
)

from dyadlm.causal_lm import Continuation, context_of, continues, position_limit, require_causal
from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.errors import UserError
from dyadlm.evaluate import evaluate, scoring
from dyadlm.evaluate.evaluation import window_length
from dyadlm.generate import Sampling, Session

IDS = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **IDS),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **IDS),
    "mamba2": Mamba2Config(
        hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16, **IDS
    ),
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, **IDS),
    "jamba": JambaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, **IDS
    ),
    "recurrent_gemma": RecurrentGemmaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, lru_width=32,
        attention_window_size=16, **IDS
    ),
    "reformer": ReformerConfig(
        attn_layers=["local", "lsh"], axial_pos_embds=False, num_attention_heads=2, attention_head_size=16,
        feed_forward_size=64, hidden_size=32, is_decoder=True, **IDS
    ),
    "xlnet": XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, **IDS),
}  # fmt: skip
HOW = {
    "gpt2": "in pieces",
    "mamba": "token by token",
    "mamba2": "in pieces",
    "rwkv": "in pieces",
    "jamba": "token by token",
    "recurrent_gemma": "from the beginning",
    "reformer": "token by token",
    "xlnet": "from the beginning",
}


def make(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for weight in model.parameters():
        weight.data.mul_(3.0 if weight.dim() > 1 else 1.0)  # as if trained, so that a lost state shows
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_how_models_read_on(name):
    assert continues(make(name)) == HOW[name]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "xlnet"])
def test_reading_on_equals_reading_at_once(name):
    model = make(name)
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    reader = Continuation(model)
    edges = [0, 13, 14, 15, 40, 60]
    read = torch.cat([reader.read(ids[:, a:b]) for a, b in pairwise(edges)], 1)
    torch.testing.assert_close(read, whole, rtol=1e-3, atol=1e-3 * float(whole.std()))
    assert reader.seen == 60


@pytest.mark.parametrize("name", CONFIGS)
def test_sessions_write_what_generate_of_transformers_writes(name):
    model = make(name)
    prompt = "To be, or not"
    ids = torch.tensor([list(prompt.encode())])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
    )[0, ids.shape[1] :]
    session = Session(model, byte_tokenizer())
    session.read(ids[0].numpy())
    session._reader.end_tokens = frozenset()
    tokens = list(session._next_tokens(6, Sampling(0.0)))
    assert tokens == expected.tolist()


@pytest.mark.parametrize("name", ["rwkv", "mamba", "mamba2", "recurrent_gemma", "gpt2"])
def test_a_stream_longer_than_a_chunk_is_scored_as_in_one_pass(name, monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_CHUNK", 40)
    model = make(name)
    text = b"the king speaks of love and war. " * 3
    read = torch.tensor([[257, *text, 258]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(read[:, :-1], use_cache=False).logits[0].float(), read[0, 1:])
    stream = TokenStream.from_text(text, byte_tokenizer())
    told = evaluate(model, stream, byte_tokenizer(), mode="stream")
    assert told.nats_per_token == pytest.approx(float(nats), abs=1e-4)


def test_several_texts_that_a_model_mixes_up_are_refused():
    """RWKV-4 of transformers gives logits of another shape for single tokens of several texts."""
    model, ids = make("rwkv"), torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(0))
    reader = Continuation(model)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert torch.allclose(torch.cat([reader.read(ids[:, :5]), reader.read(ids[:, 5:7])], 1), whole[:, :7], atol=1e-4)
    with pytest.raises(UserError, match=r"rwkv model mixes up several texts .*; give one text at a time"):
        reader.read(ids[:, 7:])
    one = Continuation(model)
    assert torch.allclose(torch.cat([one.read(ids[:1, at : at + 1]) for at in range(8)], 1), whole[:1], atol=1e-4)


def test_a_text_too_long_for_a_model_without_a_state(monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_CHUNK", 40)
    monkeypatch.setattr(scoring, "LONGEST_FORGETFUL", 50)
    stream = TokenStream.from_text(b"the king speaks of love and war. " * 3, byte_tokenizer())
    with pytest.raises(UserError, match="recurrent_gemma model hands on no state, and 100 tokens are too many"):
        evaluate(make("recurrent_gemma"), stream, byte_tokenizer(), mode="stream")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **IDS), 64),
        (OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32,
                   max_position_embeddings=64, **IDS), 64),
        (RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                       max_position_embeddings=64, is_decoder=True, vocab_size=259, pad_token_id=1), 62),
    ],
)  # fmt: skip
def test_learned_positions_are_a_limit_that_is_told_before_it_is_passed(config, limit):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert position_limit(model) == context_of(model) == window_length(model, None) == limit
    reader = Continuation(model)
    reader.read(torch.full((1, limit - 1), 5))
    assert reader.room == 1
    reader.read(torch.full((1, 1), 5))
    with pytest.raises(UserError, match=f"reads at most {limit} tokens"):
        reader.read(torch.full((1, 1), 5))


def test_a_text_ends_where_the_positions_end(caplog):
    model = make("gpt2")
    model.generation_config.eos_token_id = None
    session = Session(model, byte_tokenizer())
    session.read(list(range(100)))
    assert len(list(session._next_tokens(256, Sampling(seed=0)))) == 28
    assert "no positions for more tokens" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        CTRLConfig(n_embd=32, n_layer=1, n_head=2, dff=64, n_positions=64, **IDS),
        LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                    max_position_embeddings=64, **IDS),
    ],
)  # fmt: skip
def test_other_limits(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (position_limit(model), context_of(model)) == (None, 64)
    text = torch.full((1, 70), 5)
    if config.model_type == "ctrl":  # it has a table of that many
        with pytest.raises(UserError, match="reads at most 64 tokens"):
            Continuation(model).read(text)
    else:
        assert Continuation(model).read(text).shape == (1, 70, 259)


def test_no_limit():
    assert context_of(make("xlnet")) is None
    with pytest.raises(UserError, match="give the window yourself"):
        window_length(make("xlnet"), None)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_read_both_ways_are_refused(name):
    model = make(name)
    if name == "xlnet":
        with pytest.raises(UserError, match="xlnet is not causal"):
            require_causal(model, name)
    else:
        require_causal(model, name)


def test_a_bert_that_is_no_decoder():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    both_ways = AutoModelForCausalLM.from_config(BertConfig(vocab_size=259, **sizes)).eval()
    with pytest.raises(UserError, match="is not causal"):
        require_causal(both_ways, "bert")
    require_causal(
        AutoModelForCausalLM.from_config(BertConfig(vocab_size=259, **sizes, is_decoder=True)).eval(), "bert"
    )
