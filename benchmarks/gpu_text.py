"""Training on as much text as a given time allows on a GPU: `tiny-en`, or `small` beside a Llama of its size.

    python benchmarks/gpu_text.py --model tiny-en --shard DIR --seconds 120 --folder DIR

The shard (`shard.py`) holds NAME.train.txt and NAME.validation.txt. Half of the windows begin with a paragraph, after
the begin-of-text token; the others anywhere. Sources are drawn with the weights below. bfloat16 autocast, Muon for the
matrices, AdamW for the rest, each step one CUDA graph. The number of steps follows from the first ones, so that warm-up
and cosine fit into the time. Scores: nats a byte in fresh windows of each validation part.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from common import dyad, llama, size
from dyadlm.files import write_atomically
from dyadlm.train.optimizer import learning_rate_factor
from dyadlm.train.settings import TrainOptions
from gpu_training import LLAMAS
from lanes import Lane

# How often each source is drawn, times its size: prose counts more than references.
WEIGHTS = {"gcide": 0.3, "kernel": 0.2, "python": 0.3, "wordnet": 0.5}
BEGIN = 257
# Rows, bytes of a row, learning rate.
SHAPES = {"tiny-en": (64, 1024, 8e-3), "small": (32, 1024, 4e-3), "llama-small": (32, 1024, 4e-3)}
CALIBRATION = 12
SCORED = 32_768


def build(name: str) -> Any:
    if name == "tiny-en":
        return dyad("tiny", ngram_sizes=[2, 3, 4, 6])
    if name == "small":
        return dyad("small")
    layers, width, heads = LLAMAS["small"]
    return llama(size(dyad("small")), layers, width, heads, 1024)


class Text:
    """Windows of the training text, drawn on the device."""

    def __init__(self, shard: Path, device: str):
        names = sorted(path.name.removesuffix(".train.txt") for path in shard.glob("*.train.txt"))
        parts = [np.frombuffer((shard / f"{name}.train.txt").read_bytes(), np.uint8) for name in names]
        starts, weights, begin = [], [], 0
        for name, part in zip(names, parts, strict=True):
            paragraphs = np.flatnonzero((part[1:-2] == 10) & (part[:-3] == 10) & (part[2:-1] != 10)) + 2
            if len(paragraphs) < 100:  # of texts without empty lines
                paragraphs = np.flatnonzero(part[:-2] == 10) + 1
            starts.append(paragraphs + begin)
            weights.append(WEIGHTS.get(name, 1.0) * len(part))
            begin += len(part)
        self.bytes, self.names = begin, names
        self.tokens = torch.from_numpy(np.concatenate(parts)).to(device)
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.starts, self.weights = starts, np.array(weights) / sum(weights)

    def windows(self, count: int, length: int, seed: int) -> Tensor:
        """(count, length) int64."""
        random = np.random.default_rng(seed)
        source = random.choice(len(self.names), count, p=self.weights)
        anywhere = (self.bounds[source] + random.random(count) * (np.diff(self.bounds)[source] - length - 1)).astype(
            int
        )
        paragraph = np.array(
            [self.starts[s][int(u * len(self.starts[s]))] for s, u in zip(source, random.random(count), strict=True)]
        )
        begins = random.random(count) < 0.5
        at = np.where(begins, np.minimum(paragraph, self.bytes - length - 1), anywhere)
        place = torch.from_numpy(at).to(self.tokens.device)
        opening = torch.from_numpy(begins).to(self.tokens.device)[:, None]
        # After the begin token stand the first bytes of the paragraph.
        column = torch.arange(length, device=place.device)[None] - opening.long()
        ids = self.tokens[(place[:, None] + column).clamp(min=0)].long()
        return torch.where(opening & (column < 0), BEGIN, ids)


@torch.no_grad()
def scores(model: Any, shard: Path, length: int) -> dict[str, float]:
    """Nats a byte in fresh windows of each validation part."""
    found, device = {}, next(model.parameters()).device
    for path in sorted(shard.glob("*.validation.txt")):
        data = np.frombuffer(path.read_bytes(), np.uint8)[:SCORED]
        rows = torch.from_numpy(data[: len(data) // length * length].astype(np.int64)).view(-1, length).to(device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        found[path.name.removesuffix(".validation.txt")] = round(float(nats), 4)
    return found


def told(folder: Path, name: str) -> float:
    """Say that a model is prepared, and wait for the seconds that it may train."""
    (folder / f"{name}.ready").touch()
    while not (folder / f"{name}.go").exists():
        time.sleep(0.1)
    return float((folder / f"{name}.go").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--shard", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, help="of training; without it the file MODEL.go says so, when it comes"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows, length, rate = SHAPES[options.model]
    rows, gpu = options.rows or rows, options.device == "cuda"
    text = Text(options.shard, options.device)
    torch.manual_seed(0)
    model = build(options.model).to(options.device)
    if options.compile:
        for layer in model.model.layers:
            layer.compile()
    begun = time.perf_counter()
    first = text.windows(CALIBRATION * rows, length, 1).view(CALIBRATION, rows, length)
    lane = Lane(
        model, {"input_ids": first, "labels": first}, optimizer="muon", rate=rate, autocast=torch.bfloat16, record=gpu
    )
    prepared = time.perf_counter() - begun

    def synchronize() -> None:
        if gpu:
            torch.cuda.synchronize()

    def timed(count: int) -> float:
        lane.counter.zero_()
        synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            lane.step()
        synchronize()
        return (time.perf_counter() - begun) / count

    weights = [parameter.detach().clone() for parameter in lane.parameters]
    timed(2)
    per_step = timed(CALIBRATION - 2)
    print(f"{options.model}: prepared in {prepared:.1f} s, {1000 * per_step:.1f} ms a step", flush=True)
    seconds = options.seconds or told(options.folder, options.model)
    if options.seconds is None:
        per_step = timed(CALIBRATION)  # now that no other program runs
    steps = max(CALIBRATION, int(seconds / per_step * 0.97))
    print(f"{options.model}: {1000 * per_step:.1f} ms a step, {steps} steps", flush=True)

    # From the beginning again, with the schedule of all steps; batches come in pieces through the same tensors.
    lane.rewind(weights)
    warmup, schedule = max(1, math.ceil(0.03 * steps)), TrainOptions(final_learning_rate=0.0)
    history, begun, done = [], time.perf_counter(), 0
    while done < steps:
        piece = min(CALIBRATION, steps - done)
        batch = text.windows(CALIBRATION * rows, length, 1000 + done).view(CALIBRATION, rows, length)
        for values in lane.data.values():
            values.copy_(batch)
        factors = [
            learning_rate_factor(min(done + i, steps - 1), warmup_steps=warmup, max_steps=steps, options=schedule)
            for i in range(CALIBRATION)
        ]
        lane.factors.copy_(torch.tensor(factors))
        lane.counter.zero_()
        for _ in range(piece):
            lane.step()
        done += piece
        synchronize()
        history.append([done, round(time.perf_counter() - begun, 2), round(float(lane.losses[:piece].mean()), 4)])
        if len(history) % 20 == 0:
            print(options.model, history[-1], flush=True)
        if time.perf_counter() - begun > seconds * 1.15:
            print("slower than foreseen: the schedule is cut", flush=True)
            break
    taken = time.perf_counter() - begun
    model.eval()
    if hasattr(model, "model") and hasattr(model.model, "progress"):
        model.model.progress.fill_(1.0)
    result = {
        "parameters": size(model),
        "tokens": done * rows * length,
        "text_bytes": text.bytes,
        "seconds": round(taken, 1),
        "prepared_seconds": round(prepared, 1),
        "milliseconds_per_step": round(1000 * taken / done, 2),
        "tokens_per_second": round(done * rows * length / taken),
        "training_nats": history[-1][2],
        "validation_nats": scores(model, options.shard, length),
        "history": history[:: max(1, len(history) // 100)],
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }
    tensors = {k: v.float().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, options.folder / f"{options.model}.safetensors")
    write_atomically(options.folder / f"{options.model}.json", json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "history"}), flush=True)


if __name__ == "__main__":
    main()
