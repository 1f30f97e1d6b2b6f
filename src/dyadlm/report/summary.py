"""A run on one page of Markdown, with pictures, figures and a sample."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.data import resolve_data
from dyadlm.errors import UserError
from dyadlm.evaluate import EvaluationResult, evaluate
from dyadlm.evaluate.inspection import TowerReading, read_tower
from dyadlm.files import require_new, staged_folder, write_atomically
from dyadlm.generate import Sampling, generate_text
from dyadlm.model import DyadForCausalLM
from dyadlm.report.figures import draw_losses
from dyadlm.report.tower import draw_tower
from dyadlm.train.export import as_markdown
from dyadlm.train.progress import METRICS_NAME, read_metrics
from dyadlm.train.settings import read_record, reading_options
from dyadlm.train.training_data import held_out_of

SUMMARY_NAME = "README.md"
LOSSES_NAME, TOWER_NAME, EVALUATION_NAME = "loss.png", "tower.png", "evaluation.json"
SAMPLE_TOKENS = 400
STREAMED = "Read as it came (`data.stream`). What is scored is the beginning of each source, which was held out."
# Of the sample, tokens shown in the picture of the tower.
PICTURED = 72


def write_report(
    run: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    prompt: str = "The ",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Evaluate the model of a finished run on its validation text, sample from it, and write the new folder.

    The folder holds README.md, loss.png, tower.png (of dyadlm models) and evaluation.json; it appears when it is
    complete. progress: of the evaluation. Returns the path of README.md. Raises `UserError` if `run` is no
    finished run, `output` holds something, or the prompt is empty.
    """
    require_new(output, "the report")
    if not prompt:
        raise UserError("The prompt of the sample is empty; give at least one character.")
    record = require_finished(run)
    settings = record["settings"]
    validation, datasets = held_out_of(settings, tokenizer), []
    if validation is None:
        data = resolve_data(settings["data"], tokenizer, **reading_options(settings))
        validation, datasets = data.split("validation"), data.datasets
    figures = evaluate(model, validation, tokenizer, progress=progress)
    sample = "".join(
        generate_text(
            model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, sampling=Sampling(0.8, top_p=0.95, seed=seed)
        )
    )
    with staged_folder(output) as folder:
        draw_losses(read_metrics(run / METRICS_NAME), folder / LOSSES_NAME, f"Loss of {run.resolve().name}")
        reading = None
        if isinstance(model, DyadForCausalLM):
            reading = read_tower(model, tokenizer, (prompt + sample)[:PICTURED])
            draw_tower(reading, folder / TOWER_NAME)
        write_atomically(folder / EVALUATION_NAME, json.dumps(figures.to_dict(), indent=2) + "\n")
        page = _page(run, record, model, datasets, figures, prompt, sample, seed, reading)
        write_atomically(folder / SUMMARY_NAME, page)
    return output / SUMMARY_NAME


def require_finished(run: Path) -> dict[str, Any]:
    """The record of a finished run. Raises `UserError` if it is none."""
    record = read_record(run)
    if "result" not in record:
        raise UserError(f"The run in {run} is not finished; go on with `dyadlm train --output {run} --resume`.")
    return record


def _page(
    run: Path,
    record: Mapping[str, Any],
    model: PreTrainedModel,
    datasets: list[Any],
    figures: EvaluationResult,
    prompt: str,
    sample: str,
    seed: int,
    reading: TowerReading | None,
) -> str:
    settings, result = record["settings"], record["result"]
    interval = "a single block, so no interval"
    if figures.interval is not None:
        low, high = figures.interval
        interval = f"95% interval {low:.4f} to {high:.4f}, over {figures.interval_over}"
    title = as_markdown(run.resolve().name)
    sections = [
        f"# {title}\n\n**{figures.bits_per_byte:.4f} bits per byte** on the validation text ({interval}).\n\n"
        "Bits per byte is the mean surprise of the model at a byte that it was not trained on: lower is better, and "
        "guessing all bytes alike gives 8. What is usual depends on the text, so compare models on the same text. "
        "The interval says how far other documents or blocks of such text would move the figure.",
        f"## Sample\n\nThe model continues `{prompt!r}` (seed {seed}, temperature 0.8, top-p 0.95):\n\n"
        + _fenced(_to_a_word(prompt + sample)),
        "## Losses\n\nLower is better. A validation loss that rises while the training loss falls means that the model "
        "learns its text by heart; one that still falls at the end means that a longer training would help.",
        f"![Training and validation loss over the tokens seen]({LOSSES_NAME})",
        "## Validation\n\n"
        + _table(
            {
                "Bits per byte": f"{figures.bits_per_byte:.4f}",
                "Nats per token": f"{figures.nats_per_token:.4f}",
                "Scored": f"{figures.tokens:,} tokens, {figures.bytes:,} bytes",
                "Documents": f"{figures.documents:,}",
                "How": f"disjoint windows of {figures.window} tokens, each from a fresh state, every token once",
                "Computed in": f"{figures.dtype} on {figures.device}",
            }
        ),
        "## Training\n\n"
        + _table(
            {
                "Steps": f"{result['steps']:,}",
                "Tokens seen": f"{result['tokens']:,}",
                "Time": f"{result['seconds'] / 60:.1f} minutes (in the last call)",
                "Window": f"{settings['data.sequence_length']:,} tokens",
                "Learning rate": f"{settings['learning_rate']:g}",
                "Windows a step": f"{record['order_of_text']['windows_per_step']:,}",
                "Seed": settings["seed"],
                "Choices": "; ".join(record["choices"]),
                "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
            }
        ),
        "## Data\n\n" + ("\n\n".join(_data_table(data.manifest) for data in datasets) or STREAMED),
    ]
    if reading is not None:
        sections.append(
            "## Levels\n\nHow much each level of the model adds at each token of the beginning of the sample. A row is "
            "a level (the length of its window, or the kind of its segments), a column is a token; the scale beside "
            f"each panel says what its colours mean.\n\n![How much each level adds at each token]({TOWER_NAME})"
        )
        if measures := reading.behaviour.measures():
            sections.append(
                "Means over these tokens:\n\n"
                + _table(
                    {f"{name.replace('_', ' ')} ({_meaning(name)})": f"{value:.3f}" for name, value in measures.items()}
                )
            )
    rows = _table({"Parameters": f"{model.num_parameters():,}"} | _model_rows(record["model"]))
    folded = f"<details><summary>All fields of the configuration</summary>\n\n{rows}\n\n</details>"
    sections.append(f"## Model\n\n{model.num_parameters():,} parameters.\n\n{folded}")
    return "\n\n".join(sections) + "\n"


# How to read a measure of `Behaviour.measures`, by the beginning of its name.
MEANINGS = {
    "segment_length": "tokens of a segment",
    "hits": "share of tokens whose context had stood in this text before",
    "commitment": "0: a head chooses one level, 1: it blends all alike",
    "levels_chosen": "levels that a head uses at a token",
    "run_length": "tokens for which a head keeps its levels",
    "largest_load": "share of tokens that choose the most used level",
    "smallest_load": "share of tokens that choose the least used level",
    "skill": "1: the next node is foreseen, 0: no better than no change",
}


def _meaning(measure: str) -> str:
    return next(meaning for name, meaning in MEANINGS.items() if measure.startswith(name))


def _data_table(manifest: Any) -> str:
    rows = {"Sources": ", ".join(f"{source['name']} ({source['licence']})" for source in manifest.sources)}
    for name, split in manifest.splits.items():
        rows[name.capitalize()] = (
            f"{split.tokens:,} tokens ({split.bytes_per_token:.2f} bytes each), documents: {split.documents:,}"
        )
    return _table(rows | {"Tokenizer": manifest.tokenizer["name"], "Id": f"`{manifest.dataset_id[:16]}`"})


def _model_rows(config: Mapping[str, Any]) -> dict[str, str]:
    """The fields that make this model, without those that every Hugging Face configuration has."""
    common = PreTrainedConfig().to_dict().keys() - {"model_type"}
    return {
        name: str(value)
        for name, value in config.items()
        if value is not None and name not in common and not name.endswith("_token_id")
    }


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    """A value in a table; names of anybody's hold no markup of their own, but for the code that we write ourselves."""
    text = str(value)
    return text if text.startswith("`") and text.endswith("`") and text.count("`") == 2 else as_markdown(text)


def _to_a_word(text: str) -> str:
    """The text up to its last whole word, since a sample is cut at a number of tokens."""
    cut = max(text.rfind(" "), text.rfind("\n"))
    return f"{text[:cut]} ..." if cut > len(text) // 2 else text


def _fenced(text: str) -> str:
    """A code block whose fence the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
