"""Device, dtype and compiler are chosen with a reason, and a resumed run keeps what it began with."""

import importlib
import json

import pytest
import torch
from transformers import TrainingArguments

from dyadlm import UserError
from dyadlm.train import arguments, compiler
from dyadlm.train.arguments import choose_dtype, has_bfloat16, training_arguments
from dyadlm.train.compiler import compiling, require_compiler
from dyadlm.train.run import is_first_process


@pytest.mark.parametrize("capable", [True, False])
def test_a_processor_that_computes_in_bfloat16_is_used(capable, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    assert has_bfloat16() == capable
    assert choose_dtype("auto", None, "cpu")[0] == ("bfloat16" if capable else "float32")
    assert choose_dtype("float32", None, "cpu") == ("float32", "as asked")
    assert choose_dtype("auto", False, "cpu") == ("float32", "as asked")
    assert choose_dtype("auto", None, "mps")[0] == "float32"


def test_without_the_question_there_is_no_answer(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16()


@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_computes_as_it_began(before, tmp_path, small, monkeypatch):
    monkeypatch.setattr(arguments, "has_bfloat16", lambda: not before)
    started = {
        "settings": {"preset": "tiny", "data": ["words"]},
        "training_arguments": {"bf16": True} if before else {},
    }
    (tmp_path / "dyadlm.json").write_text(json.dumps(started))
    found, choices = training_arguments(small(tmp_path, dtype="auto", resume=True), tmp_path)
    assert found.bf16 == before
    assert "as the run began" in choices[1]
    found, _ = training_arguments(small(tmp_path / "new", dtype="auto"), tmp_path / "new")
    assert found.bf16 != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerate_does_not_decide_the_precision(dtype, tmp_path, small, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    found, choices = training_arguments(small(tmp_path, dtype=dtype), tmp_path)
    assert found.mixed_precision == ("bf16" if dtype == "bfloat16" else "no")
    assert choices[1] == f"dtype {dtype}: as asked"


def test_several_processes_are_told_once(tmp_path, small, monkeypatch):
    """How many they are, and nothing of transformers from those that are not the first."""
    settings = small(tmp_path, "train.windows_per_step=8", "gradient_accumulation_steps=2")
    assert not any("processes" in choice for choice in training_arguments(settings, tmp_path)[1])
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    found, choices = training_arguments(settings, tmp_path)
    assert choices[-1] == "processes 2: each takes 4 of the 8 windows of a step"
    assert found.log_level_replica == "passive"
    asked = small(tmp_path, "log_level_replica=info")
    assert training_arguments(asked, tmp_path)[0].log_level_replica == "info"


def test_ends_of_rows_are_compiled_without_masks():
    """torch 2.13 computes wrong gradients with them, in one case that takes minutes to compile."""
    config = importlib.import_module("torch._inductor.config")
    before = config.cpp.enable_loop_tail_vec
    with compiling():
        assert not config.cpp.enable_loop_tail_vec
    assert config.cpp.enable_loop_tail_vec == before


def test_compiling_without_a_compiler_is_refused(tmp_path, small, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler.*leave train.compile out"):
        training_arguments(small(tmp_path, "train.compile=true"), tmp_path)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: "/usr/bin/" + name)
    require_compiler()
    assert training_arguments(small(tmp_path, "train.compile=true"), tmp_path)[0].torch_compile
    assert not training_arguments(small(tmp_path), tmp_path)[0].torch_compile


@pytest.mark.parametrize(
    ("rank", "processes", "first"),
    [(None, None, True), ("1", None, True), ("3", "1", True), ("", "", True), ("0", "2", True), ("1", "2", False)],
)
def test_the_first_process_is_one_of_several_or_alone(monkeypatch, rank, processes, first):
    """A RANK that something else left in the environment made a run keep silent, without its lock and record."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", processes)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert is_first_process() == first


@pytest.mark.parametrize(("rank", "processes"), [("one", "2"), ("2", "2"), ("0", "-2"), ("0", "two")])
def test_a_process_that_is_none_among_others_is_refused(monkeypatch, rank, processes):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError, match=f"RANK={rank} and WORLD_SIZE={processes}"):
        is_first_process()
