"""The rates that `dyadlm plan` reckons with, from what was measured on GPUs (benchmarks/results/gpu*.json).

    python benchmarks/rates.py          # writes src/dyadlm/train/rates.json; nothing is measured anew

A rate is the floating-point operations of matrix products in a second, of one model at one length of text: the tokens
of a second were measured, the operations of a token are counted. Of ours eagerly (`eager`), with compiled blocks and
the whole step in one CUDA graph (`graph`), and of a compiled Llama with flash attention (`llama`).
"""

import json
from pathlib import Path
from typing import Any

from dyadlm import DyadConfig
from dyadlm.accounting import activation_bytes, parameters, training_flops_per_token
from gpu_text import SHAPES
from gpu_training import LLAMAS, TOKENS

ROOT = Path(__file__).resolve().parents[1]
RATES = ROOT / "src" / "dyadlm" / "train" / "rates.json"
KINDS = {"ours": "eager", "llama-compiled": "llama"}


def rates() -> list[dict[str, Any]]:
    """One entry for each measured model, length and way to run it."""
    found = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("gpu*.json")):
        stored = json.loads(file.read_text())
        gpu = {"gpu": stored["card"]["device"], "torch": stored["card"]["torch"], "commit": stored["commit"]}
        for name, cell in stored.get("training", {}).items():
            contender, preset, length = name.split()
            if contender in KINDS:
                found.append(gpu | _rate(KINDS[contender], preset, int(length), cell["parameters"], cell[length]))
        if "small" in stored.get("text", {}):
            cell = stored["text"]["small"]
            found.append(gpu | _rate("graph", "small", SHAPES["small"][1], cell["parameters"], cell))
    return found


def _rate(kind: str, preset: str, length: int, size: int, measured: dict[str, Any]) -> dict[str, Any]:
    """measured: tokens_per_second; peak_mib, where memory was measured, of steps of `TOKENS` tokens."""
    config = DyadConfig.from_preset(preset, max_position_embeddings=length)
    if kind == "llama":
        layers, width, _ = LLAMAS[preset]
        # Weights (the head is the embedding), and causal attention, which needs half of its products.
        operations = 6.0 * size + 6.0 * layers * width * length
    else:
        assert parameters(config) == size, f"{preset} at {length} is not the model that was measured"
        operations = training_flops_per_token(config, length)
    found = {"kind": kind, "preset": preset, "sequence_length": length, "parameters": size}
    found["tokens_per_second"] = measured["tokens_per_second"]
    found["flops_per_second"] = round(operations * measured["tokens_per_second"])
    if kind == "eager":
        found["peak_bytes"] = measured["peak_mib"] * 2**20
        found["activation_bytes"] = activation_bytes(config, TOKENS // length, length)
    return found


if __name__ == "__main__":
    RATES.write_text(json.dumps(rates(), indent=1) + "\n")
