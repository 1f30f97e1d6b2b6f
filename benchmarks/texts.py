"""What `tiny-en` writes after 25 prompts, uncut: greedily and as `dyadlm generate` samples where nothing is said, each
also with slots that take in the prompt alone.

    python benchmarks/texts.py

Writes benchmarks/results/texts.json and docs/texts.md. The prompts were fixed before any text was seen. Figures are
those of the probe `loop`, over the bytes that were written.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT, circumstances, require_green
from dyadlm.diagnose.probes.loop import PUBLISHED, loop_onset, repeated_fours
from dyadlm.files import write_atomically
from dyadlm.generate import EngineModel, Sampling, Session, engine_model
from dyadlm.generate.session import Slots

MODEL, WRITTEN = "tiny-en", 256
GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=0.8, top_p=0.95, seed=1)
DECODING: dict[str, tuple[Sampling, Slots]] = {
    "greedy": (GREEDY, "all"),
    "greedy, --slots prompt": (GREEDY, "prompt"),
    "sampled": (SAMPLED, "all"),
    "sampled, --slots prompt": (SAMPLED, "prompt"),
}
PROMPTS = {
    "Plays": (
        "ROMEO:\n",
        "Enter the King, with his lords.\n\nKING:\n",
        "FIRST SOLDIER:\nWho goes there?\n\nSECOND SOLDIER:\n",
        "SCENE II. A street in Rome.\n\n",
        "QUEEN:\nAlas, my lord, the night is ",
    ),
    "Scripture": (
        "In those days there was no king in the land, and ",
        "And it came to pass, when the people heard this, that ",
        "Blessed is the man that ",
        "The word of the LORD came unto me, saying, ",
        "Jesus answered and said unto them, ",
    ),
    "Speeches": (
        "Mr. Speaker, Mr. President, Members of Congress: ",
        "My fellow citizens, the state of our Union ",
        "We must not forget that peace ",
        "The revenue of the last fiscal year ",
        "I recommend to the Congress that ",
    ),
    "Plain prose": (
        "The old house stood at the end of the road, and ",
        "On a cold morning in December the ship ",
        "A river is a large stream of water which ",
        "She opened the letter slowly and ",
        "To make good bread, ",
    ),
    "Dialogue": (
        '"Where have you been?" she asked.\n',
        '"I do not believe you," said the old man, "because ',
        "Question: What is the largest animal?\nAnswer: ",
        "HAMLET:\nMy lord, what news?\n\nHORATIO:\n",
        '"Good morning," said the doctor. "How do you feel today?"\n',
    ),
}
PAGE = """# Text of `tiny-en`

What the [model that comes with the package](start.md) writes after 25 prompts, nothing left out and nothing chosen:
{written} bytes after each, greedily (`--temperature 0`) and as `dyadlm generate` samples by default (temperature 0.8,
top-p 0.95; `--seed 1`), each as it is and with `--slots prompt`, where slots take in nothing of what the model writes.
The prompts were fixed before any text was seen.

<!-- not run: takes a minute, and writes this page -->

```sh
python benchmarks/texts.py
```

{table}

seq-rep-4 is the share of groups of four bytes that stood in the continuation before; a cycle is what repeats with a
period of at most 64 bytes to the end, three times or more ([diagnose](diagnose.md)). The text that people wrote repeats
many groups of four bytes, too: see
[experiments](experiments.md#2026-11-28-what-makes-greedy-text-run-in-a-circle), where it is also measured what makes
greedy text run in a circle. Made with dyadlm {version} on a CPU, in float32.

"""


def continued(model: EngineModel, prompt: str, sampling: Sampling, slots: Slots) -> dict[str, Any]:
    """The text after a prompt, and its figures."""
    session = Session(model, model.tokenizer, slots=slots)
    session.read_prompt(prompt)
    text = "".join(session.write(WRITTEN, sampling))
    tokens = np.frombuffer(text.encode(), np.uint8)
    return {
        "text": text,
        "seq_rep_4": round(repeated_fours(tokens), 4),
        "seq_rep_4_of_100": round(repeated_fours(tokens[:PUBLISHED]), 4),
        "onset": loop_onset(tokens),
    }


def table(texts: list[dict[str, Any]]) -> str:
    """Figures over all prompts, a row for each decoding."""
    lines = ["| | seq-rep-4 | of the first 100 bytes | end in a cycle | which begins after (median) |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name in DECODING:
        own = [each[name] for each in texts]
        onsets = [each["onset"] for each in own if each["onset"] is not None]
        row = [statistics.fmean(each[key] for each in own) for key in ("seq_rep_4", "seq_rep_4_of_100")]
        after = f"{statistics.median(onsets):.0f} bytes" if onsets else "–"
        lines.append(f"| {name} | {row[0]:.3f} | {row[1]:.3f} | {len(onsets)} of {len(own)} | {after} |")
    return "\n".join(lines)


def page(texts: list[dict[str, Any]], version: str) -> str:
    """docs/texts.md."""
    parts = [PAGE.format(written=WRITTEN, table=table(texts), version=version)]
    kind = None
    for each in texts:
        if each["kind"] != kind:
            kind = each["kind"]
            parts.append(f"## {kind}\n\n")
        for name in DECODING:
            said = each[name]
            ends = "no cycle" if said["onset"] is None else f"a cycle after {said['onset']} bytes"
            parts.append(f"{name.capitalize()}, seq-rep-4 {said['seq_rep_4']:.3f}, {ends}:\n\n")
            parts.append(f"```text\n{each['prompt']}{said['text'].rstrip()}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/texts.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/texts.md")
    options = parser.parse_args()
    require_green()
    model = engine_model(MODEL, "cpu", "float32")
    assert model is not None, "the engine runs it"
    texts = [
        {"kind": kind, "prompt": prompt, **{name: continued(model, prompt, *how) for name, how in DECODING.items()}}
        for kind, prompts in PROMPTS.items()
        for prompt in prompts
    ]
    found = {"model": MODEL, "written": WRITTEN, "texts": texts, "circumstances": circumstances()}
    write_atomically(options.output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_atomically(options.page, page(texts, found["circumstances"]["versions"]["dyadlm"]))
    print(table(texts))


if __name__ == "__main__":
    main()
