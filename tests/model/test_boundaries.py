"""Where segments begin: by rule in scripted text, whatever the tokenizer; and by the learned router."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dyadlm import UserError
from dyadlm.data import byte_tokenizer
from dyadlm.model.boundaries import RULES, Boundaries, marks_of, token_texts
from dyadlm.model.extras.learned_boundaries import BoundaryRouter
from dyadlm.ops import make_clock

from .conftest import SMALL, TEXT, make_model, random_ids

CUTS = {
    "syllable": ["ba|na|na", "MI|RA|!"],
    "word": [
        "To |be, |or |not... |so",
        "I'll |go, |'tis |late",
        "3.|14 |is |pi",
        "née |Zoë",
        "a\r\n|b\n\n|c",
        "(|now) |or",
    ],
    "sentence": [
        'Go... |He said "no!" |Why?! |So: |it (is).) |Yes',
        "no stop\nhere\n\n|but here\r\n\r\n|and\n \n|there",
    ],
    "line": ["one\n|two\r\n|three\n\n\n|four\r\n\r\n|  five"],
    "paragraph": ["one\ntwo.\n\n|three\r\nfour\r\n\r\n\n|five\n \n|six"],
}


def begun(rules: Boundaries, ids: torch.Tensor, cuts=()) -> torch.Tensor:
    """(B, T, S), in chunks."""
    parts, state = [], ()
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        position = torch.full(ids.shape[:1], a)
        begins, state = rules(ids[:, a:b], make_clock(len(ids), b - a, position=position), state)
        parts.append(begins)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("rule", "marked"), [(rule, marked) for rule in CUTS for marked in CUTS[rule]])
def test_rules_cut_text_as_told(rule, marked):
    pieces = marked.encode().split(b"|")
    ids = torch.tensor([list(b"".join(pieces))])
    begins = begun(Boundaries([rule], 259, True), ids)[0, :, 0]
    expected = torch.tensor([piece_column == 0 for piece in pieces for piece_column in range(len(piece))])
    assert begins.tolist() == expected.tolist()


def test_what_begins_depends_on_nothing_later_and_on_no_cut():
    rules, text = Boundaries(RULES, 259, True), torch.tensor([list(TEXT + b'\r\n \n\n"Well!" he')])
    whole = begun(rules, text)
    for cut in range(1, text.shape[1]):
        assert torch.equal(begun(rules, text[:, :cut]), whole[:, :cut])
        assert torch.equal(begun(rules, text, [cut]), whole)
    assert torch.equal(begun(rules, text, range(1, text.shape[1])), whole)


def words_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """Whole words that carry their leading space as ▁, which decoding drops in front of the first token."""
    vocabulary = {token: number for number, token in enumerate(["<s>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_tokens_begin_words_where_their_bytes_do():
    tokens = ["▁To", "▁be", ",", "▁don", "'t", "▁I", "'ll", ".", "▁", '▁"', "So", "\n", "a"]
    texts = token_texts(words_tokenizer(tokens), len(tokens) + 3)
    assert texts == ["", *(token.replace("▁", " ") for token in tokens), "", ""]
    sentence = ["▁To", "▁be", ",", "▁don", "'t", "▁", "So", ".", '▁"', "So", "▁I", "'ll", "\n", "\n", "So"]
    rules = Boundaries(["word"], len(tokens) + 1, False)
    rules.read(words_tokenizer(tokens))
    ids = torch.tensor([[1 + tokens.index(token) for token in sentence]])
    pieces = [token.replace("▁", " ").encode() for token in sentence]
    by_byte = begun(Boundaries(["word"], 259, True), torch.tensor([list(b"".join(pieces))]))[0, :, 0]
    begins, at = begun(rules, ids)[0, :, 0].tolist(), 0
    for here, piece in zip(begins, pieces, strict=True):
        own = by_byte[at : at + len(piece)]
        if at == 0 or piece.strip(b' \n"'):  # delimiters that open a word are of the segment before it
            assert here == bool(own.any())
        at += len(piece)


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("syllable", ["That", "| is", "| not", "| ri", "|ght", "| a", "|n", ".", "| So"]),
        ("line", ["one", "|\ntwo", " and", "\n", "|three", "|\nfour"]),
        ("paragraph", ["one", "|\n\ntwo", "\nthree", "\n", "\n", "|four"]),
    ],
)
def test_tokens_that_carry_delimiters_in_front_begin_segments(rule, pieces):
    texts = [piece.removeprefix("|") for piece in pieces]
    rules = Boundaries([rule], len(texts), False)
    rules.marks.copy_(marks_of(texts, [rule]))
    begins = begun(rules, torch.arange(len(texts))[None])[0, :, 0].tolist()
    assert begins == [place == 0 or piece.startswith("|") for place, piece in enumerate(pieces)]


def test_the_cost_of_the_learned_boundary_pulls_its_share_to_the_rate():
    torch.manual_seed(0)
    x, clock = torch.randn(4, 64, 8), make_clock(4, 64)
    for rate in (0.1, 0.5):
        router = BoundaryRouter(8, 4, rate)
        begins, _, cost, _ = router(x, clock, None)
        query, before = router.query(x), torch.nn.functional.pad(router.key(x), (0, 0, 1, 0))[:, :-1]
        likely = ((1 - torch.nn.functional.cosine_similarity(query, before, dim=-1)) / 2).mean()
        chosen, other = begins.float().mean(), (1 - rate) / rate
        expected = (other * chosen * likely + (1 - chosen) * (1 - likely)) / (rate * other)
        assert torch.allclose(cost, 0.03 * expected)
        optimizer = torch.optim.Adam(router.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            router(x, clock, None)[2].backward()
            optimizer.step()
        share = router(x, clock, None)[0].float().mean()
        assert abs(share - rate) < 0.75 * abs(chosen - rate) or abs(share - rate) < 0.05


def test_the_byte_tokenizer_says_what_the_table_for_bytes_says():
    rules = Boundaries(RULES, 259, True)
    table = rules.marks.clone()
    rules.read(byte_tokenizer())
    assert torch.equal(rules.marks, table)


def test_a_vocabulary_without_texts_is_refused_until_it_is_told(tmp_path):
    tokens = ["▁one", ".", "a"]
    fields = {**SMALL, "semantic_levels": ["word", "sentence"], "vocab_size": 4}
    model, ids = make_model(torch.float32, **fields), torch.tensor([[1, 2, 1, 3]])
    with pytest.raises(UserError, match=r"call model\.use_tokenizer\(tokenizer\)") as error:
        model(ids)
    assert "\n" not in str(error.value)
    model.use_tokenizer(words_tokenizer(tokens))
    told = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, told)
    make_model(**{**fields, "semantic_levels": ["learned"]})(ids)  # needs no text


def test_a_vocabulary_that_grows_keeps_its_rules():
    model = make_model(torch.float32, **SMALL, semantic_levels=["word"])
    ids = random_ids(1, 30)
    before = model(ids).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    assert torch.allclose(model(ids).logits[..., :259], before, atol=1e-5)
    assert model(torch.tensor([[65, 299, 66]])).logits.isfinite().all()
