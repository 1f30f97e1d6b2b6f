"""The trained model as a folder that any Hugging Face program loads, free of what only training needs."""

import html
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from dyadlm.data.canaries import CANARIES_NAME
from dyadlm.errors import RunFailed, UserError
from dyadlm.files import printable, require_new, staged_folder, write_atomically
from dyadlm.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of_adapter
from dyadlm.model.loading import load_weights, place_of_tokenizer, without_bars_of_transformers
from dyadlm.shipped import place_of_model
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

    Of an adapter that is all but the adapter itself. Raises `UserError` if the folder holds no model.
    """
    weights = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    whole = (folder / "config.json").is_file() and any(file.is_file() for file in weights)
    if not whole and (not folder.is_dir() or base_of_adapter(folder) is None):
        raise UserError(
            f"{folder} holds no trained model (config.json and model.safetensors); "
            "finish the run with --resume, or name one of its checkpoints."
        )
    left_out = TRAINING_ONLY | {ADAPTER_CONFIG}
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in PUBLISHED_KINDS or file.match(WEIGHTS)) and file.name not in left_out
    )


# Modules that stand beside the weights for programs that never import dyadlm (`trust_remote_code=True`).
SHIMS = {
    "configuration_dyadlm.py": "from dyadlm import DyadConfig  # noqa: F401\n",
    "modeling_dyadlm.py": "from dyadlm import DyadForCausalLM, DyadModel  # noqa: F401\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_dyadlm.DyadConfig",
    "AutoModel": "modeling_dyadlm.DyadModel",
    "AutoModelForCausalLM": "modeling_dyadlm.DyadForCausalLM",
}


def export(run: str | Path, output: str | Path, auto_map: bool = False) -> Path:
    """Copy the model of a run or a checkpoint (weights, configuration, tokenizer, card) to a new folder.

    run: a folder, or a name of `dyadlm.shipped`. An adapter is merged into its base model.
    auto_map: for programs that never import dyadlm: with `trust_remote_code=True` they find it by itself. It has to be
        installed there.
    Raises `UserError` if there is no model, a file is a link out of the folder, or `output` holds something, and
    `RunFailed` if weights are not numbers.
    """
    run, output = Path(place_of_model(run)), Path(output)
    files = model_files(run)
    require_new(output, "the exported model")
    merged = None if (run / "config.json").is_file() else load_weights(run)
    fields = json.loads((run / "config.json").read_text(encoding="utf-8")) if merged is None else {}
    kind = fields.get("model_type") if merged is None else merged.config.model_type
    if auto_map and kind != "dyadlm":
        raise UserError(f"A {kind} model needs no auto_map; transformers knows it.")
    for file in files:
        if not file.resolve().is_relative_to(run.resolve()):
            raise UserError(f"{file} is a link out of the folder; put the file itself there.")
        if file.match(WEIGHTS):
            require_finite(file)
    with staged_folder(output) as staging:
        if merged is not None:
            with without_bars_of_transformers():
                merged.save_pretrained(staging)
                if (place := place_of_tokenizer(run)) != run:
                    AutoTokenizer.from_pretrained(place, trust_remote_code=False).save_pretrained(staging)
            for file in staging.glob(WEIGHTS):
                require_finite(file)
            fields = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        for file in files:
            shutil.copyfile(file, staging / file.name)
        if auto_map:
            for name, code in SHIMS.items():
                write_atomically(staging / name, code)
            write_atomically(staging / "config.json", json.dumps(fields | {"auto_map": AUTO_MAP}, indent=2) + "\n")
    return output


def require_finite(weights: Path) -> None:
    """Raise `RunFailed` if a file of weights holds values that are not numbers, `UserError` if it cannot be read."""
    try:
        with safe_open(str(weights), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise RunFailed(f"The weight {name} holds values that are not numbers; it is damaged or diverged.")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged ({error}); take another checkpoint.") from error


def as_markdown(text: str) -> str:
    """A name or a text of anybody's, as a line of Markdown that holds no markup of its own."""
    escaped = html.escape(printable(str(text)), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]|#" else letter for letter in escaped)


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of a trained model.

    facts: name, prompt, model_type, parameters, sources, licences, tokenizer, sequence_length, steps, tokens, loss,
    validation_loss, validation_bits_per_byte; None where unknown. consensus: of a planner, with which validation was
    scored; 0 for none. validation_of: the loss of each source, where there are several. adapter: its rank, 0 for none;
    base: the model beside which it was trained. chat: whether the tokenizer has a chat template.
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
    rows |= {
        f"Validation loss of {name}": f"{loss:.4f} nats per token" for name, loss in facts["validation_of"].items()
    }
    prepared = f'tokenizer("{facts["prompt"]}", return_tensors="pt")'
    if facts["chat"]:
        prepared = (
            'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
            'return_dict=True, return_tensors="pt"\n)'
        )
    command = "" if facts["chat"] else f'\nor `dyadlm generate . --prompt "{facts["prompt"]}"`.\n'
    needs = "import dyadlm  # registers the architecture\n" if facts["model_type"] == "dyadlm" else ""
    scorer = ""
    if facts["consensus"] and facts["validation_loss"] is not None:
        scorer = f" They are scored with consensus {facts['consensus']:g}; the training loss is the engineer's alone."
    adapter = ""
    if facts["adapter"]:
        rows["Adapter"] = f"LoRA of rank {facts['adapter']}, trained beside {facts['base']}"
        adapter = (
            f"\nWhere `{ADAPTER_WEIGHTS}` is in this folder, it holds the adapter alone. Programs then need peft and "
            "the base model; `dyadlm export` merges the two.\n"
        )
    table = "\n".join(f"| {as_markdown(name)} | {as_markdown(value)} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [dyadlm]
---

# {as_markdown(facts["name"])}

A causal language model of type `{facts["model_type"]}`, trained with dyadlm.

| | |
| --- | --- |
{table}

The validation figures are those of the last evaluation during training, on a sample of the validation split.{scorer}

## Use
{adapter}
```python
{needs}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = {prepared}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
{command}"""
