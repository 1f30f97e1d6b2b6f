"""Probes of training, memory and plans on real, tiny models: runs with checkpoints and canaries, planners."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli import main
from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.data.canaries import plan_canaries
from dyadlm.diagnose import Budget, HuggingFaceSubject, Material, Trajectory, ask, chosen
from dyadlm.diagnose.callback import ProbeCallback
from dyadlm.diagnose.candidates import load_material, load_subject, load_trajectory
from dyadlm.diagnose.ngram import Counts, NGram
from dyadlm.diagnose.oracles import spelled
from dyadlm.diagnose.probes.theme import _agreement, _kinds
from dyadlm.diagnose.tokens import token_bytes
from dyadlm.diagnose.trajectory import reached

pytestmark = pytest.mark.slow

EVERYTHING = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_levels": 4,
    "selector_heads": 2,
    "semantic_levels": ["word", "sentence", "learned"],
    "semantic_memory": 2,
    "salience": True,
    "forgetting": True,
    "selector": "topk",
    "decision_slots": True,
    "slot_contexts": [1, "word"],
    "slot_entries": 16,
    "slot_ways": 4,
    "slot_width": 3,
    "slot_layers": [0, 1],
    "planner": "head",
    "planner_width": 8,
    "planner_futures": 2,
}
QUICK = Budget(tokens=0.1)
WORDS = [
    "the",
    "king",
    "queens",
    "speaks",
    "of",
    "love",
    "and",
    "war",
    "in",
    "battle",
    "is",
    "are",
    "wood",
    "by",
    "has",
]


def prose(seed: int, count: int = 1200) -> str:
    random = np.random.default_rng(seed)
    own = ["forests", "castles", "dragons", "harbour", "shepherd"][seed % 5]
    return " ".join(own if random.random() < 0.05 else str(random.choice(WORDS)) for _ in range(count)) + "."


def text(documents: int = 5) -> Material:
    return Material([TokenStream.from_text([prose(number) for number in range(documents)], byte_tokenizer())])


def llama(context: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=context, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(params=["llama", "everything"])
def subject(request):
    model = llama() if request.param == "llama" else DyadForCausalLM(DyadConfig(vocab_size=259, **EVERYTHING))
    return HuggingFaceSubject(model, byte_tokenizer(), request.param)


# ---- Single models


def test_what_needs_checkpoints_says_so(subject):
    for probe in chosen(["whiteout", "theme"]):
        assert "--over-time" in ask(probe, subject, text(), QUICK).not_applicable


def test_memory_needs_canaries(subject):
    (probe,) = chosen(["memorise"])
    assert "data.canaries" in ask(probe, subject, text(), QUICK).not_applicable
    planted = Material(text().text, text().text, "text", plan_canaries(1, 0, byte_tokenizer(), 85, 64))
    result = ask(probe, subject, planted, QUICK)
    assert not result.failed
    assert result.readings["extracted"].value == 0
    assert result.readings["exposure"].value < 5
    assert result.readings["capacity"].value >= 0
    # Random weights take every byte for any: as many bits as the vocabulary tells, and zlib needs fewer.
    assert result.readings["zlib_ratio"].value > 1.5
    assert result.readings["zlib_ratio"].value == pytest.approx(result.readings["zlib_ratio_train"].value)


def test_plans_of_real_models(subject):
    (probe,) = chosen(["plan"])
    result = ask(probe, subject, text(), QUICK)
    assert not result.failed
    assert next(iter(result.readings)) == "ahead_2"
    assert result.readings["ahead_2"].value < 0.1  # it has random weights itself
    skills = [name for name in result.readings if name.startswith("skill_")]
    assert bool(skills) == (subject.name == "everything")
    fast = ask(probe, subject, text(), Budget(tokens=0.1, fast=True))
    assert "random weights" in fast.left_out


def test_an_untrained_model_is_another_one_of_the_same_kind(subject):
    ids = torch.arange(64)[None] % 100
    before = subject.logits(ids)
    state = torch.random.get_rng_state()
    fresh = subject.untrained()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(subject.logits(ids), before)
    assert fresh.logits(ids).shape == before.shape
    assert not torch.allclose(fresh.logits(ids), before)


# ---- N-grams


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=12), min_size=1, max_size=4), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_counts_are_those_of_a_slow_count(rows, order):
    length = max(map(len, rows))
    ids = np.array([[*row, *[-1] * (length - len(row))] for row in rows])
    chances = Counts(ids[:, :-1], ids[:, 1:], 4, 3).chances(ids[:1, : len(rows[0])], order)[0]

    def slow(past: list[int]) -> np.ndarray:
        p = np.full(4, 0.25)
        for longest in range(order + 1):
            if longest > len(past):
                break
            context = past[len(past) - longest :]
            seen = np.zeros(4)
            for row in rows:
                for at in range(1, len(row)):
                    if at >= longest and row[at - longest : at] == context:
                        seen[row[at]] += 1
            if not seen.sum():
                break
            different = (seen > 0).sum()
            p = (seen + different * p) / (seen.sum() + different)
        return p

    for at in range(len(rows[0])):
        assert chances[at] == pytest.approx(slow(rows[0][: at + 1]), abs=1e-12)


def test_an_ngram_is_a_model_like_others():
    model = NGram(text().text, 259, byte_tokenizer())
    ids = torch.tensor([list(b"the king speaks of love")])
    logits = model.logits(ids)
    assert logits.logsumexp(-1).abs().max() < 1e-5
    assert model.nats(ids).mean() < 2.5


# ---- Words


def test_words_of_works_and_of_grammar():
    texts = ["the dragons and the king. dragons! dragons", "a king of war. king", "no king of war", "a king"]
    stream = TokenStream.from_text(texts, byte_tokenizer())
    (kinds,) = _kinds([stream], token_bytes(byte_tokenizer(), 259))
    spelt = bytes(stream.tokens(0, len(stream)).clip(max=255).astype(np.uint8))
    assert bytes(byte for byte, kind in zip(spelt, kinds, strict=True) if kind == 0) == b"dragons" * 3
    assert bytes(byte for byte, kind in zip(spelt, kinds, strict=True) if kind == 1) == b"theandtheaofnoofa"


def test_agreement_is_the_choice_between_two_forms():
    stream = TokenStream.from_text("x" * 70 + " is here, islands are there", byte_tokenizer())
    table = token_bytes(byte_tokenizer(), 259)
    know_nothing = spelled(lambda ids: torch.zeros(*ids.shape, 259), "uniform")
    found = _agreement(know_nothing, Material([stream]), table, QUICK)
    # " is " has a letter less than " are ", so it is 259 times as likely to know nothing.
    assert [number for number, _ in found] == [0, 0]
    assert sorted(bits for _, bits in found) == pytest.approx([math.log2(1 + 1 / 259), math.log2(1 + 259)], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((0, 1, 2, 4), 4.0),
        ((4, 4, 4, 4), 1.0),
        ((0, 0, 4, 4), math.sqrt(3 * 5) - 1),
        ((0, 3, 1, 4), 1.0),
        ((0, 1, 1, 0), None),
    ],
)
def test_the_step_that_reaches_half(values, step):
    found = reached([1, 2, 4, 8], np.array(values, float))
    if step is None:
        assert math.isnan(found)
    elif values == (0, 3, 1, 4):
        assert 1 < found < 2
    else:
        assert found == pytest.approx(step)


# ---- Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with canaries, fingerprints and log-spaced checkpoints, asked on the way."""
    place = tmp_path_factory.mktemp("place")
    for number in range(5):
        (place / f"{number}.txt").write_text(prose(number, 2000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYADLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(place)
        call(
            "train", "--preset", "tiny", "--data", *[f"{number}.txt" for number in range(5)], "--output", "run",
            "--device", "cpu", "--probe", "whiteout", "position", "memorise", "--set", "model.hidden_size=16",
            "model.num_hidden_layers=1", "data.sequence_length=64", "max_steps=16", "per_device_train_batch_size=8",
            "data.canaries=1", "train.log_spaced_checkpoints=true", "fingerprint.dropout=0.5", "fingerprint.shown=true",
            "save_steps=16", "eval_steps=16", "logging_steps=4", "data.validation_tokens=64",
        )  # fmt: skip
        yield place / "run"


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_probes_are_logged_at_checkpoints(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "probe_memorise_exposure" in line]
    assert steps == [1, 2, 4, 8, 16]
    assert [line["step"] for line in lines if "probe_whiteout_regained" in line] == [2, 4, 8, 16]
    assert any("loss" in line for line in lines)


def test_a_run_is_read_over_its_checkpoints(run, capsys, tmp_path):
    assert call("diagnose", run, "--over-time", "--fast", "--json", "--device", "cpu", "--output", tmp_path) == 0
    (found,) = json.loads(capsys.readouterr().out)
    results = found["results"]
    assert list(results) == ["octave", "whiteout", "memorise", "theme"]
    for result in results.values():
        assert not result["failed"], result
    assert results["whiteout"]["curves"]["loss at all tokens"]["x"] == [1, 2, 4, 8, 16]
    assert results["memorise"]["curves"]["exposure by step"]["x"] == [1, 2, 4, 8, 16]
    assert (tmp_path / "run-over-time.json").is_file()
    assert "exposure by step" in (tmp_path / "report" / "index.html").read_text()


def test_references_stand_beside_a_model(run, capsys, tmp_path):
    arguments = ["diagnose", run, "--references", "--probe", "octave", "--fast", "--device", "cpu"]
    assert call(*arguments, "--json", "--output", tmp_path) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["subject"] for entry in found] == ["run", "run untrained", "4-gram"]
    losses = [entry["results"]["octave"]["readings"]["bits_per_byte"]["value"] for entry in found]
    assert losses[2] < losses[0] < losses[1]
    assert "4-gram" in (tmp_path / "report" / "index.html").read_text()


def test_one_model_is_not_over_time(run, capsys):
    assert call("diagnose", run, "--over-time", "--probe", "leak", "octave") == 2
    assert "leak looks at one model" in capsys.readouterr().err
    assert call("diagnose", run, "--over-time", "--references") == 2
    assert "--references stand beside one model" in capsys.readouterr().err
    assert call("diagnose", run / "checkpoint-1", "--over-time") == 2
    assert "fewer than two checkpoints" in capsys.readouterr().err


def test_a_trajectory_holds_one_model_at_a_time(run):
    trajectory = load_trajectory(str(run), "cpu")
    assert list(trajectory.steps) == [1, 2, 4, 8, 16]
    (leak,) = chosen(["leak"])
    assert "leave --over-time out" in ask(leak, trajectory, text(), QUICK).not_applicable
    (theme,) = chosen(["theme"])
    lonely = Trajectory([16], trajectory.load)
    assert "fewer than two checkpoints" in ask(theme, lonely, text(), QUICK).not_applicable


def test_checkpoints_show_fingerprints_and_the_finished_model_none(run):
    ids, index = torch.arange(32)[None], torch.arange(32)[None]
    assert load_subject(str(run), "cpu").fingerprinted(ids, index) is None
    last = load_subject(str(run / "checkpoint-16"), "cpu")
    shown = last.fingerprinted(ids, index)
    assert shown.shape == (1, 32, 259)
    assert not torch.allclose(shown, last.logits(ids))
    assert not torch.allclose(shown, last.fingerprinted(ids, index + 1000))
    material = load_material(str(run / "checkpoint-16"), last, [])
    assert material.canaries is not None
    (identity,) = chosen(["identity"])
    assert "index_train" in ask(identity, last, material, Budget(tokens=0.05, fast=True)).readings


def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([prose(0)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("probe", ["whiteout", "theme", "octave", "memorise"])
def test_tokens_of_several_letters(probe):
    tokenizer = bpe()
    stream = TokenStream.from_text([prose(number) for number in range(5)], tokenizer)
    planted = Material([stream], None, "text", plan_canaries(1, 0, tokenizer, 85, 64))
    config = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1}

    def load(step):
        torch.manual_seed(step)
        return HuggingFaceSubject(DyadForCausalLM(DyadConfig(**config)), tokenizer)

    result = ask(chosen([probe])[0], Trajectory([0, 10], load), planted, QUICK)
    assert not result.failed
    # Random weights have learned nothing, of which there may be no half; all else has its figures.
    assert result.readings or "has not fallen" in result.not_applicable


def test_a_resumed_run_knows_its_earlier_checkpoints(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (16, 32))]
    for steps in (4, 6):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(llama(), arguments, train_dataset=rows)
        asked = chosen(["whiteout"]) if steps == 6 else []
        callback = ProbeCallback(trainer, asked, text(), byte_tokenizer())
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=steps == 6)
    assert callback.steps == [2, 4, 6]
    assert [entry["step"] for entry in trainer.state.log_history if "probe_whiteout_regained" in entry] == [6]


def test_any_trainer_takes_the_callback(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (16, 32))]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(llama(), arguments, train_dataset=rows)
    trainer.add_callback(ProbeCallback(trainer, chosen(["octave", "whiteout", "select"]), text(), byte_tokenizer()))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "probe_octave_total" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert ["probe_whiteout_regained" in entry for entry in logged] == [False, True]
    assert trainer.model.training
