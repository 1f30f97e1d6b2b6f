"""The instrument on models that are odd: every probe answers, says that it does not apply, or fails in one sentence."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState

from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.diagnose import PROBES, Budget, HuggingFaceSubject, Material, ask
from dyadlm.diagnose.audit import small_model
from dyadlm.diagnose.callback import ProbeCallback
from dyadlm.diagnose.oracles import independent, uniform

QUICK = Budget(tokens=0.02, fast=True)
TEXT = "The king speaks of love. War is near! Is it? asked the queen.\n\nNight came, and men slept. "


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256, **options))


def text(tokenizer=None, documents=3) -> Material:
    return Material([TokenStream.from_text([TEXT[i:] + TEXT * 12 for i in range(documents)], tokenizer)])


# ---- what a model may raise


def test_reading_and_decoding_are_timed_where_training_raises(monkeypatch):
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.LONGEST", 128)
    monkeypatch.setattr("dyadlm.diagnose.probes.cost.WRITTEN", 32)
    reformer = small_model("reformer", {})
    result = ask(PROBES["cost"](), HuggingFaceSubject(reformer, None), independent(16, 1, 64), QUICK)
    assert {"reading_seconds", "decoding_seconds"} <= set(result.readings)
    assert "training_seconds" not in result.readings
    assert "training, which has no gradients in evaluation mode (AssertionError" in result.left_out


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
