"""The instrument on models that are odd: every probe answers, says that it does not apply, or fails in one sentence."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    TrainerControl,
    TrainerState,
)

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.data.canaries import plan_canaries
from dyadlm.diagnose import (
    PROBES,
    Budget,
    HuggingFaceSubject,
    Material,
    OverTime,
    Probe,
    ProbeResult,
    Subject,
    Trajectory,
    ask,
    diagnose,
)
from dyadlm.diagnose.audit import small_model
from dyadlm.diagnose.callback import ProbeCallback
from dyadlm.diagnose.candidates import load_material
from dyadlm.diagnose.oracles import BYTES, Automaton, Shown, dirichlet, independent, laplace, spelled, uniform
from dyadlm.diagnose.probe import NotApplicable
from dyadlm.diagnose.probes.memorise import _excess, _under_zlib
from dyadlm.diagnose.probes.position import counted_bits
from dyadlm.errors import UserError
from dyadlm.evaluate.memorisation import Estimate

pytestmark = pytest.mark.slow

QUICK = Budget(tokens=0.02, fast=True)
TEXT = "The king speaks of love. War is near! Is it? asked the queen.\n\nNight came, and men slept. "


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


def text(tokenizer=None, documents=3) -> Material:
    return Material([TokenStream.from_text([TEXT[i:] + TEXT * 12 for i in range(documents)], tokenizer)])


# ---- what a model may raise


def test_reading_and_decoding_are_timed_where_training_raises(monkeypatch):
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.LONGEST", 128)
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.WRITTEN", 32)
    reformer = small_model("reformer", {})
    result = ask(PROBES["cost"](), HuggingFaceSubject(reformer, None), independent(16, 1, 64), QUICK)
    assert {"reading_seconds", "decoding_seconds", "decoding_memory"} <= set(result.readings)
    assert "training_seconds" not in result.readings
    assert "training, which fails in evaluation mode (AssertionError" in result.left_out


class Asserting(type(uniform(4))):
    def __init__(self):
        super().__init__(4, self._refuse, "asserting")

    def _refuse(self, ids):
        raise AssertionError("not today\nnor tomorrow")


def test_whatever_a_model_raises_is_a_result():
    assert ask(PROBES["position"](), Asserting(), independent(4, 2, 1024), QUICK).failed == "AssertionError: not today"


class Trainerlike:
    is_fsdp_enabled = is_deepspeed_enabled = False
    processing_class = None

    def __init__(self):
        self.model = llama()
        self.accelerator = self
        self.logged = []

    def unwrap_model(self, model, keep_torch_compile):
        return model

    def log(self, found):
        self.logged.append(found)


@pytest.mark.parametrize("where", ["observe", "conclude"])
def test_whatever_a_probe_raises_ends_no_training(where, monkeypatch, caplog):
    def refuse(*arguments):
        raise AssertionError("not today")

    probe = PROBES["whiteout"]()
    monkeypatch.setattr(probe, "observe", lambda *arguments: None)
    monkeypatch.setattr(probe, where, refuse)
    trainer = Trainerlike()
    callback = ProbeCallback(trainer, [probe], text(byte_tokenizer()), byte_tokenizer())
    for step in (1, 2):
        callback.on_save(None, TrainerState(global_step=step), TrainerControl())
    assert trainer.logged == []
    assert ("not asked again" in caplog.text) == (where == "observe")


# ---- greedy


def test_greedy_is_greedy_whatever_the_model_is_configured_to_generate():
    plain, odd = llama(), llama()
    own = odd.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.suppress_tokens = 5.0, 2, list(range(100))
    ids = torch.arange(40)[None]
    written = [HuggingFaceSubject(model, None).greedy(ids, 24) for model in (plain, odd)]
    assert torch.equal(*written)
    assert odd.generation_config is own


def nan_llama() -> LlamaForCausalLM:
    model = llama()
    torch.nn.init.constant_(model.model.embed_tokens.weight, float("nan"))
    return model


def test_greedy_refuses_what_is_no_number():
    subject = HuggingFaceSubject(nan_llama(), None, "broken")
    with pytest.raises(NotApplicable, match="broken returns values that are not numbers"):
        subject.greedy(torch.arange(8)[None], 2)


# ---- leak


class Breaking(torch.nn.Module):
    """Its first step of training makes it no number: the slope of a root at 0 is infinite."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(16, 16), torch.nn.Linear(16, 16)
        self.gate = torch.nn.Parameter(torch.zeros(16))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return self.head(self.embedding(ids) + self.gate.sqrt())


class Own(Subject):
    name, vocabulary = "own", 16

    def __init__(self, module):
        self._module = module

    @torch.no_grad()
    def logits(self, ids):
        return self._module(ids)

    @property
    def module(self):
        return self._module


def test_a_pupil_that_is_no_number_reassures_nobody():
    result = ask(PROBES["leak"](), Own(Breaking()), independent(16, 1, 64), QUICK)
    assert set(result.readings) == {"largest_change", "relative_change"}
    assert result.readings["largest_change"].value == 0
    assert "steps of training, which made its logits no numbers" in result.left_out


# ---- what a stored answer must agree with


def test_answers_in_another_dtype_are_not_taken_for_these(tmp_path):
    path, probes = tmp_path / "found.json", [PROBES["bounds"]()]
    material = text(byte_tokenizer())
    subject = HuggingFaceSubject(llama(), byte_tokenizer(), "small")
    circumstances = diagnose(subject, material, probes, output=path).circumstances
    assert circumstances["subject"]["dtype"] == "float32"
    assert circumstances["subject"]["device"] == "cpu"
    assert circumstances["versions"]["transformers"]
    with pytest.raises(UserError, match="another model; choose"):
        diagnose(
            HuggingFaceSubject(llama().to(torch.bfloat16), byte_tokenizer(), "small"), material, probes, output=path
        )
    with pytest.raises(UserError, match="another text; choose"):
        diagnose(subject, replace(material, split="test"), probes, output=path)


def test_the_split_is_known(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 200)
    subject = HuggingFaceSubject(llama(), byte_tokenizer())
    assert load_material("model", subject, [str(tmp_path / "text.txt")], "train").split == "train"


# ---- text


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer()])
@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_on_text_says_why_there_is_none(probe, tokenizer):
    vocabulary = 16
    model = llama(vocab_size=vocabulary)
    subject = HuggingFaceSubject(model, tokenizer, "small")
    material = load_material("model", subject, [])
    asked = PROBES[probe]()
    result = (
        ask(asked, Trajectory([1, 2], lambda step: subject), material, QUICK)
        if isinstance(asked, OverTime)
        else ask(asked, subject, material, QUICK)
    )
    assert not result.failed
    if probe not in ("leak", "cost"):
        reasons = ("has no tokenizer", "its tokens are no text", "the tokenizer has 259 tokens", "nothing was planted")
        assert any(reason in result.not_applicable for reason in reasons), result.not_applicable


def broken(adapted: bool) -> Subject:
    if not adapted:
        return HuggingFaceSubject(nan_llama(), byte_tokenizer(), "broken")
    nan = float("nan")
    shown = Shown(
        BYTES,
        "broken",
        logits=lambda ids: torch.full((*ids.shape, BYTES), nan),
        hidden=lambda ids: [torch.full((*ids.shape, 8), nan)] * 3,
        attention=lambda ids: [torch.full((len(ids), 2, ids.shape[1], ids.shape[1]), nan)],
        routes=lambda ids: [torch.full((*ids.shape, 1, 4), nan)],
        blend=lambda ids, other, share: torch.full((len(ids), BYTES), nan),
    )
    shown.tokenizer = byte_tokenizer()
    return shown


@pytest.mark.filterwarnings("ignore:All-NaN|Mean of empty|invalid value:RuntimeWarning")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("probe", [probe for probe in PROBES if probe != "cost"])
def test_what_is_no_number_is_no_answer(probe, adapted):
    asked, subject = PROBES[probe](), broken(adapted)
    planted = replace(text(byte_tokenizer()), canaries=plan_canaries(1, 0, byte_tokenizer(), 85, 64))
    both = [subject, Trajectory([1, 2], lambda step: subject)] if isinstance(asked, OverTime) else [subject]
    for each in both:
        result = ask(asked, each, planted, QUICK)
        assert result.failed or result.not_applicable
        assert not result.readings
        assert "\n" not in result.failed + result.not_applicable


# ---- figures and their intervals


@pytest.mark.parametrize(("vocabulary", "bits"), [(64, -0.2777), (2, -0.0123)])
def test_what_counting_gains_from_49_tokens_to_499(vocabulary, bits):
    assert counted_bits(vocabulary, 499) - counted_bits(vocabulary, 49) == pytest.approx(bits, abs=5e-5)
    assert counted_bits(vocabulary, 0) == pytest.approx(math.log2(vocabulary))


def test_a_short_context_has_no_far_position():
    short, longer = (
        ask(PROBES["position"](), within(context), independent(64, 4, 1024), QUICK) for context in (149, 150)
    )
    assert "149 tokens has no position that is far" in short.not_applicable
    assert longer.readings["far_minus_near"].note == "far is position 135"


def within(context):
    subject = laplace(64)
    subject.context = context
    return subject


def test_falls_and_rises_have_intervals():
    result = ask(PROBES["position"](), laplace(64), dirichlet(64, 16, 1024), Budget(tokens=0.2))
    for name in ("far_minus_near", "slope", "late_rise"):
        low, high = result.readings[name].interval
        assert low < high
        assert low <= result.readings[name].value <= high or name == "late_rise"
    assert result.readings["slope"].interval[1] < 0


def test_loops_are_counted_where_they_begin():
    # From token 9 on it counts down to a cycle of one; a prompt of independent tokens ends anywhere from 0 to 79.
    falling = Automaton(80, lambda ids: (ids - 1).clamp_min(0), "falls to 0")
    result = ask(PROBES["loop"](), falling, independent(80, 30, 64), Budget(tokens=0.3))
    curve = result.curves["terminal loops by onset"]
    assert list(curve.x) == list(range(0, 257, 16))
    assert list(curve.y) == sorted(curve.y)
    assert 0 < curve.y[1] < curve.y[3] < curve.y[5] == curve.y[-1] == result.readings["terminal_loops"].value == 1
    assert all(low <= y <= high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))


def test_gains_over_a_reference_have_intervals():
    control = PROBES["bounds"]().controls()[1]
    gain = ask(PROBES["bounds"](), *control.make(), Budget(tokens=0.1)).readings["gain"]
    assert gain.interval[0] <= gain.value <= gain.interval[1] < 0.1
    found = ask(PROBES["memorise"](), *PROBES["memorise"]().controls()[0].make(), QUICK).readings
    assert found["extracted_excess"].interval == (1.0, 1.0)


def test_an_excess_is_drawn_anew():
    low, high = _excess(Estimate(0.5, None, 100), Estimate(0.1, None, 100))
    half = 1.96 * math.sqrt((0.25 + 0.09) / 100)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.02)


def test_a_ratio_is_the_mean_that_its_interval_is_of():
    tokenizer = byte_tokenizer()
    streams = [TokenStream.from_text([letter * 300 for letter in "aaaab"], tokenizer)]
    scores = torch.full((259,), -30.0)
    scores[ord("a")] = 0.0  # the one text of b is dear beyond measure, and the median would not tell
    subject = spelled(lambda ids: scores.expand(*ids.shape, -1), "knows a")
    ratio = _under_zlib(subject, Material(streams), Budget())["zlib_ratio"]
    assert ratio.value > 10
    assert ratio.interval[0] <= ratio.value <= ratio.interval[1]


def test_cuts_inside_tokens_stand_beside_cuts_between():
    control = PROBES["bytes"]().controls()[0]
    readings = ask(PROBES["bytes"](), *control.make(), Budget(tokens=0.2)).readings
    inside, between = (float(readings[f"{name}_penalty"].note.split()[0]) for name in ("mid_token", "boundary"))
    delta = readings["mid_minus_boundary"]
    assert delta.value == pytest.approx(inside - between, abs=2e-3)
    assert delta.interval[0] < delta.value < delta.interval[1]
    plain = ask(PROBES["bytes"](), *PROBES["bytes"]().controls()[1].make(), Budget(tokens=0.1))
    assert "mid_minus_boundary" not in plain.readings


# ---- what a configuration tells


def test_positions_behind_the_padding_are_no_context():
    config = RobertaConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=130, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    subject = HuggingFaceSubject(RobertaForCausalLM(config), None)
    assert subject.context == 128
    assert subject.logits(torch.full((1, 128), 7)).shape == (1, 128, 259)
    with pytest.raises((IndexError, RuntimeError)):
        subject.logits(torch.full((1, 129), 7))


class Short(Probe):
    id = "short"

    def run(self, subject, material, budget):
        subject.logits(torch.full((1, 8), 7))
        return ProbeResult(self.id)

    def controls(self):
        return []


def test_leak_is_asked_before_short_texts_turn_sparse_attention_off():
    model = small_model("big_bird", {})
    alone = ask(PROBES["leak"](), HuggingFaceSubject(deepcopy(model), None), independent(16, 4, 64), QUICK)
    found = diagnose(HuggingFaceSubject(model, None), independent(16, 4, 64), [Short(), PROBES["leak"]()], QUICK)
    assert model.bert.attention_type == "original_full"
    assert list(found.results) == ["short", "leak"]
    assert found.results["leak"].readings == alone.readings


def test_experts_that_are_not_shown_are_left_out_aloud():
    subject, material = HuggingFaceSubject(llama(), None), independent(259, 2, 1024)
    assert "experts" not in ask(PROBES["select"](), subject, material, QUICK).left_out
    subject.model.config.num_local_experts = 4
    left_out = ask(PROBES["select"](), subject, material, QUICK).left_out
    assert "this model has experts but does not show how it chooses" in left_out


def test_a_cache_grows_where_a_state_does_not(monkeypatch):
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.LONGEST", 128)
    attention = llama(hidden_size=32, num_hidden_layers=4)
    config = DyadConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_levels=4)
    found = [
        ask(PROBES["cost"](), HuggingFaceSubject(model, None), independent(259, 1, 64), QUICK).readings
        for model in (attention, DyadForCausalLM(config))
    ]
    assert found[0]["decoding_memory"].value > 0.5
    assert abs(found[1]["decoding_memory"].value) < 0.1
