"""Checkpoints on disk: complete or absent.

A checkpoint is filled under a staging name, flushed, and only then called `checkpoint-N`; its manifest names
every file with size and sha256. What has no manifest, or does not agree with it, is never resumed from.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dyadlm.errors import UserError
from dyadlm.files import STAGING_PREFIX, sha256_of

MANIFEST_NAME = "checkpoint.json"
PREFIX = "checkpoint-"


def checkpoint_path(run: Path, step: int) -> Path:
    return run / f"{PREFIX}{step}"


def write_manifest(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Describe what `folder` holds. identity: what a run must agree with to resume from it."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {"step": step, "identity": identity, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint; None if the folder is no checkpoint, half of one or damaged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def checkpoints(run: Path) -> dict[int, Path]:
    """Folders named like checkpoints by step, in ascending order, complete or not."""
    found = {
        int(folder.name.removeprefix(PREFIX)): folder
        for folder in run.glob(f"{PREFIX}*")
        if folder.name.removeprefix(PREFIX).isdecimal() and folder.is_dir()
    }
    return dict(sorted(found.items()))


def last_complete(run: Path) -> Path | None:
    """The newest checkpoint that agrees with its manifest."""
    return next((path for path in reversed(checkpoints(run).values()) if read_manifest(path)), None)


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise `UserError` naming what differs between the identities of a checkpoint and of the run here."""
    for part, expected in wanted.items():
        present = found.get(part)
        if present == expected:
            continue
        difference, remedy = "", "the settings it was started with"
        if isinstance(present, dict) and isinstance(expected, dict):
            names = [name for name in {**present, **expected} if present.get(name) != expected.get(name)]
            difference = "; ".join(f"{name}: {present.get(name)} there, {expected.get(name)} here" for name in names)
            if names == ["windows_per_step"] and present.get("windows_per_step"):  # another number of processes
                remedy = f"--set train.windows_per_step={present['windows_per_step']}"
        elif isinstance(present, list) or isinstance(expected, list):
            difference = f"{_listed(present)} there, {_listed(expected)} here"
        raise UserError(
            f"{checkpoint} was made with another {part}{f' ({difference})' if difference else ''}; "
            f"resume with {remedy}, or choose another --output."
        )


def _listed(names: list[str] | None) -> str:
    return " and ".join(names or ["none"])


def remove_leftovers(run: Path) -> None:
    """Remove what an interrupted save or removal left under staging names."""
    for path in run.glob(f"{STAGING_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_old(run: Path, keep: int | None, exempt: Collection[int]) -> None:
    """Remove all but the newest `keep` (None: all); steps in `exempt` are neither removed nor counted."""
    if keep is None:
        return
    for step in [step for step in checkpoints(run) if step not in exempt][:-keep]:
        discard(checkpoint_path(run, step))


def discard(folder: Path) -> None:
    """Remove a folder so that a crash half-way leaves a staging name, never half a checkpoint."""
    doomed = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
