"""Time and memory of a training step on a GPU: `small` and `base` beside a Llama of their size, by length of text.

One process is one contender at one size; `benchmarks/gpu.py` starts them. It prepares its shapes (compiles, warms up),
says so, and waits until it may measure; so compilers of all contenders run side by side, and steps are timed alone.

bfloat16 autocast, fused AdamW, 32,768 tokens a step. The Llama reads with torch's fused attention and is compiled; so
are the blocks of the Mamba-2 of transformers, which without the package mamba-ssm has no kernels of its own.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import dyadlm
from common import dyad, llama, mamba2, size
from dyadlm import kernels
from dyadlm.files import write_atomically
from lanes import optimizer_of

CONTENDERS = ("ours", "ours-without-kernels", "ours-compiled", "llama-compiled", "mamba2-compiled")
LENGTHS = (2048, 8192, 32768)
TOKENS = 32_768
LLAMAS = {"tiny": (5, 128, 4), "small": (8, 320, 5), "base": (12, 768, 12)}  # layers, width, heads
MEASURED_STEPS = 8


def build(contender: str, preset: str, longest: int) -> Any:
    """A model of about the preset's size."""
    if contender.startswith("llama"):
        layers, width, heads = LLAMAS[preset]
        model = llama(size(dyad(preset)), layers, width, heads, longest)
        model.config._attn_implementation = "sdpa"
        return model
    if contender.startswith("mamba2"):
        width = LLAMAS[preset][1]
        one, two = (size(mamba2(layers, width)) for layers in (1, 2))
        return mamba2(1 + round((size(dyad(preset)) - one) / (two - one)), width)
    return dyad(preset, max_position_embeddings=longest)


def compiled(contender: str, model: Any) -> None:
    """Compile the blocks one by one: they share what is compiled."""
    if contender.endswith("-compiled"):
        for layer in model.base_model.layers:
            layer.compile()


class Steps:
    """Training steps of one model at one length."""

    def __init__(self, model: Any, device: str, length: int, tokens: int):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(32, 127, (max(1, tokens // length), length), generator=generator).to(device)
        self.model, self.device = model, device
        self.optimizer = optimizer_of(model, "adamw", 1e-4)

    def take(self, count: int) -> None:
        """So many steps, as the trainer takes them."""
        for _ in range(count):
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def measure(self, count: int) -> dict[str, float]:
        """Milliseconds of a step, and the peak of memory in MiB."""
        gpu = self.device == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(count):
            if gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            self.take(1)
            if gpu:
                torch.cuda.synchronize()
            taken.append(1000 * (time.perf_counter() - begun))
        memory = torch.cuda.max_memory_allocated() / 2**20 if gpu else 0.0
        middle = statistics.median(taken)
        return {
            "milliseconds": round(middle, 2),
            "fastest": round(min(taken), 2),
            "tokens_per_second": round(self.ids.numel() / middle * 1000),
            "peak_mib": round(memory),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--preset", choices=LLAMAS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where signals and results lie")
    parser.add_argument("--name", required=True, help="of the files there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    name = options.name
    kernels.INSTALLED = kernels.INSTALLED and options.contender != "ours-without-kernels"
    model = build(options.contender, options.preset, max(options.lengths)).to(options.device).train()
    if isinstance(model, dyadlm.DyadForCausalLM):
        model.model.progress.fill_(1.0)
    compiled(options.contender, model)
    shapes: dict[int, Steps] = {}
    for length in options.lengths:
        try:
            begun = time.perf_counter()
            shapes[length] = Steps(model, options.device, length, options.tokens)
            shapes[length].take(2)
            if options.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            print(f"{name}: {length} prepared in {time.perf_counter() - begun:.1f} s", flush=True)
        except torch.cuda.OutOfMemoryError:
            shapes.pop(length, None)
            print(f"{name}: {length} does not fit", flush=True)
            torch.cuda.empty_cache()
    (options.folder / f"{name}.ready").touch()
    while not (options.folder / f"{name}.go").exists():
        time.sleep(0.05)
    found: dict[str, Any] = {"parameters": size(model)}
    for length, steps in shapes.items():
        steps.take(1)
        found[str(length)] = steps.measure(MEASURED_STEPS)
        write_atomically(options.folder / f"{name}.json", json.dumps(found))
    print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
