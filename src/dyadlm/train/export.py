"""The trained model as a folder that any Hugging Face program loads, free of what only training needs."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyadlm.data.canaries import CANARIES_NAME
from dyadlm.errors import UserError
from dyadlm.files import require_new, staged_folder
from dyadlm.train.checkpoint import MANIFEST_NAME
from dyadlm.train.progress import METRICS_NAME
from dyadlm.train.settings import RECORD_NAME

CARD_NAME = "README.md"
TRAINING_ONLY = {RECORD_NAME, METRICS_NAME, CANARIES_NAME, MANIFEST_NAME, "trainer_state.json"}
# Text; nothing that would have to be unpickled. Of safetensors only the weights: checkpoints hold others beside them.
PUBLISHED_KINDS = {".json", ".txt", ".model", ".jinja", ".md"}
WEIGHTS = "model*.safetensors"  # in one file, or in several and their index


def model_files(folder: Path) -> list[Path]:
    """What belongs to the model in a run, a checkpoint or an exported folder.

    Raises `UserError` if the folder holds no model.
    """
    weights = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    if not (folder / "config.json").is_file() or not any(file.is_file() for file in weights):
        raise UserError(
            f"{folder} holds no trained model (config.json and model.safetensors); "
            "finish the run with --resume, or name one of its checkpoints."
        )
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in PUBLISHED_KINDS or file.match(WEIGHTS)) and file.name not in TRAINING_ONLY
    )


def export(run: str | Path, output: str | Path) -> Path:
    """Copy the model of a run or a checkpoint (weights, configuration, tokenizer, card) to a new folder."""
    run, output = Path(run), Path(output)
    files = model_files(run)
    require_new(output, "the exported model")
    with staged_folder(output) as staging:
        for file in files:
            shutil.copyfile(file, staging / file.name)
    return output


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of a trained model.

    facts: name, model_type, parameters, sources, licences, tokenizer, sequence_length, steps, tokens, loss,
    validation_loss, validation_bits_per_byte; None where unknown. consensus: of a planner, with which validation was
    scored; 0 for none.
    """

    def figure(name: str, form: str) -> str:
        return "not measured" if facts[name] is None else format(facts[name], form)

    rows = {
        "Parameters": f"{facts['parameters']:,}",
        "Data": ", ".join(facts["sources"]),
        "Licence of the data": ", ".join(facts["licences"]) or "see the sources",
        "Tokenizer": facts["tokenizer"],
        "Window": f"{facts['sequence_length']:,} tokens",
        "Steps": f"{facts['steps']:,}",
        "Tokens seen": f"{facts['tokens']:,}",
        "Training loss": f"{figure('loss', '.4f')} nats per token",
        "Validation loss": f"{figure('validation_loss', '.4f')} nats per token",
        "Validation": f"{figure('validation_bits_per_byte', '.4f')} bits per byte",
    }
    needs = "import dyadlm  # registers the architecture\n" if facts["model_type"] == "dyadlm" else ""
    scorer = ""
    if facts["consensus"] and facts["validation_loss"] is not None:
        scorer = f" They are scored with consensus {facts['consensus']:g}; the training loss is the engineer's alone."
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [dyadlm]
---

# {facts["name"]}

A causal language model of type `{facts["model_type"]}`, trained with dyadlm.

| | |
| --- | --- |
{table}

The validation figures are those of the last evaluation during training, on a sample of the validation split.{scorer}

## Use

```python
{needs}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

or `dyadlm generate . --prompt Once`.
"""
