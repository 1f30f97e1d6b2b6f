"""Rate and memory of `dyadlm data prepare` on large text, in one process and by Ray with one and two workers.

    python benchmarks/preparation.py --gigabytes 5 --work DIR      # needs six times as much free space
    python benchmarks/preparation.py --gigabytes 0.1 --bpe         # tokens of a byte-level BPE of 8,192

The text is the medium corpus again and again, a document in each JSON line, each copy with its number in every line, so
that no two parts are equal. Of each way: seconds by the clock, the most memory that its processes held together, and
whether its prepared text equals that of the first way.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common import Cells, arguments
from dyadlm.data.corpora import open_corpus

WAYS = {
    "one process": [],
    "Ray, 1 worker": ["--engine", "ray", "--processes", "1"],
    "Ray, 2 workers": ["--engine", "ray", "--processes", "2"],
}
VOCABULARY = 8192
LEARNED_FROM = 20_000_000  # bytes
END = "<|end|>"
EVERY = 0.5  # seconds between looks at the memory


def write_texts(path: Path, size: int) -> None:
    """JSON lines, a document in each, `size` bytes or a little more."""
    texts: dict[str, bytearray] = {}
    for corpus in ("shakespeare", "kjv", "sotu"):
        for passage in open_corpus(corpus).splits["train"]():
            texts.setdefault(passage.document, bytearray()).extend(passage.content)
    written, copy = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for content in texts.values():
                text = content.decode(errors="replace").replace("\n", f" {copy}\n")
                written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            copy += 1


def write_tokenizer(text: Path, folder: Path) -> None:
    """A tokenizer as GPT-2 has them, made of the beginning of the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = text.open(encoding="utf-8").readlines(LEARNED_FROM)
    backend.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)


def resident(process: int) -> int:
    """Bytes of memory of a process and of all that it started; pages that several share are counted once."""
    found = 0
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(place.name))
    waiting = [process]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            rolled = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        found += sum(1024 * int(line.split()[1]) for line in rolled.splitlines() if line.startswith("Pss:"))
    return found


def prepare(text: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """One preparation, watched."""
    command = [str(Path(sys.executable).with_name("dyadlm")), "data", "prepare", str(text), "--output", str(output)]
    begun, peak = time.monotonic(), 0
    with subprocess.Popen([*command, *options]) as running:
        while running.poll() is None:
            peak = max(peak, resident(running.pid))
            time.sleep(EVERY)
    if running.returncode:
        raise SystemExit(f"The preparation ended with {running.returncode}.")
    seconds = time.monotonic() - begun
    size = text.stat().st_size
    return {
        "bytes": size,
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(size / seconds / 1e6, 2),
        "peak_mebibytes": round(peak / 2**20),
        "output_bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        "dataset": json.loads((output / "manifest.json").read_text())["dataset_id"],
    }


def main() -> None:
    parser = arguments(__doc__ or "", "preparation.json")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--bpe", action="store_true", help="a tokenizer that takes time")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    cells = Cells(asked.output)
    size = f"{asked.gigabytes:g} GB{', BPE' * asked.bpe}"
    names = [f"{size}, {way}" for way in WAYS]
    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        text = Path(folder, "texts.jsonl")
        write_texts(text, int(asked.gigabytes * 1e9))
        options = []
        if asked.bpe:
            write_tokenizer(text, Path(folder, "tokenizer"))
            options = ["--tokenizer", str(Path(folder, "tokenizer"))]
        for name in cells.missing(names):
            output = Path(folder, "prepared")
            found = prepare(text, output, [*WAYS[name.removeprefix(f"{size}, ")], *options])
            cells.store(name, found)
            shutil.rmtree(output)
    differing = {cells.results[name]["dataset"] for name in names}
    print("All prepared texts are equal." if len(differing) == 1 else f"Prepared texts differ: {differing}.")


if __name__ == "__main__":
    main()
