"""Four kinds of model trained on the same bytes, and what the instrument says of each: the figures of docs/failures.md.

    python benchmarks/diagnosis.py --runs RUNS [--model "dyadlm 1M" ...] [--seeds 3]

Shakespeare's plays with planted canaries (Hamlet to ask about), 1.02M tokens in windows of 512, two a step, trained as
by `dyadlm train`: our preset, a Llama and a Mamba-2 of about 1M parameters at the learning rates that were best on the
medium corpus, our preset at 0.3M and 3M, and counts of four tokens of the very same windows. A seed decides the first
weights, the order of the text and the canaries. Each run keeps its checkpoints and is asked every probe, also over
time; the pages in RUNS/report (the four kinds, beside a dyadlm and a Llama with random weights), report-sizes and those
-over-time then show the seeds of a model as one, and table.md beside each those readings that docs/failures.md speaks
of. What is there is not done again: of a model whose answers are all in --output not even the run is needed.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from common import ROOT, dyad, mamba2, matched_llama, require_green
from dyadlm.data import TokenStream, byte_tokenizer
from dyadlm.diagnose import Budget, Diagnosis, OverTime, Probe, Reading, chosen, diagnose
from dyadlm.diagnose.candidates import load_material, load_subject, load_trajectory
from dyadlm.diagnose.ngram import NGram
from dyadlm.diagnose.pool import pool
from dyadlm.report.diagnosis import write_diagnosis
from dyadlm.report.verdicts import number
from dyadlm.train import TrainSettings, train
from dyadlm.train.prepared_run import prepare_run


class Family(NamedTuple):
    """build: with random weights. rate: the learning rate."""

    build: Callable[[], PreTrainedModel]
    rate: float


STEPS, BATCH, WINDOW = 1000, 2, 512
ASKED = 1024  # tokens of the longest window that a probe reads
FAMILIES = {
    "dyadlm-1M": Family(dyad, 4e-3),
    "llama-1M": Family(partial(matched_llama, positions=ASKED), 2e-3),
    "mamba2-1M": Family(mamba2, 4e-3),
    "dyadlm-0.3M": Family(partial(dyad, hidden_size=64, level_rank=14), 4e-3),
    "dyadlm-3M": Family(partial(dyad, hidden_size=224, level_rank=36), 4e-3),
}
COUNTS = "4-gram"
KINDS = ("dyadlm-1M", "llama-1M", "mamba2-1M", COUNTS)
SIZES = ("dyadlm-0.3M", "dyadlm-1M", "dyadlm-3M")
UNTRAINED = ("dyadlm-1M", "llama-1M")  # asked with random weights too

TOLD = {  # by probe, what stands in docs/failures.md
    "leak": ["largest_change", "gradient"],
    "bytes": ["bits_per_byte"],
    "octave": [
        "total",
        "half_at",
        *(f"gain_{near}_to_{2 * near}" for near in (8, 16, 32, 64, 128, 256, 512)),
        *(f"without_{level}" for level in (1, 2, 4, 8, "syllable", "word", "sentence", "line")),
        *(f"learned_{near}_to_{2 * near}" for near in (1, 2, 4)),
    ],
    "window": ["layers_with_scale", "yoking_word", "yoking_sentence"],
    "bounds": ["f1 word words", "f1 syllable words", "f1 sentence sentences", "f1 line sentences"],
    "position": ["far_minus_near", "late_rise"],
    "diffuse": ["entropy", "slope", "sink_rate"],
    "loop": ["seq_rep_4", "seq_rep_4_of_100", "terminal_loops", "self_reinforcement"],
    "drift": ["cka", "adjacent_cka", "cosine", "lens_kl"],
    "decay": ["retained", "best", "last", "later_last"],
    "select": ["sharpness"],
    "whiteout": ["regained", "forgotten", "total_regained", "effective_rank"],
    "memorise": ["exposure", "exposure_twins", "extracted", "capacity", "zlib_ratio_train", "zlib_ratio"],
    "identity": ["token", "position_above_chance", "recall_among", "affine_previous"],
    "plan": ["ahead_2", "beyond_4", "untrained_2"],
    "theme": ["theme_lead", "agreement_lead", "theme_half_at", "function_half_at"],
    "cost": ["training_seconds", "decoding_seconds", "training_memory", "decoding_memory"],
}


def table(models: Sequence[Diagnosis]) -> str:
    """In Markdown; with half the interval of means over seeds, and none of what was asked once."""
    lines = ["| | " + " | ".join(model.subject for model in models) + " |", "| --- |" + " --- |" * len(models)]
    for probe, names in TOLD.items():
        for name in names:
            readings = [model.results[probe].readings.get(name) if probe in model.results else None for model in models]
            known = next((reading for reading in readings if reading), None)
            if known is not None:
                cells = [_cell(reading, model) for reading, model in zip(readings, models, strict=True)]
                lines.append(f"| `{probe}` `{name}`, {known.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(reading: Reading | None, model: Diagnosis) -> str:
    if reading is None:
        return "–"
    interval = reading.interval if "seeds" in model.circumstances["subject"] else None
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    value = number(reading.value, max(abs(reading.value), half), half)
    return f"{value} ± {number(half, max(abs(reading.value), half), half)}" if half else value


def settings_of(name: str, seed: int, runs: Path) -> TrainSettings:
    """Of one run; its model with random weights is made first."""
    family, output = FAMILIES[name], runs / f"{name}-seed{seed}"
    begin = runs / "initial" / output.name
    if not (begin / "config.json").exists():
        torch.manual_seed(seed)
        family.build().save_pretrained(begin)
        byte_tokenizer().save_pretrained(begin)
    assignments = (
        f"max_steps={STEPS}",
        f"per_device_train_batch_size={BATCH}",
        f"data.sequence_length={WINDOW}",
        f"learning_rate={family.rate}",
        f"seed={seed}",
        f"save_steps={STEPS // 4}",
        "data.canaries=8",
        "train.log_spaced_checkpoints=true",
    )
    return TrainSettings.create(
        output, model=str(begin), data=["shakespeare"], resume=output.exists(), device="cpu", assignments=assignments
    )


def counted(seed: int, runs: Path) -> NGram:
    """Counts of the windows that the models of this seed were trained on, canaries included."""
    settings = settings_of(next(iter(FAMILIES)), seed, runs)
    windows = prepare_run(settings, None, settings.output).windows
    streams = [
        TokenStream.from_tokens(windows[number]["input_ids"].numpy().astype("uint16"), name=f"window {number}")
        for number in range(STEPS * BATCH)
    ]
    subject = NGram(streams, len(byte_tokenizer()), byte_tokenizer())
    subject.name = f"{COUNTS}-seed{seed}"
    return subject


def complete(path: Path, probes: Sequence[Probe]) -> bool:
    return path.exists() and {probe.id for probe in probes} <= Diagnosis.load(path).results.keys()


def asked(name: str, seed: int, runs: Path, found: Path) -> tuple[Diagnosis, Diagnosis | None]:
    """What a model says, trained first if it has to be: once as it is, and once over its training."""
    run = runs / f"{name}-seed{seed}"
    path, over_time = found / f"{run.name}.json", found / f"{run.name}-over-time.json"
    everything = chosen([])
    looking = [probe for probe in everything if isinstance(probe, OverTime)]
    if complete(path, everything) and (name == COUNTS or complete(over_time, looking)):
        return Diagnosis.load(path), None if name == COUNTS else Diagnosis.load(over_time)

    def told(probe: str, done: int, total: int) -> None:
        if done == total:
            print(f"    {run.name}: {probe}", flush=True)

    if name == COUNTS:
        first = str(runs / f"{next(iter(FAMILIES))}-seed{seed}")
        material = load_material(first, load_subject(first, "cpu", "float32"), [])
        return diagnose(counted(seed, runs), material, everything, Budget(), path, told), None
    train(settings_of(name, seed, runs))
    subject = load_subject(str(run), "cpu", "float32")
    material = load_material(str(run), subject, [])
    result = diagnose(subject, material, everything, Budget(), path, told)
    trajectory = load_trajectory(str(run), "cpu", "float32")
    return result, diagnose(trajectory, material, looking, Budget(tokens=0.25, fast=True), over_time, told)


def untrained(name: str, runs: Path, found: Path) -> Diagnosis:
    """What a model says that was not trained, but is asked with what the run of seed 0 is asked with."""
    path = found / f"{name}-untrained.json"
    if complete(path, chosen([])):
        return Diagnosis.load(path)
    run = str(runs / f"{name}-seed0")
    trained = load_subject(run, "cpu", "float32")
    subject = trained.untrained()
    assert subject is not None
    subject.name = f"{name} untrained"
    return diagnose(subject, load_material(run, trained, []), chosen([]), Budget(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="a folder for runs and reports")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "diagnosis", help="of answers")
    parser.add_argument("--model", action="append", choices=[*FAMILIES, COUNTS], help="these only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    for folder in (options.runs, options.output):
        folder.mkdir(parents=True, exist_ok=True)
    names = options.model or [*FAMILIES, COUNTS]
    found = [(name, asked(name, seed, options.runs, options.output)) for seed in range(options.seeds) for name in names]
    references = [untrained(name, options.runs, options.output) for name in UNTRAINED if name in names]
    for page, of, beside in (("report", KINDS, references), ("report-sizes", SIZES, [])):
        results = [result for kind in of for name, result in found if name == kind]
        write(options.runs / page, [once for once, _ in results], beside)
        write(options.runs / f"{page}-over-time", [often for _, often in results if often], [])


def write(folder: Path, diagnoses: Sequence[Diagnosis], beside: Sequence[Diagnosis]) -> None:
    """A page of the seeds of each model as one, and its table."""
    if diagnoses:
        shutil.rmtree(folder, ignore_errors=True)
        write_diagnosis(pool(diagnoses), folder, beside, diagnoses)
        (folder / "table.md").write_text(table([*pool(diagnoses), *beside]), encoding="utf-8")


if __name__ == "__main__":
    main()
