"""The audit finds the faults that are there, and no others."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, BigBirdConfig, LlamaConfig, MistralConfig, Qwen2Config, ReformerConfig

from dyadlm import DyadConfig
from dyadlm.cli import main
from dyadlm.diagnose import audit as audits
from dyadlm.diagnose.audit import audit, small_model
from dyadlm.diagnose.causality import chosen_length, cuts, telling_length
from dyadlm.errors import UserError

TINY = {"hidden_size": 16, "head_dim": 16, "num_hidden_layers": 1}


def statuses(found) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


PASS = ["llama", "mistral", "mamba2", "gpt2", "tiny", "ctrl", "roberta", "opt", "bert", "lfm3", "recurrent_gemma"]


@pytest.mark.parametrize("architecture", PASS)
def test_causal_models_pass(architecture):
    if architecture != "tiny" and architecture not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {architecture}")
    found = audit(small_model(architecture, {}))
    assert found.passed, [(check.name, check.sentence) for check in found.checks]
    assert not found.left_out
    assert all(check.figure <= check.tolerance for check in found.checks if check.status == "passed")


# What these really get wrong; `generate` of transformers shows it too.
FAIL = {
    "bart": {"left padding"},
    "marian": {"left padding"},
    "rwkv": {"left padding"},
    "moshi": {"cache"},
    "xlnet": {"perturbation", "cache"},
    "xlstm": {"left padding"},
}


@pytest.mark.parametrize("architecture", FAIL)
def test_known_faults_are_found_and_no_others(architecture):
    found = audit(small_model(architecture, {}))
    assert {name for name, status in statuses(found).items() if status == "failed"} == FAIL[architecture]


def test_rounding_of_routed_tokens_is_no_leak():
    """All 256 experts, between which tokens are routed; its linear attention, which takes longest, is smaller."""
    narrow = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    found = audit(small_model("qwen3_5_moe_text", {**narrow, "linear_value_head_dim": 16}))
    assert statuses(found)["perturbation"] == "passed"


def test_reformer_is_caught():
    found = audit(small_model("reformer", {}))
    assert not found.passed
    assert statuses(found)["perturbation"] == "failed"
    assert statuses(found)["gradient"] == "not applicable"  # its gradients exist in training alone


def test_block_sparse_bigbird_is_caught_on_texts_long_enough_for_its_blocks():
    model = small_model("big_bird", {"is_decoder": False})
    found = audit(model)
    assert model.bert.attention_type == "block_sparse"  # a short text would have switched it for good
    assert statuses(found)["perturbation"] == statuses(found)["gradient"] == "failed"


def test_xlstm_is_causal_but_ignores_the_mask():
    found = audit(small_model("xlstm", {}))
    assert [name for name, status in statuses(found).items() if status == "failed"] == ["left padding"]
    assert "ignores it" in next(check.sentence for check in found.checks if check.status == "failed")


def faulty(fault: str):
    """A small Llama with one fault."""
    model = small_model("llama", TINY)
    embed, forward = model.get_input_embeddings(), model.forward
    if fault == "perturbation":
        model.model.layers[0].mlp.register_forward_hook(lambda module, read, said: said + 1e-3 * said.roll(-1, 1))
    elif fault == "cache":
        embed.register_forward_hook(lambda module, read, said: said * (1 + 0.01 * said.shape[1]))
    elif fault == "batch":
        embed.register_forward_hook(lambda module, read, said: said + 0.01 * said.mean(0, keepdim=True))
    elif fault == "left padding":

        def ignore(input_ids=None, attention_mask=None, **options):
            return forward(input_ids=input_ids, **options)

        model.forward = ignore
    elif fault == "save and load":
        model.get_output_embeddings().register_forward_hook(lambda module, read, said: 1.01 * said)
    return model


@pytest.mark.parametrize("fault", ["perturbation", "cache", "left padding", "batch", "save and load"])
def test_every_check_catches_its_fault(fault):
    found = audit(faulty(fault))
    assert statuses(found)[fault] == "failed"
    assert not found.passed
    if fault == "perturbation":
        assert statuses(found)["gradient"] == "failed"


def test_what_a_model_raises_is_a_fault():
    model = small_model("llama", TINY)
    forward = model.forward

    def stateless(past_key_values=None, **options):
        if past_key_values is not None:
            raise NotImplementedError("no state, please")
        return forward(**options)

    model.forward = stateless
    (check,) = [check for check in audit(model).checks if check.name == "cache"]
    assert check.status == "failed"
    assert "no state, please" in check.sentence


def test_the_length_shows_what_a_model_does_on_long_texts():
    assert telling_length(LlamaConfig()) == 1
    assert telling_length(MistralConfig(sliding_window=100)) == 201
    assert telling_length(Qwen2Config(sliding_window=100, use_sliding_window=False)) == 1
    assert telling_length(DyadConfig(num_levels=6)) == 65
    assert telling_length(BigBirdConfig()) == 705  # (5 + 2 · 3) · 64, and one more
    assert telling_length(ReformerConfig(lsh_attn_chunk_length=30)) == 129  # its local chunks are of 64
    length, left_out = chosen_length(MistralConfig(sliding_window=4096), None, 100)
    assert length == 2048
    assert "8193" in left_out
    assert chosen_length(MistralConfig(sliding_window=10), 50, 100) == (50, "")


@pytest.mark.parametrize("length", [24, 133, 256])
def test_there_are_ten_cuts_or_more(length):
    places = cuts(length)
    assert len(places) >= 10
    assert min(places) >= 1
    assert max(places) == length - 1


def test_a_model_without_numbers_cannot_be_audited():
    model = small_model("llama", TINY)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        audit(model)


def test_the_command(tmp_path, capsys, monkeypatch):
    small_model("llama", TINY).save_pretrained(tmp_path / "model")
    assert call("audit", tmp_path / "model", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "perturbation" in shown
    assert "133 random tokens" in shown
    monkeypatch.setattr(audits, "EXACT", -1.0)
    assert call("audit", "--architecture", "llama", "--set", "num_hidden_layers=1", "--json", "--device", "cpu") == 1
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert not found["passed"]
    assert "fails: perturbation" in shown.err
    assert found["circumstances"]["versions"]["transformers"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "Give one model"),
        (["nowhere", "--architecture", "llama"], "Give one model"),
        (["--architecture", "lama"], "nearest is llama"),
        (["--architecture", "llama", "--length", "3"], "length"),
        (["--architecture", "llama", "--set", "hiden_size=3"], "nearest is hidden_size"),
        (["."], "no model folder"),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("audit", *arguments, "--device", "cpu") == 2
    shown = capsys.readouterr()
    assert remedy in shown.err
    assert shown.err.count("\n") == 1
