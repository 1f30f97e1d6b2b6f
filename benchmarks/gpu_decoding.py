"""Time of a decoded token on a GPU, by rows decoded together and by how much was read before.

    python benchmarks/gpu_decoding.py --preset small --folder DIR

Ours reads with one CUDA graph a token (`dyadlm.generate.graph_step`), and without. The Llama has a key-value cache of
fixed size and fused attention; its step is a CUDA graph, too. Weights are random, in bfloat16 (states of ours in
float32). Its cache holds noise: what stands there does not change its cost.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from common import dyad, llama, size
from dyadlm import DyadCache
from dyadlm.files import write_atomically
from dyadlm.generate.graph_step import GraphStep
from gpu_training import LLAMAS

ROWS = (64, 1, 512)
CONTEXTS = (0, 1024, 8192)
TOKENS, ROUNDS = 32, 5


def milliseconds(step: Callable[[], None]) -> float:
    """Of one token, in the fastest of some rounds: other programs may use the card now and then."""
    for _ in range(3):
        step()
    taken = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(TOKENS):
            step()
        torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begun) / TOKENS)
    return round(min(taken), 4)


@torch.no_grad()
def ours(preset: str, rows: int, graph: bool, compiled: bool = False) -> dict[str, Any]:
    model = dyad(preset).to("cuda", torch.bfloat16).eval()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    cache, tokens = DyadCache(), torch.full((rows,), 101, device="cuda")
    prompt = torch.randint(32, 127, (1, 600)).cuda()
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    if not graph:
        taken = milliseconds(
            lambda: model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1) and None
        )
    else:
        steps = GraphStep(model, cache)
        taken = milliseconds(lambda: steps.step(tokens) is None)
    return {"milliseconds": taken, "state_bytes_per_row": cache.state_bytes() // rows, "parameters": size(model)}


@torch.no_grad()
def peer(preset: str, rows: int, context: int) -> dict[str, Any]:
    layers, width, heads = LLAMAS[preset]
    room = context + 8 * TOKENS
    model = llama(size(dyad(preset)), layers, width, heads, room).to("cuda", torch.bfloat16).eval()
    cache = StaticCache(config=model.config, max_cache_len=room)
    tokens = torch.full((rows, 1), 101, device="cuda")

    def step() -> torch.Tensor:
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    step()
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
        taken, recorded = milliseconds(graph.replay), True
    except RuntimeError as error:
        print(f"the Llama could not be recorded: {str(error)[:200]}", flush=True)
        taken, recorded = milliseconds(lambda: step() is None), False
    bytes_per_row = 2 * layers * width * room * 2
    return {"milliseconds": taken, "graph": recorded, "state_bytes_per_row": bytes_per_row, "parameters": size(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=LLAMAS, nargs="+", default=["small", "base"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"), help="unix time at which to stop")
    options = parser.parse_args()
    path = options.folder / "decoding.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    for preset in options.preset:
        for rows in ROWS:
            wanted |= {
                f"ours graph {preset} {rows}": partial(ours, preset, rows, True),
                f"ours {preset} {rows}": partial(ours, preset, rows, False),
                **{f"llama {preset} {rows} at {context}": partial(peer, preset, rows, context) for context in CONTEXTS},
            }
    wanted["ours graph compiled small 64"] = partial(ours, "small", 64, True, True)
    for name, cell in wanted.items():
        if name in found or time.time() > options.until:
            continue
        try:
            found[name] = cell()
        except Exception as error:  # a cell that fails says why, and the others go on
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        torch.cuda.empty_cache()
        print(name, json.dumps(found[name]), flush=True)
        write_atomically(path, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
