"""Is what is on disk whole? Runs, checkpoints, prepared data, states and model folders, file by file."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dyadlm.data.dataset import open_dataset
from dyadlm.data.sources import MANIFEST_NAME as DATA_MANIFEST
from dyadlm.errors import RunFailed, UserError
from dyadlm.files import STAGING_PREFIX, sha256_of
from dyadlm.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dyadlm.model.loading import is_model_folder
from dyadlm.shipped import place_of_model
from dyadlm.state_file import FORMAT, require_whole
from dyadlm.train.checkpoint import MANIFEST_NAME, checkpoints
from dyadlm.train.export import WEIGHTS, model_files, require_finite
from dyadlm.train.progress import METRICS_NAME
from dyadlm.train.settings import RECORD_NAME, read_record


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. what: what it is, or what is wrong with it."""

    place: Path
    whole: bool
    what: str


def verify(path: str | Path) -> list[Finding]:
    """Every part of what `path` is, whole or damaged. A checksum shows damage; it proves no origin.

    Raises `UserError` if it is nothing that this package writes.
    """
    path = Path(place_of_model(path))
    if path.is_file():
        return [_state(path)]
    if (path / DATA_MANIFEST).is_file():
        return [_prepared(path)]
    if (path / RECORD_NAME).is_file():
        return _run(path)
    if (path / MANIFEST_NAME).is_file():
        return [_checkpoint(path)]
    if is_model_folder(path):
        return _model(path)
    raise UserError(f"{path} is no run, checkpoint, prepared data, model folder or state; name one of these.")


def _state(path: Path) -> Finding:
    try:
        with safe_open(str(path), framework="np") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
        if not ours:
            return Finding(path, False, "a safetensors file, but no state of dyadlm")
        tokens = require_whole(path)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        return Finding(path, False, str(error) if isinstance(error, UserError) else f"no readable state ({error})")
    return Finding(path, True, f"a state after {tokens:,} tokens")


def _prepared(path: Path) -> Finding:
    try:
        data = open_dataset(path)
        for name in data.manifest.splits:
            len(data.split(name).segments)
        size = len(data.tokenizer)
    except UserError as error:
        return Finding(path, False, str(error))
    if size != data.manifest.tokenizer["vocabulary_size"]:
        return Finding(path, False, f"its tokenizer has {size} tokens, its manifest says another number")
    tokens = sum(split.tokens for split in data.manifest.splits.values())
    return Finding(path, True, f"prepared data, {tokens:,} tokens")


def _run(path: Path) -> list[Finding]:
    try:
        record = read_record(path)
    except UserError as error:
        return [Finding(path, False, str(error))]
    finished = "result" in record
    found = [Finding(path, True, "a finished run" if finished else "a run that is not finished; go on with --resume")]
    found += [_checkpoint(folder) for folder in checkpoints(path).values()]
    if finished:
        found += _model(path)
    metrics = path / METRICS_NAME
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        broken = [number for number, line in enumerate(lines, start=1) if not _is_json(line)]
        what = f"{len(lines)} lines" if not broken else f"line {broken[0]} is not JSON"
        found.append(Finding(metrics, not broken, what))
    found += [
        Finding(rest, False, "left by a command that was killed; the next one removes it")
        for rest in path.glob(f"{STAGING_PREFIX}*")
    ]
    return found


def _checkpoint(folder: Path) -> Finding:
    """A checkpoint against its manifest, the first file that differs by name."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                return Finding(folder, False, f"{name} is missing")
            if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
                return Finding(folder, False, f"{name} is damaged (its checksum is not the manifest's)")
        return Finding(folder, True, f"a checkpoint after {int(manifest['step']):,} steps")
    except FileNotFoundError:
        return Finding(folder, False, f"no {MANIFEST_NAME}: half of a checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Finding(folder, False, f"{MANIFEST_NAME} is damaged ({type(error).__name__}: {error})")


def _model(path: Path) -> list[Finding]:
    found = []
    try:
        files = model_files(path)
    except UserError as error:
        return [Finding(path, False, str(error))]
    if (path / ADAPTER_WEIGHTS).is_file():
        files += [path / ADAPTER_WEIGHTS, path / ADAPTER_CONFIG]
    for file in files:
        if file.match(WEIGHTS) or file.name == ADAPTER_WEIGHTS:
            try:
                require_finite(file)
                found.append(Finding(file, True, "weights"))
            except (UserError, RunFailed) as error:
                found.append(Finding(file, False, str(error)))
        elif file.suffix == ".json":
            whole = _is_json(file.read_text(encoding="utf-8", errors="replace"))
            found.append(Finding(file, whole, "JSON" if whole else "not JSON"))
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
