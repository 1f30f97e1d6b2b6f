"""What the studies share: models to compare, one trainer, resumable cells, and the circumstances of a figure."""

import argparse
import functools
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

import dyadlm
from dyadlm.accounting import parameters
from dyadlm.data import TokenStream, TrainingWindows, byte_tokenizer, resolve_data
from dyadlm.evaluate import evaluate
from dyadlm.files import write_atomically
from dyadlm.train.muon import muon_over
from dyadlm.train.optimizer import (
    decayed_parameters,
    learning_rate_factor,
    matrix_parameters,
    matrix_rate,
    scale_rates,
)
from dyadlm.train.settings import TrainOptions
from dyadlm.train.validation import ValidationSample

ROOT = Path(__file__).resolve().parent.parent
PARITY_TESTS = (
    *(f"tests/ops/test_{name}.py" for name in ("pyramid", "transport", "segments", "contexts", "slots", "selection")),
    "tests/model/test_streaming.py",
    "tests/engine/test_engine.py",
)


def require_green() -> None:
    """Refuse to measure code whose parity tests fail. A pass is remembered for as long as the code is the same."""
    code = hashlib.sha256()
    for path in sorted(
        [
            *(ROOT / "src/dyadlm/ops").glob("*.py"),
            *(ROOT / "src/dyadlm/model").rglob("*.py"),
            *(ROOT / "src/dyadlm/engine").glob("*.py"),
        ]
    ):
        code.update(path.read_bytes())
    stamp = ROOT / ".pytest_cache" / "parity" / code.hexdigest()
    if stamp.exists():
        return
    print("running the parity tests first ...", flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-x", *PARITY_TESTS], cwd=ROOT, check=False)
    if tests.returncode:
        raise SystemExit("The parity tests fail; a figure of this code would mean nothing.")
    write_atomically(stamp, "passed\n")


@functools.cache
def commit() -> str:
    """The commit that this process was started at."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def circumstances() -> dict[str, Any]:
    """What a figure needs beside it: commit, device, dtype, versions."""
    return {
        "commit": commit(),
        "device": "cpu",
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {
            "dyadlm": dyadlm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def dyad(preset: str = "tiny", **overrides: Any) -> dyadlm.DyadForCausalLM:
    """One of our presets."""
    return dyadlm.DyadForCausalLM(dyadlm.DyadConfig.from_preset(preset, **overrides))


def llama(like: int, layers: int = 5, width: int = 128, heads: int = 4, positions: int = 256) -> LlamaForCausalLM:
    """A Llama over bytes with as near to `like` parameters as its feed-forward width allows."""
    vocabulary = 259
    rest = vocabulary * width + width + layers * (4 * width * width + 2 * width)
    intermediate = max(8, round((like - rest) / (3 * layers * width * 8)) * 8)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=257,
            eos_token_id=258,
            pad_token_id=256,
        )
    )


def matched_llama(**options: Any) -> LlamaForCausalLM:
    """The Llama with the parameters of the tiny preset."""
    return llama(parameters(dyadlm.DyadConfig.from_preset("tiny")), **options)


def mamba2(layers: int = 9, width: int = 128, state: int = 64) -> Mamba2ForCausalLM:
    """A Mamba-2 over bytes of about 1M parameters. Blocks of 128 were the fastest of 32 to 256 on a CPU."""
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=259,
            hidden_size=width,
            state_size=state,
            num_hidden_layers=layers,
            expand=2,
            head_dim=64,
            num_heads=2 * width // 64,
            n_groups=1,
            chunk_size=128,
            tie_word_embeddings=True,
            bos_token_id=257,
            eos_token_id=258,
            pad_token_id=256,
        )
    )


def medium_corpus(sequence_length: int, scored: int) -> tuple[list[tuple[TokenStream, float]], ValidationSample]:
    """Shakespeare, the King James Bible and the State of the Union before 2000: streams to train on with their weights,
    and windows of so many tokens in all to score."""
    data = resolve_data(["shakespeare", "kjv", "sotu"])
    prefix = byte_tokenizer().bos_token_id
    sample = ValidationSample.draw(data.validation, sequence_length, scored, prefix)
    return [(stream, float(len(stream))) for stream, _ in data.train], sample


def size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def train(
    model: PreTrainedModel,
    stream: TokenStream | list[tuple[TokenStream, float]],
    *,
    tokens: int,
    batch_size: int,
    sequence_length: int,
    learning_rate: float,
    seed: int,
    optimizer: str = "adamw",
    final_learning_rate: float = 0.1,
    base_width: int = 0,
) -> dict[str, float]:
    """5 % warm-up, cosine, clipping at 1: as `dyadlm train` does, without its bookkeeping."""
    steps = tokens // (batch_size * sequence_length)
    streams = [(stream, 1.0)] if isinstance(stream, TokenStream) else stream
    windows = TrainingWindows(streams, sequence_length, steps * batch_size, seed=seed)
    moves = _optimizer(model, optimizer, {"lr": learning_rate, "betas": (0.9, 0.99)})
    options = TrainOptions(optimizer=optimizer, base_width=base_width, final_learning_rate=final_learning_rate)
    if base_width:
        matrices = [model.get_parameter(name) for name in matrix_parameters(model)]
        scale_rates(moves, matrices, matrix_rate(options, model.config.hidden_size))
    rates = [group["lr"] for group in moves.param_groups]
    warmup = max(1, math.ceil(0.05 * steps))
    model.train()
    started, losses = time.perf_counter(), []
    for step, batch in enumerate(DataLoader(windows, batch_size)):
        factor = learning_rate_factor(step, warmup_steps=warmup, max_steps=steps, options=options)
        for group, rate in zip(moves.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if isinstance(model, dyadlm.DyadForCausalLM):
            model.set_progress(step / steps)
        output = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        loss = output.loss
        moves.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moves.step()
        beside = (getattr(output, "metrics", None) or {}).get("cost", 0.0)  # of gates and routers, not of the text
        losses.append(float(loss.detach() - beside))
    if isinstance(model, dyadlm.DyadForCausalLM):
        model.set_progress(1.0)
    seconds = time.perf_counter() - started
    tail = losses[-max(1, steps // 20) :]
    return {
        "steps": steps,
        "tokens": steps * batch_size * sequence_length,
        "seconds": round(seconds, 1),
        "milliseconds_per_step": round(1000 * seconds / steps, 2),
        "training_nats": round(statistics.fmean(tail), 4),
    }


def _optimizer(model: PreTrainedModel, name: str, options: dict[str, Any]) -> torch.optim.Optimizer:
    if name == "muon":
        return muon_over(model, weight_decay=0.1, adamw=options)
    names = set(decayed_parameters(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in names], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in names], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **options)


def validation_nats(model: PreTrainedModel, stream: TokenStream, window: int) -> dict[str, Any]:
    """The primary figure of `dyadlm evaluate`: disjoint windows, fresh state, every token once."""
    result = evaluate(model, stream, byte_tokenizer(), window=window)
    return {"nats": round(result.nats_per_token, 4), "bits_per_byte": round(result.bits_per_byte, 4)}


def interval(values: list[float]) -> dict[str, float]:
    """Median and its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.tensor(values)
    picks = torch.randint(len(values), (2000, len(values)), generator=generator)
    low, high = sample[picks].median(1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"median": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


def step_times(
    models: Mapping[str, tuple[PreTrainedModel, Mapping[str, torch.Tensor]]], rounds: int = 7
) -> dict[str, Any]:
    """Of a step forward and back, in the thread's own time; the models, each with a batch of its own, take turns, and
    ratios to the first are formed in each round."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, (model, batch) in models.items():
            started = time.thread_time()
            model.train()(**batch, use_cache=False).loss.backward()
            if number:  # the first round warms up
                taken[name].append(1000 * (time.thread_time() - started))
    first = next(iter(taken.values()))
    return {
        name: {
            "milliseconds": round(statistics.median(each), 1),
            "ratio": interval([one / other for one, other in zip(each, first, strict=True)]),
        }
        for name, each in taken.items()
    }


class Cells:
    """Results by name in one JSON file; a cell that is there is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, dict[str, Any]] = {}
        self._read()
        commit()

    def _read(self) -> None:
        if self.path.exists():
            self.results |= json.loads(self.path.read_text())["cells"]

    def missing(self, names: list[str]) -> Iterator[str]:
        """The names not yet measured, with a line of progress for each."""
        todo = [name for name in names if name not in self.results]
        started = time.monotonic()
        for number, name in enumerate(todo):
            rest = (
                ""
                if not number
                else f", about {(time.monotonic() - started) / number * (len(todo) - number):.0f} s left"
            )
            print(f"[{number + 1}/{len(todo)}] {name}{rest}", flush=True)
            yield name

    def store(self, name: str, result: dict[str, Any]) -> None:
        """Keep a result and write the file, with what another process has put there meanwhile."""
        self._read()
        self.results[name] = {**result, "circumstances": circumstances()}
        print(f"    {json.dumps(result)}", flush=True)
        write_atomically(self.path, json.dumps({"cells": self.results}, indent=1) + "\n")


def arguments(description: str, default_output: str, text: bool = False) -> argparse.ArgumentParser:
    """The options every study has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / default_output)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if text:
        parser.add_argument("--text", type=Path, required=True, help="a text file; its last tenth is for validation")
    return parser


def split_text(path: Path) -> tuple[TokenStream, TokenStream]:
    """Training and validation bytes of one file, 90 to 10, without ends of document."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).numpy()
    cut = int(len(data) * 0.9)
    return TokenStream.from_tokens(data[:cut], name="training"), TokenStream.from_tokens(data[cut:], name="validation")


def median_and_spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f}, {len(values)} seeds)"
