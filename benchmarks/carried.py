"""Bits per byte of long texts that are read once, from beginning to end: models, models with a memory, compressors.

    python benchmarks/carried.py runs/tiny [FOLDER ...] --after shakespeare [--paq8px PATH] [--paq8o PATH]

Texts are held-out parts of the corpora, which no model was trained on: the first 65,536 bytes of Hamlet, of the
validation parts of `kjv` and `sotu`, and `heldout`: 1,000,000 bytes, the validation parts of all three and then their
test parts. A folder is any causal language model over bytes; where it holds n-gram tables of `dyadlm.peer_ngrams`,
their arguments are in `ngrams.json` beside the weights. Ours carry their state, with their slots as trained and larger,
through the engine where it runs them. Others read windows of the length that they were trained at (1,024 where they
name none), half a window further each time, so that each byte has half a window of context at least; `--carry` lets
recurrent ones carry their state, token by token. `memory` is `dyadlm evaluate --memory` around a model.

Compressors get the text alone, and once more with the text of a model's training before it (`--after`): counted is
what the archive grows by. Of a model, neither its weights nor the memory that reading takes is counted as bits, nor is
the program of a compressor. `zpaq`, `paq8px` and `paq8o` (`-8`) are used where they are installed.
"""

import argparse
import json
import lzma
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Cells, arguments, require_green, size
from dyadlm import DyadConfig
from dyadlm.accounting import parameters
from dyadlm.causal_lm import context_of, continues, state_bytes, state_of
from dyadlm.data import TokenStream
from dyadlm.data.corpora import open_corpus
from dyadlm.evaluate.protocols import overlapping
from dyadlm.evaluate.scoring import remembered, score
from dyadlm.evaluate.windows import one_window
from dyadlm.generate import EngineModel, Session, engine_model, load_model
from dyadlm.memory import ContextMemory, MemoryOptions
from dyadlm.peer_ngrams import add_ngrams
from dyadlm.shipped import place_of_model

CORPORA = ("shakespeare", "kjv", "sotu")
TEXTS = {"hamlet": 65_536, "kjv": 65_536, "sotu": 65_536, "heldout": 1_000_000}
SLOT_ENTRIES = (8_192, 65_536)
MEMORY_ENTRIES = 65_536
BATCH = 16  # windows read at once
WINDOW = 1_024  # of models that do not say at which length they were trained
PPMD_ORDERS, PPMD_BYTES = (4, 5, 6, 8, 12), 2**28


@cache
def part(corpus: str, split: str) -> bytes:
    """One part of a corpus."""
    return b"".join(passage.content for passage in open_corpus(corpus).splits[split]())


@cache
def text_of(name: str) -> bytes:
    """One of the texts; no part of it was in a training text."""
    held_out = [part(corpus, split) for split in ("validation", "test") for corpus in CORPORA]
    whole = b"".join(held_out) if name == "heldout" else part({"hamlet": "shakespeare"}.get(name, name), "validation")
    text = whole[: TEXTS[name]]
    assert len(text) == TEXTS[name], "the corpora have become shorter"
    return text


# ---- Models


def read_by_model(folder: Path, slots: int | None, memory: bool, text: bytes, carry: bool) -> dict[str, Any]:
    """Bits per byte of a text under a model, bytes of its state at the end, and seconds."""
    fields = {} if slots is None else {"slot_entries": slots}
    if (engine := engine_model(folder, "auto", "float32", fields)) is not None:
        return read_by_engine(engine, memory, text)
    model, tokenizer = load_model(folder, "auto", "float32", fields)
    if (folder / "ngrams.json").is_file():
        add_tables(model, folder)
    stream = TokenStream.from_tokens(np.frombuffer(text, np.uint8).astype(np.int32))
    remembers = ContextMemory(MemoryOptions.of_vocabulary(len(tokenizer), MEMORY_ENTRIES)) if memory else None
    ours = isinstance(model.config, DyadConfig)
    carried = ours or (carry and context_of(model) is None and continues(model) != "from the beginning")
    length = len(text) if carried else context_of(model) or WINDOW
    windows = one_window(0, len(stream)) if carried else overlapping(len(stream), length)
    started = time.perf_counter()
    pieces = score(model, stream, windows, tokenizer.bos_token_id, BATCH)
    if remembers is not None:
        pieces = remembered(pieces, stream, remembers)
    scored = np.concatenate([nats for _, nats in pieces])
    seconds = time.perf_counter() - started
    assert len(scored) == len(text), "every byte is scored once"
    return {
        "bits_per_byte": round(float(scored.sum(dtype=np.float64)) / len(text) / math.log(2), 4),
        "state": "carried" if carried else f"windows of {length}",
        "state_bytes": bytes_kept(model, min(length, 2_048)),
        "memory_bytes": 0 if remembers is None else remembers.state_bytes,
        "parameters": size(model),
        "seconds": round(seconds, 1),
        "device": str(model.device),
    }


def read_by_engine(model: EngineModel, memory: bool, text: bytes) -> dict[str, Any]:
    """The same without torch."""
    vocabulary = len(model.tokenizer)
    remembers = ContextMemory(MemoryOptions.of_vocabulary(vocabulary, MEMORY_ENTRIES)) if memory else None
    session = Session(model, model.tokenizer, remembers)
    started = time.perf_counter()
    session.read([model.tokenizer.bos_token_id])
    nats = session.read(np.frombuffer(text, np.uint8).astype(np.int64))
    seconds = time.perf_counter() - started
    memory_bytes = 0 if remembers is None else remembers.state_bytes
    return {
        "bits_per_byte": round(float(nats.sum(dtype=np.float64)) / len(text) / math.log(2), 4),
        "state": "carried",
        "state_bytes": (session.state_bytes or 0) - memory_bytes,
        "memory_bytes": memory_bytes,
        "parameters": parameters(DyadConfig(**model.fields)),
        "seconds": round(seconds, 1),
        "device": "cpu, engine",
    }


def add_tables(model: Any, folder: Path) -> None:
    """Give a peer the n-gram tables that stand in its folder."""
    from safetensors.torch import load_file

    add_ngrams(model, **json.loads((folder / "ngrams.json").read_text()))
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    own = {name.split("ngrams.", 1)[1]: tensor for name, tensor in weights.items() if "ngrams." in name}
    model.ngrams.load_state_dict(own)
    model.ngrams.to(model.device)


@torch.no_grad()
def bytes_kept(model: Any, length: int) -> int:
    """Bytes of all tensors that a model hands on after so many tokens; of ours and recurrent ones after any number."""
    ids = torch.full((1, length), 32, device=model.device)
    return state_bytes(state_of(model, model(input_ids=ids, use_cache=True)))


# ---- Compressors: bytes → bytes of the archive, bytes of memory


def xz(data: bytes) -> tuple[int, int]:
    """`xz -9e`."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)), 2**26


def zstd(data: bytes) -> tuple[int, int]:
    """`zstd -19 --long=27`."""
    import zstandard

    options = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
    return len(zstandard.ZstdCompressor(compression_params=options).compress(data)), 2**27


def ppmd(data: bytes, order: int) -> tuple[int, int]:
    """PPMd, variant H, as 7-Zip has it."""
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(order, PPMD_BYTES)
    return len(encoder.encode(data)) + len(encoder.flush()), PPMD_BYTES


def by_command(data: bytes, command: Callable[[str, str], list[str]]) -> tuple[int, int]:
    """A program that writes an archive. command: of the file that it reads and the one that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        source, archive = Path(folder, "text"), Path(folder, "archive.zpaq")
        source.write_bytes(data)
        process = subprocess.Popen(
            command(str(source), str(archive)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status  # it has been waited for
        if status:
            raise SystemExit(f"{command('text', 'archive')} ended with {status}.")
        source.unlink()
        (written,) = Path(folder).iterdir()  # paq8o names it itself
        return written.stat().st_size, used.ru_maxrss * 1024


def compressors(paq8px: str | None, paq8o: str | None) -> dict[str, Callable[[bytes], tuple[int, int]]]:
    """Those that are here. Of PPMd each order stands alone, since the best is not known before."""
    found: dict[str, Callable[[bytes], tuple[int, int]]] = {"xz -9e": xz, "zstd -19 --long=27": zstd}
    if find_spec("pyppmd") is not None:
        found |= {f"PPMd order {order}": partial(ppmd, order=order) for order in PPMD_ORDERS}
    else:
        print("PPMd is left out; `pip install pyppmd` adds it.")
    if shutil.which("zpaq"):
        found["zpaq -m5"] = partial(by_command, command=lambda text, archive: ["zpaq", "add", archive, text, "-m5"])
    if paq8px is not None:
        found["paq8px -8"] = partial(by_command, command=lambda text, archive: [paq8px, "-8", text, archive])
    if paq8o is not None:
        found["paq8o -8"] = partial(by_command, command=lambda text, archive: [paq8o, "-8", text])
    return found


def compressed(compress: Callable[[bytes], tuple[int, int]], text: bytes, before: bytes) -> dict[str, Any]:
    """Bits per byte of a text under a compressor; with a text before it, what the archive grows by."""
    started = time.perf_counter()
    own, memory = compress(before + text)
    own -= archive_of(compress, before) if before else 0
    seconds = round(time.perf_counter() - started, 1)
    return {"bits_per_byte": round(8 * own / len(text), 4), "memory_bytes": memory, "seconds": seconds}


@cache
def archive_of(compress: Callable[[bytes], tuple[int, int]], before: bytes) -> int:
    """Bytes of the archive of a training text alone."""
    return compress(before)[0]


# ---- The table


def main() -> None:
    parser = arguments(__doc__ or "", "carried.json")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="*", help="folders of models over bytes, or names of those that come along")
    parser.add_argument("--texts", nargs="*", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--after", nargs="*", choices=CORPORA, default=[], help="the training text of the models")
    parser.add_argument("--carry", action="store_true", help="recurrent peers carry their state, token by token")
    parser.add_argument("--paq8px", help="the program, where there is one")
    parser.add_argument("--paq8o", help="the same of its ancestor of 2007, which is an order faster")
    parser.add_argument("--only", default="", metavar="BEGINNING", help="measure what is named so; print all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.folders:
        require_green()
    cells = Cells(options.output)
    carry = " carried" if options.carry else ""
    folders = [Path(place_of_model(folder)) for folder in options.folders]

    tasks: dict[str, Callable[[], dict[str, Any]]] = {}
    for text, (name, compress) in product(options.texts, compressors(options.paq8px, options.paq8o).items()):
        tasks[f"{name} | {text}"] = partial(compressed, compress, text_of(text), b"")
        if options.after:
            before = b"".join(part(corpus, "train") for corpus in options.after)
            tasks[f"{name} after {' '.join(options.after)} | {text}"] = partial(
                compressed, compress, text_of(text), before
            )
    for text, folder, memory in product(options.texts, folders, (False, True)):
        fields = json.loads((folder / "config.json").read_text())
        sizes = (None, *SLOT_ENTRIES) if fields.get("slot_contexts") else (None,)
        for slots in sizes:
            said = f" slots {slots}" if slots else carry if fields.get("model_type") != "dyadlm" else ""
            name = f"{folder.name}{said}{' memory' if memory else ''}"
            tasks[f"{name} | {text}"] = partial(read_by_model, folder, slots, memory, text_of(text), options.carry)
    chosen = [name for name in tasks if name.startswith(options.only)]
    for name in cells.missing(sorted(chosen, key=lambda name: TEXTS[name.split(" | ")[1]])):
        cells.store(name, tasks[name]())
    print(table(cells.results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Bits per byte, the fewest on `hamlet` last. Beside them, for the longest text read: state and memory in MB, and
    seconds."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for cell, result in results.items():
        name, text = cell.split(" | ")
        rows.setdefault(name, {})[text] = result
    lines = [f"| bits per byte | {' | '.join(f'{text}, {TEXTS[text]:,}' for text in TEXTS)} | MB | seconds |"]
    lines.append(f"| --- |{' --- |' * (len(TEXTS) + 2)}")
    for name, own in sorted(rows.items(), key=lambda row: -row[1].get("hamlet", {"bits_per_byte": 0})["bits_per_byte"]):
        figures = [f"{own[text]['bits_per_byte']:.4f}" if text in own else "–" for text in TEXTS]
        last = own[max(own, key=lambda text: TEXTS[text])]
        held = (last.get("state_bytes", 0) + last["memory_bytes"]) / 1e6
        lines.append(f"| {name} | {' | '.join(figures)} | {held:.1f} | {last['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
