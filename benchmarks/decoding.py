"""Cost of a decoded token on one thread: our engine, our torch forward pass, a Llama in transformers and in llama.cpp.

    python benchmarks/decoding.py                                       # times: cells tiny, small, base
    python benchmarks/decoding.py --trained RUN --data shakespeare      # what narrow weights cost in bits per byte
    python benchmarks/decoding.py --draw                                # the picture, from the cells there are

Needs `gguf` and `xllamacpp` (the extra `bench`). Within a cell all contenders take turns: each round times a burst of
tokens of every contender at every context, in the thread's own time (`time.thread_time`), and ratios are formed in each
round. The floor is the time to read as many bytes as the engine's weights have, by the fastest of three kernels, in the
same rounds; weights that fit into a cache are read from there, as the engine reads them.

Contexts: the engine and our torch forward pass start from a state that has really read so many tokens; so has
llama.cpp. The key-value cache of the Llama in transformers holds noise (what stands in it does not change its cost).
llama.cpp is called through its C functions (`llama_cpp.py`), without a server; its keys and values are float16.
The Llamas have as many parameters as the preset. Weights are random, of a scale at which every part speaks.
"""

import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM

import dyadlm
from common import Cells, arguments, dyad, interval, llama, require_green, size
from dyadlm import DyadCache
from dyadlm.data import resolve_data
from dyadlm.engine import Engine, EngineState
from dyadlm.report.figures import STYLE
from llama_cpp import LlamaCpp, write_gguf
from streaming import CHUNK, filled_cache

PICTURE = Path(__file__).parents[1] / "docs" / "findings" / "decoding.png"
CONTEXTS = (0, 1_000, 8_000)
FARTHEST = 1_000_000
FORMATS = ("float32", "bfloat16", "int8")
BATCH = 64
PARITY_TOKENS = 300
SCORED_BYTES = 65_536
# Layers, width and heads of the Llama; tokens of a burst; contexts of the engine.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"llama": (5, 128, 4), "burst": 64, "contexts": (*CONTEXTS, FARTHEST)},
    "small": {"llama": (8, 320, 5), "burst": 16, "contexts": CONTEXTS},
    "base": {"llama": (12, 768, 12), "burst": 4, "contexts": CONTEXTS},
}


def one_thread() -> None:
    """Start again with one thread for every library, if that was not asked for."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    if any(os.environ.get(name) != "1" for name in names):
        os.environ.update(dict.fromkeys(names, "1"))
        os.execv(sys.executable, [sys.executable, *sys.argv])


@torch.no_grad()
def speaking(model: torch.nn.Module) -> None:
    """Weights that make every part speak: new models begin with parts that add nothing."""
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            continue
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif "norm" in name:
            parameter.normal_(std=0.1).add_(1)
        else:
            parameter.normal_(std=0.3)


def text(length: int) -> list[int]:
    """Bytes with words, numbers and lines; no two thousand of them are alike."""
    random = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "it's", "error", "404:", "lazy.", "over,", "a", "dog's", "file", "2026-01"]
    chosen = random.integers(0, len(words), length // 3)
    ends = random.choice([" ", " ", " ", " ", " ", "\n"], length // 3)
    return list("".join(words[i] + end for i, end in zip(chosen, ends, strict=True)).encode())[:length]


def open_engine(folder: Path, weights: str) -> Engine:
    return Engine.from_folder(folder) if weights == "float32" else Engine.from_folder(folder, weights=weights)


def engine_state(engine: Engine, cache: DyadCache) -> EngineState:
    """The state of one row as the engine holds it."""
    return engine.state_from({name: part.numpy() for name, part in cache.tensors().items()}, cache.columns_seen)


class Contender:
    """A way to decode: `step` reads one token, `back` returns to the context that was read at first."""

    def __init__(self, step: Callable[[int], Any], back: Callable[[], None]):
        self.step, self.back = step, back

    def burst(self, tokens: list[int]) -> float:
        """Milliseconds of this thread for a token."""
        self.back()
        self.step(tokens[0])
        started = time.thread_time()
        for token in tokens[1:]:
            self.step(token)
        return 1000 * (time.thread_time() - started) / (len(tokens) - 1)


def engine_contender(engine: Engine, state: EngineState) -> Contender:
    held = [state]

    def back() -> None:
        held[0] = state.copy()

    return Contender(lambda token: engine.step(held[0], token), back)


def torch_contender(model: torch.nn.Module, cache: DyadCache) -> Contender:
    held = [cache]

    def back() -> None:
        held[0] = DyadCache() if cache.is_empty else cache.select_rows(torch.tensor([0]))

    def step(token: int) -> None:
        model(torch.tensor([[token]]), past_key_values=held[0], use_cache=True)

    return Contender(step, back)


def transformers_contender(model: LlamaForCausalLM, context: int) -> Contender:
    cache = filled_cache(model, context)

    def step(token: int) -> None:
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    def back() -> None:
        cache.crop(context - cache.get_seq_length())

    return Contender(step, back)


def llama_cpp_contender(path: Path, vocabulary: int, context: int) -> Contender:
    reader = LlamaCpp(path, vocabulary, context + 512)
    if context:
        reader.read(text(context))
    return Contender(lambda token: reader.read([token]), lambda: reader.crop(context))


class Floor:
    """Time to read so many bytes, by the fastest of three kernels, in milliseconds."""

    def __init__(self, count: int):
        self.numbers = np.ones(count // 4, np.float32)
        columns = 1024
        self.matrix = self.numbers[: len(self.numbers) // columns * columns].reshape(-1, columns)
        self.vector, self.tensor = np.ones(columns, np.float32), torch.from_numpy(self.numbers)
        self.repeats = max(1, 64_000_000 // count)

    def milliseconds(self) -> float:
        kernels = (
            lambda: self.numbers.dot(self.numbers),
            lambda: self.matrix.dot(self.vector),
            self.tensor.sum,
        )
        taken = []
        for kernel in kernels:
            kernel()
            started = time.thread_time()
            for _ in range(self.repeats):
                kernel()
            taken.append(1000 * (time.thread_time() - started) / self.repeats)
        return min(taken)


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "minimum": round(min(values), 4)}


def ratios(values: list[float], others: list[float]) -> dict[str, float]:
    return interval([one / other for one, other in zip(values, others, strict=True)])


def read_states(model: torch.nn.Module, contexts: tuple[int, ...]) -> dict[int, DyadCache]:
    """Our states after each context, read by torch in chunks."""
    ids, states, cache, seen = torch.tensor([text(max(contexts))]), {}, DyadCache(), 0
    for context in sorted(contexts):
        while seen < context:
            stop = min(context, seen + CHUNK)
            model(ids[:, seen:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
            seen = stop
        states[context] = cache.select_rows(torch.tensor([0])) if context else DyadCache()
    return states


def parity(model: torch.nn.Module, engine: Engine) -> dict[str, float]:
    """The largest difference of logits over some tokens, and that in standard deviations of the logits."""
    tokens = text(PARITY_TOKENS)
    expected = model(torch.tensor([tokens])).logits[0].numpy()
    state = engine.start()
    found = np.stack([np.array(engine.step(state, token)) for token in tokens])
    largest = float(np.abs(found - expected).max())
    return {"largest_difference": float(f"{largest:.3g}"), "relative": float(f"{largest / expected.std():.3g}")}


def streamed(engine: Engine, tokens: int) -> tuple[EngineState, float]:
    """The engine's state after really stepping through so many tokens, and milliseconds of a token on the way."""
    state, ids = engine.start(), text(tokens)
    started = time.thread_time()
    for token in ids:
        engine.step(state, token)
    return state, 1000 * (time.thread_time() - started) / tokens


def decoding_cell(preset: str, rounds: int, folder: Path) -> dict[str, Any]:
    """All contenders of one size at all contexts."""
    plan = SIZES[preset]
    torch.manual_seed(0)
    model = dyad(preset).eval()
    speaking(model)
    model.save_pretrained(folder / "dyad")
    layers, width, heads = plan["llama"]
    peer = llama(size(model), layers, width, heads, positions=2 * CHUNK).eval()
    write_gguf(peer, folder / "llama.gguf")
    engines = {name: open_engine(folder / "dyad", name) for name in FORMATS}
    states = read_states(model, CONTEXTS)
    contenders: dict[str, Contender] = {}
    result: dict[str, Any] = {
        "parameters": {"dyad": size(model), "llama": size(peer)},
        "weight_bytes": {name: engine.weight_bytes for name, engine in engines.items()},
        "parity": {name: parity(model, engine) for name, engine in engines.items()},
    }
    for context in plan["contexts"]:
        if context in states:
            caches = {name: engine_state(engine, states[context]) for name, engine in engines.items()}
        else:
            state, taken = streamed(engines["float32"], context)
            caches = {"float32": state}
            result[f"milliseconds_per_token_over_{context}"] = round(taken, 4)
        for name, state in caches.items():
            contenders[f"engine {name}, {context}"] = engine_contender(engines[name], state)
        if context in states:
            contenders[f"torch, {context}"] = torch_contender(model, states[context])
            contenders[f"llama transformers, {context}"] = transformers_contender(peer, context)
            contenders[f"llama.cpp, {context}"] = llama_cpp_contender(
                folder / "llama.gguf", peer.config.vocab_size, context
            )
        print(f"    context {context} is read", flush=True)
    floors = {name: Floor(engine.weight_bytes) for name, engine in engines.items()}
    tokens = text(plan["burst"] + 1)
    times: dict[str, list[float]] = {name: [] for name in contenders} | {f"floor {name}": [] for name in floors}
    for number in range(rounds + 1):
        for name, floor in floors.items():
            taken = floor.milliseconds()
            if number:  # the first round warms up
                times[f"floor {name}"].append(taken)
        for name, contender in contenders.items():
            taken = contender.burst(tokens)
            if number:
                times[name].append(taken)
    for name, values in times.items():
        result[name] = {"milliseconds": summary(values)}
        if name.startswith("engine"):
            kind, context = name.removeprefix("engine ").split(", ")
            near = context if f"torch, {context}" in times else "0"
            result[name] |= {
                "over_floor": ratios(values, times[f"floor {kind}"]),
                "torch_over_it": ratios(times[f"torch, {near}"], values),
                "llama_cpp_over_it": ratios(times[f"llama.cpp, {near}"], values),
            }
    result["read_gigabytes_per_second"] = {
        name: round(floors[name].numbers.nbytes / statistics.median(times[f"floor {name}"]) / 1e6, 1) for name in floors
    }
    return result | {"rounds": rounds, "burst": plan["burst"]}


def batch_cell(preset: str, rounds: int, folder: Path) -> dict[str, Any]:
    """BATCH rows at once: the engine's `step_rows` and the torch forward pass."""
    torch.manual_seed(0)
    model = dyad(preset).eval()
    speaking(model)
    model.save_pretrained(folder / "dyad")
    engine = open_engine(folder / "dyad", "float32")
    rows = [text(BATCH + 64)[row : row + 64] for row in range(BATCH)]
    columns = [list(column) for column in zip(*rows, strict=True)][: SIZES[preset]["burst"] // 2 + 1]
    times: dict[str, list[float]] = {"engine": [], "torch": []}
    for number in range(rounds + 1):
        state, cache = engine.start(BATCH), DyadCache()
        engine.step_rows(state, columns[0])
        model(torch.tensor(columns[0])[:, None], past_key_values=cache, use_cache=True)
        started = time.thread_time()
        for column in columns[1:]:
            engine.step_rows(state, column)
        middle = time.thread_time()
        for column in columns[1:]:
            model(torch.tensor(column)[:, None], past_key_values=cache, use_cache=True)
        if number:
            times["engine"].append(1000 * (middle - started) / (len(columns) - 1))
            times["torch"].append(1000 * (time.thread_time() - middle) / (len(columns) - 1))
    return {
        "rows": BATCH,
        **{name: {"milliseconds": summary(values)} for name, values in times.items()},
        "torch_over_engine": ratios(times["torch"], times["engine"]),
        "rounds": rounds,
    }


def narrow_weights(run: Path, data: str) -> dict[str, Any]:
    """Bits per byte of a byte model over the first SCORED_BYTES of the validation split, one carried state."""
    (stream,) = resolve_data([data]).split("validation")
    tokens = [int(token) for token in stream.tokens(0, min(len(stream), SCORED_BYTES + 1))]
    bits = {}
    for name in FORMATS:
        engine = open_engine(run, name)
        state, nats = engine.start(), []
        for token, target in itertools.pairwise(tokens):
            logits = np.asarray(engine.step(state, token), np.float64)
            top = logits.max()
            nats.append(top + math.log(np.exp(logits - top).sum()) - logits[target])
        bits[name] = float(np.mean(nats)) / math.log(2)
        print(f"    {name}: {bits[name]:.5f} bits per byte", flush=True)
    return {
        "data": data,
        "bytes": len(tokens) - 1,
        "bits_per_byte": {name: round(value, 5) for name, value in bits.items()},
        "cost": {name: round(bits[name] - bits["float32"], 5) for name in FORMATS[1:]},
    }


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Milliseconds of a token over contexts, one panel a size."""
    sizes = [preset for preset in SIZES if preset in cells]
    if not sizes:
        raise SystemExit("There is no cell to draw yet.")
    looks = {
        "engine float32": ("#c2410c", "dyadlm engine"),
        "engine int8": ("#f59e0b", "dyadlm engine, int8"),
        "torch": ("#9a9a9a", "dyadlm, torch"),
        "llama transformers": ("#9db4d0", "Llama, transformers"),
        "llama.cpp": ("#1d4ed8", "Llama, llama.cpp"),
    }
    labels = {0: "0", 1_000: "1k", 8_000: "8k", FARTHEST: "1M"}
    with rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        for axes, preset in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
            cell, contexts = cells[preset], SIZES[preset]["contexts"]
            for name, (color, label) in looks.items():
                points = [(i, cell.get(f"{name}, {context}")) for i, context in enumerate(contexts)]
                known = [(i, point["milliseconds"]["median"]) for i, point in points if point is not None]
                if known:
                    x, y = zip(*known, strict=True)
                    axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=2, label=label)
            axes.axhline(
                cell["floor float32"]["milliseconds"]["median"], color="#555555", linewidth=1, linestyle="--",
                label="time to read the float32 weights",
            )  # fmt: skip
            axes.set_yscale("log")
            axes.set_xticks(range(len(contexts)), [labels[context] for context in contexts])
            axes.set_title(f"{preset}: {cell['parameters']['dyad'] / 1e6:.1f}M parameters")
            axes.set_xlabel("tokens of context")
        figure.axes[0].set_ylabel("ms per token, one thread")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8.5)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=150)


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__ or "", "decoding.json")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--trained", type=Path, help="a trained run: measure what narrow weights cost")
    parser.add_argument("--data", default="shakespeare", help="with --trained: data whose validation split is scored")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    cells = Cells(options.output)
    if options.draw:
        draw(cells.results, PICTURE)
        return
    one_thread()
    torch.set_num_threads(1)
    require_green()
    if options.trained:
        for name in cells.missing(
            [f"narrow weights, {dyadlm.DyadConfig.from_pretrained(options.trained).hidden_size}"]
        ):
            cells.store(name, narrow_weights(options.trained, options.data))
        return
    for name in cells.missing([*options.sizes, *(f"{preset}, batch {BATCH}" for preset in options.sizes)]):
        with tempfile.TemporaryDirectory() as folder:
            measure = batch_cell if "batch" in name else decoding_cell
            cells.store(name, measure(name.split(",")[0], options.rounds, Path(folder)))
    draw(cells.results, PICTURE)
    print(json.dumps({name: cells.results[name].get("parity") for name in cells.results}, indent=1))


if __name__ == "__main__":
    main()
