"""What is there of a run already: where it goes on, and what is told of the steps before."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from dyadlm.errors import UserError
from dyadlm.files import STAGING_PREFIX, require_new
from dyadlm.model.configuration import CHOOSING, DyadConfig
from dyadlm.train.checkpoint import checkpoints, last_complete, read_manifest, require_same
from dyadlm.train.prepared_run import PreparedRun
from dyadlm.train.progress import METRICS_NAME, read_metrics
from dyadlm.train.settings import RECORD_NAME, TrainSettings, read_record

Found = TypeVar("Found")


def found_by_first(look: Callable[[], Found], arguments: TrainingArguments) -> Found:
    """What the first process finds in the folder of the run, or the `UserError` that it raises, in every process.

    Each for itself might see the folder at another moment, and would read all of a checkpoint for its checksums.
    """
    found: list[Found | UserError | None] = [None]
    if arguments.process_index == 0:
        try:
            found = [look()]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return cast(Found, found[0])


def require_seen(folder: Path, arguments: TrainingArguments) -> None:
    """Raise `UserError` where this process does not see a folder of the run that the first process has."""
    if not folder.is_dir():
        raise UserError(
            f"Process {arguments.process_index} does not see {folder}, which the first process has; choose an --output "
            "on storage that all machines share."
        )


def require_own_output(settings: TrainSettings) -> None:
    """Refuse an output that holds something else than a run to resume; a cut-off beginning counts as empty."""
    output = settings.output
    if (output / RECORD_NAME).is_file():
        if not settings.resume:
            raise UserError(f"{output} already holds a run; add --resume to go on, or choose another --output.")
    elif not output.is_dir() or not all(path.name.startswith(STAGING_PREFIX) for path in output.iterdir()):
        require_new(output, "the run")


def checkpoint_to_resume(settings: TrainSettings, plan: PreparedRun) -> Path | None:
    """The newest complete checkpoint, all of which is read for its checksums; None: begin at step 0.

    Raises `UserError` if it is of another run.
    """
    if not settings.resume:
        return None
    path, identity = last_complete(settings.output), plan.identity
    if path is not None and (manifest := read_manifest(path)) is not None:
        found = manifest["identity"]
        if identity["model"].get("model_type") == DyadConfig.model_type:
            # Fields that a checkpoint does not name are younger than it.
            defaults = DyadConfig().to_dict()
            younger = {name: defaults[name] for name in identity["model"] if name in defaults}
            found = found | {"model": younger | found["model"]}
        if isinstance(found["order of text"].get("rows_carried"), dict):
            # Earlier versions did not write which rows a process had; it goes on with those of its own number.
            rows = {"processes": plan.arguments.world_size, "rows": plan.arguments.train_batch_size}
            identity = identity | {"order of text": identity["order of text"] | {"rows_carried": rows}}
        require_same(found, identity, path)
    return path


def damaged_after(settings: TrainSettings, resumed: Path | None) -> list[Path]:
    """Newer checkpoints than the one to resume from, which were passed over."""
    step = read_step(resumed)
    return [path for number, path in checkpoints(settings.output).items() if number > step] if settings.resume else []


def read_step(checkpoint: Path | None) -> int:
    """The step a checkpoint was made at; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def annealed_anew(settings: TrainSettings, plan: PreparedRun, step: int) -> list[str]:
    """What goes by the part of all steps that are done, if it goes on over another number of them than it began with.

    Where a run is made longer, fingerprints and a teacher that had left come back.
    """
    if not step or not (settings.output / RECORD_NAME).is_file():
        return []
    steps = plan.arguments.max_steps
    before = read_record(settings.output).get("training_arguments", {}).get("max_steps", steps)
    if before == steps:
        return []
    annealed = []
    if (kind := plan.identity["model"].get("selector")) in CHOOSING:
        annealed.append((f"selector {kind}: annealed", ""))
    if settings.fingerprint.shown and settings.fingerprint.cooldown:
        annealed.append(("fingerprints: shown", f"the first {1 - settings.fingerprint.cooldown:.0%} of "))
    if settings.planner.teacher:
        annealed.append(("teacher: sees the true future", f"the first {settings.planner.teacher_until:.0%} of "))
    return [
        f"{what} over {part}{before} steps until step {step}, over {part}{steps} from there on"
        for what, part in annealed
    ]


def evaluation_missed(output: Path, step: int, arguments: TrainingArguments) -> bool:
    """Whether the run was cut off between saving at `step` and the evaluation that was to follow."""
    every = arguments.eval_steps or 0
    every = every if every >= 1 else math.ceil(every * arguments.max_steps)
    due = step == arguments.max_steps or (every and step % every == 0)
    if not step or not due or arguments.eval_strategy == "no" or step < arguments.eval_delay:
        return False
    path = output / METRICS_NAME
    lines = read_metrics(path) if path.exists() else []
    return not any(line["step"] == step and "eval_loss" in line for line in lines)
