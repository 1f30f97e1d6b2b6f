"""What larger slot tables are worth to a trained model, and what they cost: loss, bytes, forks.

    python benchmarks/slot_tables.py runs/tiny [--only bytes]

Loss: nats a byte of the first 65,536 bytes of Hamlet and of the validation parts of `kjv` and `sotu`, state carried.
Bytes: of a state in the engine, in torch and in a file. Forks: time of a copy, of the first token after it (which
copies the tables) and of the next, medians of 20, one thread.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carried import text_of
from common import Cells, arguments, require_green
from dyadlm.data import TokenStream
from dyadlm.engine import Engine
from dyadlm.evaluate import evaluate
from dyadlm.generate import load_model

SIZES = (
    {},
    {"slot_entries": 8_192},
    {"slot_entries": 65_536},
    {"slot_evict": "lru"},
    {"slot_evict": "lru", "slot_entries": 4_096},
    {"slot_evict": "lru", "slot_entries": 8_192},
    {"slot_evict": "lru", "slot_entries": 16_384},
    {"slot_evict": "lru", "slot_entries": 65_536},
    {"slot_values": "float16"},
    {"slot_values": "float16", "slot_entries": 65_536},
)
HELD = tuple(
    {"slot_entries": entries, "slot_values": values}
    for entries, values in product((1_024, 8_192, 65_536), ("float32", "float16"))
)
FORKS = 20


def loss(folder: Path, fields: dict[str, Any], text: str) -> dict[str, Any]:
    """Nats a byte, the state carried."""
    model, tokenizer = load_model(folder, "cpu", "float32", fields)
    stream = TokenStream.from_tokens(np.frombuffer(text_of(text), np.uint8).astype(np.int32), name=text)
    result = evaluate(model, stream, tokenizer, mode="stream")
    return {"nats": round(result.nats_per_token, 4), "seconds": round(result.seconds, 1)}


def held(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a state after 256 tokens, and milliseconds of what forks cost in the engine."""
    model, tokens = load_model(folder, "cpu", "float32", fields)[0], list(text_of("hamlet")[:256])
    engine = Engine.from_folder(folder, fields=fields)
    state = engine.start()
    for token in tokens:
        engine.step(state, token)
    with torch.no_grad():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    with tempfile.TemporaryDirectory() as place:
        cache.save(Path(place, "state"), model.config)
        size = Path(place, "state").stat().st_size
    taken: dict[str, list[float]] = {"fork": [], "first token": [], "next token": []}
    for _ in range(FORKS):
        started = time.perf_counter()
        fork = state.copy()
        taken["fork"].append(time.perf_counter() - started)
        for name in ("first token", "next token"):
            started = time.perf_counter()
            engine.step(fork, tokens[0])
            taken[name].append(time.perf_counter() - started)
    return {
        "engine_bytes": sum(array.nbytes for array in state.arrays().values()),
        "torch_bytes": cache.state_bytes(),
        "file_bytes": size,
        "milliseconds": {name: round(1000 * statistics.median(times), 3) for name, times in taken.items()},
    }


def said(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items()) or "as trained"


def main() -> None:
    parser = arguments(__doc__ or "", "slot_tables.json")
    parser.add_argument("folder", type=Path, help="a run of `dyadlm train --preset tiny --data shakespeare`")
    parser.add_argument("--only", default="", metavar="BEGINNING", help="measure what is named so: bytes, loss")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    tasks: dict[str, Callable[[], dict[str, Any]]] = {}
    for fields in HELD:
        tasks[f"bytes {said(fields)}"] = lambda fields=fields: held(options.folder, fields)
    for fields, text in product(SIZES, ("hamlet", "kjv", "sotu")):
        tasks[f"loss {said(fields)} {text}"] = lambda fields=fields, text=text: loss(options.folder, fields, text)
    cells = Cells(options.output)
    for name in cells.missing([name for name in tasks if name.startswith(options.only)]):
        cells.store(name, tasks[name]())


if __name__ == "__main__":
    main()
