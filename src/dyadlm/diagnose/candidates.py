"""Models and text as people name them: a folder, a run, a checkpoint, a Hugging Face name, a GGUF file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.data import resolve_data
from dyadlm.data.canaries import CANARIES_NAME
from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.huggingface import HuggingFaceSubject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.probe import NotApplicable
from dyadlm.diagnose.trajectory import Trajectory
from dyadlm.errors import UserError, first_line
from dyadlm.evaluate.memorisation import canaries_of_run
from dyadlm.generate.pretrained import DTYPES, resolve_device
from dyadlm.model import DyadForCausalLM
from dyadlm.model.loading import is_model_folder, load_weights, without_bars_of_transformers
from dyadlm.shipped import place_of_model
from dyadlm.train.checkpoint import checkpoints
from dyadlm.train.companions import COMPANIONS_NAME
from dyadlm.train.fingerprint import Fingerprint
from dyadlm.train.settings import RECORD_NAME, read_record, reading_options
from dyadlm.train.training_data import held_out_of


@dataclass(frozen=True)
class NoText(Material):
    """No text, and why: probes that ask for some are not applicable for this reason, the others run."""

    text: Sequence[TokenStream] = ()
    reason: str = ""

    def places(self, count: int, length: int, seed: int = 0) -> list[tuple[TokenStream, int, int]]:
        raise NotApplicable(self.reason)


def load_subject(path_or_name: str, device: str = "auto", dtype: str = "auto") -> HuggingFaceSubject:
    """A model with its tokenizer, or without one where there is none to be found.

    path_or_name: a folder, a run or a checkpoint of one, a model that comes with the package, a Hugging Face name, or a
        file that ends in .gguf.
    Raises `UserError` if there is no such model.
    """
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}; choose auto or one of {', '.join(DTYPES)}.")
    path_or_name = str(place_of_model(path_or_name))
    path = Path(path_or_name)
    if path.suffix.lower() == ".gguf":
        model, tokenizer = _load_gguf(path, DTYPES.get(dtype))
    else:
        model = load_weights(path_or_name, DTYPES.get(dtype))
        tokenizer = find_tokenizer(path_or_name)
    name = path.resolve().name if path.exists() else path_or_name
    if name.startswith("checkpoint-"):
        name = f"{path.resolve().parent.name} {name}"
    fingerprint = _fingerprint(path, model)
    return HuggingFaceSubject(model.to(place), tokenizer, name, fingerprint)  # type: ignore[arg-type]


def _fingerprint(folder: Path, model: PreTrainedModel) -> Fingerprint | None:
    """That of a checkpoint that was trained beside one; the model of a finished run has none."""
    file = folder / COMPANIONS_NAME
    if not isinstance(model, DyadForCausalLM) or not file.is_file():
        return None
    prefix = "fingerprint."
    try:
        weights = {
            name.removeprefix(prefix): weight for name, weight in load_file(file).items() if name.startswith(prefix)
        }
        if not weights:
            return None
        fingerprint = Fingerprint(model.config, any(name.startswith("tags.") for name in weights))
        fingerprint.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{file} cannot be read ({first_line(error)}); remove it, or diagnose another checkpoint."
        ) from error
    return fingerprint


def load_trajectory(run: str, device: str = "auto", dtype: str = "auto") -> Trajectory:
    """The complete checkpoints of a run, loaded one at a time. Raises `UserError` if there are fewer than two."""
    found = {step: path for step, path in checkpoints(Path(run)).items() if is_model_folder(path)}
    if len(found) < 2:
        raise UserError(
            f"{run} has fewer than two checkpoints; give the folder of a run, and train with "
            "train.log_spaced_checkpoints=true or a smaller save_steps."
        )
    name = f"{Path(run).resolve().name} over time"
    return Trajectory(list(found), lambda step: load_subject(str(found[step]), device, dtype), name)


def find_tokenizer(path_or_name: str) -> PreTrainedTokenizerBase | None:
    """The fast tokenizer of a folder or a name, of the folder above for a checkpoint; None if there is none."""
    path_or_name = str(place_of_model(path_or_name))
    path = Path(path_or_name)
    places = [path_or_name, str(path.resolve().parent)] if path.name.startswith("checkpoint-") else [path_or_name]
    for place in places:
        # transformers makes up an empty tokenizer where a folder has but a configuration.
        if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")) and not any(Path(place).glob("*.model")):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError, AttributeError):
            continue
        if getattr(tokenizer, "is_fast", False):
            return cast(PreTrainedTokenizerBase, tokenizer)
    return None


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if not path.is_file():
        raise UserError(f"There is no file {path}; give the path of a GGUF file.")
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        with without_bars_of_transformers():
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype or torch.float32, **options)
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
            except (ValueError, KeyError, TypeError, RuntimeError):
                tokenizer = None  # not every vocabulary of GGUF is known to transformers
    except ImportError as error:
        raise UserError(
            f"{path} needs the package gguf, which is not installed; install it with `pip install 'dyadlm[gguf]'`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be loaded as a GGUF model ({first_line(error)}); give another file.") from error
    return _unpacked(cast(PreTrainedModel, model)), tokenizer


def _unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """Without the mark of quantization, which transformers leaves on plain weights and then would not save them."""
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    return model


def load_material(model: str, subject: Subject, data: Sequence[str], split: str = "validation") -> Material:
    """The text to ask a model on: what `data` names, or else, of a dyadlm run, what it was validated on.

    Raises `UserError` if there is no text to be had, though the model could read some.
    """
    if subject.tokenizer is None:
        return NoText(name="no text", reason=f"{subject.name} has no tokenizer to read text with")
    if len(subject.tokenizer) > subject.vocabulary and _largest_token(subject.tokenizer) >= subject.vocabulary:
        reason = (
            f"the tokenizer has {len(subject.tokenizer)} tokens but {subject.name} knows {subject.vocabulary}; "
            "save the model's own tokenizer beside it"
        )
        return NoText(name="no text", reason=reason)
    places = (Path(model), Path(model).resolve().parent)
    run = next((place for place in places if (place / RECORD_NAME).is_file()), None)
    canaries = canaries_of_run(run) if run is not None and (run / CANARIES_NAME).is_file() else None
    if data:
        return Material(resolve_data(data, subject.tokenizer).split(split), None, " ".join(data), canaries, split)
    if run is None:
        raise UserError(f"{model} is no run of dyadlm, so its text is not known; give some with --data.")
    settings = read_record(run)["settings"]
    sources = settings["data"]
    sources = [sources] if isinstance(sources, str) else list(sources)
    try:
        held_out = held_out_of(settings, subject.tokenizer)
        if held_out is not None:
            if split != "validation":
                raise UserError(f"a run with data.stream has no split {split!r}")
            return Material(held_out, None, " ".join(sources), canaries, split)
        resolved = resolve_data(sources, subject.tokenizer, **reading_options(settings))
    except UserError as error:
        raise UserError(f"The text of {model} cannot be read again ({error}); give some with --data.") from error
    train = [stream for stream, _ in resolved.train]
    return Material(resolved.split(split), train, " ".join(sources), canaries, split)


def _largest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=0)
