"""The probes leak, bytes, bounds and cost on real, tiny models: of transformers, and ours with everything on."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.diagnose import PROBES, Budget, HuggingFaceSubject, Material, Subject, Trajectory, ask
from dyadlm.diagnose.candidates import _unpacked
from dyadlm.diagnose.causality import GAIN_LIMIT, future_gradient
from dyadlm.diagnose.oracles import independent
from dyadlm.diagnose.probe import NotApplicable
from dyadlm.diagnose.probes.cost import Allocations, Sleeper
from dyadlm.diagnose.probes.memorise import _under_zlib
from dyadlm.diagnose.tokens import token_bytes

pytestmark = pytest.mark.slow

TEXT = (
    "The king — he's old — speaks of love.  War is near! “Is it?” asked the queen.\n\nNight came, and naïve men slept. "
)
EVERYTHING = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_levels": 4,
    "selector_heads": 2,
    "semantic_levels": ["syllable", "word", "sentence", "line", "paragraph", "learned"],
    "semantic_memory": 2,
    "salience": True,
    "forgetting": True,
    "selector": "topk",
    "selector_margin": 0.1,
    "decision_slots": True,
    "slot_contexts": [1, 2, "word", "code"],
    "ngram_sizes": [2, "word"],
    "ngram_entries": 32,
    "slot_gate": True,
    "slot_entries": 16,
    "slot_ways": 4,
    "slot_width": 3,
    "slot_layers": [0, 1],
}


def llama(vocabulary=259, context=128) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(params=["llama", "everything"])
def subject(request):
    model = llama() if request.param == "llama" else DyadForCausalLM(DyadConfig(vocab_size=259, **EVERYTHING))
    return HuggingFaceSubject(model, byte_tokenizer(), request.param)


def text(tokenizer, documents=3) -> Material:
    texts = [TEXT[i:] + TEXT * 20 for i in range(documents)]
    return Material([TokenStream.from_text(texts, tokenizer)])


def merged_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


QUICK = Budget(tokens=0.05, fast=True)


def test_a_causal_model_leaks_nothing(subject):
    result = ask(PROBES["leak"](), subject, text(subject.tokenizer), QUICK)
    assert not result.failed + result.not_applicable
    assert result.readings["relative_change"].value < 1e-5
    assert result.readings["gradient"].value == 0
    assert result.readings["gain"].value < GAIN_LIMIT
    assert result.sentence.startswith("No leak")


def test_the_probe_leaves_the_model_as_it_was(subject, monkeypatch):
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.LONGEST", 64)
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.SHORTEST", 16)
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.WRITTEN", 4)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    ask(PROBES["leak"](), subject, text(subject.tokenizer), QUICK)
    ask(PROBES["cost"](), subject, text(subject.tokenizer), QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert all(weight.grad is None for weight in subject.model.parameters())
    assert not subject.model.training


def test_costs_are_measured(subject, monkeypatch):
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.LONGEST", 64)
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.SHORTEST", 16)
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.WRITTEN", 8)
    result = ask(PROBES["cost"](), subject, text(subject.tokenizer), QUICK)
    assert not result.failed + result.not_applicable
    assert 0.5 < result.readings["training_memory"].value < 2.1
    assert {"training_seconds", "reading_seconds", "decoding_seconds"} <= set(result.readings)


def test_bytes_at_once_are_those_that_were_not_there_before():
    before = torch.zeros(1000)
    with Allocations() as seen:
        view = before.view(10, 100)
        (view + 1).sum()  # gone at once, but for the sum
        kept = view + 2
        kept.add_(1)
    assert seen.peak == 4 * 1000 + 4
    assert seen.now == kept.nbytes


def test_every_byte_is_a_token(subject):
    result = ask(PROBES["bytes"](), subject, text(subject.tokenizer), QUICK)
    assert not result.failed + result.not_applicable
    assert result.readings["mid_token_penalty"].value == 0
    assert result.readings["share_inside"].value == 0
    assert 6 < result.readings["bits_per_byte"].value < 12


def test_partitions(subject):
    result = ask(PROBES["bounds"](), subject, text(subject.tokenizer), QUICK)
    if subject.name == "llama":
        assert result.not_applicable == "it divides its text into no segments"
        return
    assert result.readings["f1 word words"].value > 0.85
    assert result.readings["f1 sentence sentences"].value > 0.5
    assert result.readings["f1 word words"].value > result.readings["f1 syllable words"].value
    low, high = result.readings["f1"].interval
    assert low <= result.readings["f1"].value <= high


def test_merged_tokens_have_a_penalty():
    tokenizer = merged_tokenizer()
    subject = HuggingFaceSubject(llama(len(tokenizer)), tokenizer)
    result = ask(PROBES["bytes"](), subject, text(tokenizer), QUICK)
    assert not result.failed + result.not_applicable
    assert result.readings["share_inside"].value > 0.2
    assert math.isfinite(result.readings["mid_token_penalty"].value)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    pieces = ["▁the", "▁king", "t", "h", "e", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)} | {"<unk>": len(pieces)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_tokenizer, merged_tokenizer, sentencepiece_like])
def test_tokens_stand_for_the_bytes_of_their_text(make):
    tokenizer = make()
    table = token_bytes(tokenizer, len(tokenizer) + 3)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(table[token] for token in ids) == TEXT.encode()
    assert table[tokenizer.eos_token_id] == b""
    assert table[-1] == b""


@pytest.mark.parametrize("probe", ["bytes", "whiteout", "theme"])
def test_pieces_that_are_not_their_text_are_told(probe):
    vocabulary = {"[UNK]": 0, "the": 1, "king": 2, "##s": 3, "[END]": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]", unk_token="[UNK]")
    subject = HuggingFaceSubject(llama(8), fast)
    material = Material([TokenStream.from_text("the kings the king " * 300, fast)])
    asked = PROBES[probe]()
    found = ask(asked, Trajectory([1, 2], lambda step: subject) if probe != "bytes" else subject, material, QUICK)
    assert "which bytes" in found.not_applicable
    with pytest.raises(NotApplicable, match="which bytes"):
        _under_zlib(subject, material, QUICK)


class Peeking(nn.Module):
    """A path to the next token whose weight is 0 at the start."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.head = nn.Linear(16, 16)
        self.gate = nn.Parameter(torch.zeros(16))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        embedded = self.embedding(ids)
        return self.head(embedded + self.gate * embedded.roll(-1, 1))


class Own(Subject):
    vocabulary = 16

    def __init__(self):
        self.peeking = Peeking()

    @torch.no_grad()
    def logits(self, ids):
        return self.peeking(ids)

    @property
    def module(self):
        return self.peeking


def test_a_leak_that_training_opens_is_found():
    result = ask(PROBES["leak"](), Own(), independent(16, 1, 64), Budget())
    assert result.readings["largest_change"].note == "after training"
    assert result.readings["largest_change"].value > 1e-3
    assert result.readings["gradient"].value > 1e-3
    assert result.sentence.startswith("The future reaches the past")


def test_gradients_tell_a_leak_from_none():
    model = Peeking()
    ids = torch.randint(16, (1, 32))
    assert future_gradient(model, ids, [0, 9, 30]) == 0
    nn.init.constant_(model.gate, 0.5)
    assert future_gradient(model, ids, [0, 9, 30]) > 0.1
    assert future_gradient(nn.Linear(3, 3), ids, [0]) is None


def test_a_slow_model_is_timed_at_three_lengths_at_least(monkeypatch):
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.FAST_PATIENCE_SECONDS", 0.0)
    result = ask(PROBES["cost"](), Sleeper(0, 0.001), independent(2, 1, 64), Budget(fast=True))
    assert list(result.curves["reading: seconds"].x) == [64, 128, 256]
    assert "reading at more than 256 tokens, for time" in result.left_out


def test_bits_per_byte_of_one_document_have_the_interval_of_its_windows():
    subject = HuggingFaceSubject(llama(), byte_tokenizer())
    one = Material([TokenStream.from_text([TEXT * 80], byte_tokenizer())])
    assert ask(PROBES["bytes"](), subject, one, Budget(tokens=0.05)).readings["bits_per_byte"].interval


def test_what_came_from_gguf_can_be_saved(tmp_path):
    mark = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gguf"))
    model = llama()
    model.hf_quantizer, model.config.quantization_config = mark, {"quant_method": "gguf"}
    with pytest.raises(ValueError, match="gguf"):
        model.save_pretrained(tmp_path / "refused")
    _unpacked(model).save_pretrained(tmp_path / "saved")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())
