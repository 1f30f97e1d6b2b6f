"""Hugging Face's Trainer with checkpoints that are complete or absent.

A checkpoint takes its name when it is complete and on disk; everything is read back with `weights_only=True`, from
shards or whole, into shards or whole.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from dyadlm.data.streaming import StreamedWindows
from dyadlm.errors import Diverged, RunFailed, first_line
from dyadlm.files import STAGING_PREFIX, follow_umask, in_use, staged_folder, sync
from dyadlm.model.adapters import is_adapted, load_adapter, require_kinds, save_adapter
from dyadlm.model.extension import COMPANIONS
from dyadlm.model.loading import without_bars_of_transformers
from dyadlm.train.average import WeightAverage, load_raw, save_raw
from dyadlm.train.checkpoint import (
    checkpoint_path,
    discard,
    last_complete,
    read_manifest,
    remove_leftovers,
    remove_old,
    write_manifest,
)
from dyadlm.train.companions import load_companions, save_companions
from dyadlm.train.damage import reading, require_fitting_moments, require_sound_state
from dyadlm.train.export import CARD_NAME
from dyadlm.train.histories import CarriedState
from dyadlm.train.options import TrainOptions
from dyadlm.train.shards import (
    holds_shards,
    load_sharded_optimizer,
    load_sharded_weights,
    load_whole_optimizer,
    load_whole_weights,
    save_shards,
)

# What earlier versions kept of a run in shards.
FORMER_SHARDS = f"{FSDP_MODEL_NAME}.bin"
# Steps of the log-spaced checkpoints.
LOG_SPACED = frozenset(2**power for power in range(10))


# What torch says when less was written than it gave.
WRITTEN_IN_PART = ("inline_container.cc", "iostream error")


class LogSpacedSaves(TrainerCallback):
    """Asks for a checkpoint at the steps of `LOG_SPACED`, where most is learned in little time."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in LOG_SPACED:
            control.should_save = True


class CheckpointingTrainer(Trainer):
    """What writes and reads the folders of a run.

    output: the folder of the run. identity: what a checkpoint must share to be resumed from. carried: the state that
    training carries, from step carried_from on; average: of the weights; both None where there is none.
    """

    output: Path
    options: TrainOptions
    tokenizer: PreTrainedTokenizerBase
    identity: Mapping[str, Any]
    carried: CarriedState | None
    carried_from: int
    average: WeightAverage | None
    _published_use_cache: bool | None

    def averaged(self) -> AbstractContextManager[None]:
        """The average of the weights in their place, where there is one."""
        return nullcontext() if self.average is None else self.average.shown()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        path = checkpoint_path(self.output, step)
        if path.exists():
            complete = read_manifest(path) is not None
            self.accelerator.wait_for_everyone()
            if complete:
                return
            if self.is_world_process_zero():
                discard(path)
        self._require_finite_weights()
        self.store_flos()
        try:
            with self.shared_staging(path) as staging:
                with self.averaged():
                    self.save_model(str(staging), _internal_call=True)
                if self.average is not None and self.args.should_save:
                    save_raw(cast(PreTrainedModel, self.model), staging)
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
                if self.carried is not None and step > self.carried_from:
                    self.carried.save(staging)
                if self.args.should_save:
                    save_companions(cast(PreTrainedModel, self.model), staging)
                if self.args.should_save and isinstance(self.train_dataset, StreamedWindows):
                    self.train_dataset.save(staging, step * self.get_total_train_batch_size(self.args))
                if self.args.should_save:
                    self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    write_manifest(staging, step, self.identity)
        except Exception as error:  # torch, safetensors and the system each have their own
            in_part = any(words in str(error) for words in WRITTEN_IN_PART)
            reason = "less was written than asked; the disk may be full" if in_part else first_line(error)
            raise RunFailed(
                f"The checkpoint of step {step} could not be written ({reason}); {self._last_good()}. "
                "Make room and go on with --resume."
            ) from error
        if self.is_world_process_zero():
            exempt = LOG_SPACED if self.options.log_spaced_checkpoints else frozenset()
            remove_old(self.output, self.args.save_total_limit, exempt)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def shared_staging(self, path: Path) -> Iterator[Path]:
        """`staged_folder` for all processes: each writes its part, the first one publishes."""
        if not self.is_world_process_zero():
            name = broadcast_object_list([None])
            yield Path(name[0])
            self.accelerator.wait_for_everyone()
            return
        remove_leftovers(self.output)
        with staged_folder(path) as staging:
            broadcast_object_list([str(staging)])
            yield staging
            self.accelerator.wait_for_everyone()

    def publish(self, card: str) -> None:
        """Put weights, configuration, tokenizer and README.md into the output folder, file by file."""
        staging = self.output / f"{STAGING_PREFIX}model"
        if self.is_world_process_zero():
            remove_leftovers(self.output)
            staging.mkdir()
        self.accelerator.wait_for_everyone()
        try:
            with in_use(staging), self.averaged():
                self.save_model(str(staging), _internal_call=True)
                self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (staging / CARD_NAME).write_text(card, encoding="utf-8")
                follow_umask(staging)
                for file in staging.iterdir():
                    sync(file)
                    file.replace(self.output / file.name)
                sync(self.output)
        finally:
            if self.is_world_process_zero():
                remove_leftovers(self.output)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, configuration and tokenizer: a loadable folder, without Trainer's pickled arguments."""
        if not self.args.should_save or output_dir is None:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.tokenizer.save_pretrained(output_dir)
        if is_adapted(model):
            save_adapter(model, Path(output_dir))
            return
        if state_dict is not None:
            # Gathered from shards, tied weights no longer share memory, by which they are told and saved once.
            tied = self._tied_names()
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        switched_off = getattr(model.config, "use_cache", None)
        model.config.use_cache = self._published_use_cache
        try:
            with without_bars_of_transformers():
                model.save_pretrained(output_dir, state_dict=state_dict)
        finally:
            model.config.use_cache = switched_off

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A loadable folder; the first process gathers what is sharded."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        save_shards(cast(PreTrainedModel, self.model), optimizer, Path(output_dir), self._tied_names())
        if self.args.should_save:
            torch.save(cast(LambdaLR, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @property
    def _in_shards(self) -> bool:
        return self.is_fsdp_enabled and self.accelerator.is_fsdp2

    def _tied_names(self) -> set[str]:
        """Names of weights that are other weights under a second name."""
        return set(cast(PreTrainedModel, self.model).all_tied_weights_keys or {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with reading(folder):
            require_sound_state(folder)
            if is_adapted(cast(PreTrainedModel, self.model)):
                load_adapter(cast(PreTrainedModel, self.model), folder)
            else:
                self._load_weights(folder, cast(PreTrainedModel, model or self.model))
            if self.average is not None:
                self.average.begin()
            load_raw(cast(PreTrainedModel, self.model), folder)
            load_companions(cast(PreTrainedModel, self.model), folder)

    def _load_place(self, folder: Path) -> None:
        """The state that training carries, and where it is in streamed text, where there are these."""
        step = int(folder.name.rpartition("-")[2])
        with reading(folder):
            if self.carried is not None and step > self.carried_from:
                self.carried.load(folder, step - self.carried_from, self.args.device)
            if isinstance(self.train_dataset, StreamedWindows):
                self.train_dataset.load(folder, step * self.get_total_train_batch_size(self.args))

    def _load_weights(self, folder: Path, model: PreTrainedModel) -> None:
        """From shards or whole, into shards or whole."""
        whole = folder / SAFE_WEIGHTS_NAME
        if holds_shards(folder):
            load_sharded_weights(model, folder, self._tied_names())
        elif self._in_shards and not (folder / FORMER_SHARDS).is_file():
            load_whole_weights(model, load_file(whole))
        else:
            if not self.is_fsdp_enabled:
                require_kinds(whole, model.state_dict())
            super()._load_from_checkpoint(str(folder), model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the moments and the position in the schedule, but keep the values of this run's settings."""
        groups = cast(torch.optim.Optimizer, self.optimizer).param_groups
        told = [{name: group[name] for name in group if name != "params"} for group in groups]
        if checkpoint is None:
            return
        with reading(checkpoint):
            self._load_moments(Path(checkpoint))
            require_fitting_moments(cast(torch.optim.Optimizer, self.optimizer), checkpoint)
        # Loading replaced the optimizer's groups.
        groups = cast(torch.optim.Optimizer, self.optimizer).param_groups
        scheduler = cast(LambdaLR, self.lr_scheduler)
        scheduler.base_lrs = [values["initial_lr"] for values in told]
        for group, values, factor in zip(groups, told, scheduler.lr_lambdas, strict=True):
            group.update(values)
            group["lr"] = values["initial_lr"] * factor(scheduler.last_epoch)

    def _load_moments(self, folder: Path) -> None:
        """From shards or whole, into shards or whole; and the place in the schedule."""
        model, optimizer = cast(PreTrainedModel, self.model), cast(torch.optim.Optimizer, self.optimizer)
        whole = folder / OPTIMIZER_NAME
        if holds_shards(folder):
            load_sharded_optimizer(model, optimizer, folder)
        elif self._in_shards and not (folder / FORMER_SHARDS).is_file():
            load_whole_optimizer(model, optimizer, torch.load(whole, map_location="cpu", weights_only=True))
        else:
            if not self.is_fsdp_enabled:  # transformers goes on without either file
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
                    (folder / name).stat()
            super()._load_optimizer_and_scheduler(str(folder))
            return
        schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
        cast(LambdaLR, self.lr_scheduler).load_state_dict(schedule)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are saved once and so are missing; anything else means another model."""
        missing = set(load_result.missing_keys) - self._tied_names()
        missing = {name for name in missing if not name.startswith(COMPANIONS)}  # they have a file of their own
        if missing or load_result.unexpected_keys:
            names = ", ".join(sorted(missing | set(load_result.unexpected_keys)))
            raise RunFailed(f"The checkpoint does not hold the weights of this model (these differ: {names}).")

    # ---- Stopping ----

    def _require_finite_weights(self) -> None:
        damaged = ""
        for name, weight in cast(PreTrainedModel, self.model).named_parameters():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            if not torch.isfinite(local).all():
                damaged = name
                break
        found = torch.tensor(float(bool(damaged)), device=self.args.device)
        if self.args.world_size > 1:  # a shard of one process may be damaged: the others must not wait for it
            found = self.accelerator.reduce(found, reduction="sum")
        if found:
            which = f"the weights {damaged}" if damaged else "weights of another process"
            self._fail(f"{which} are no longer finite after step {self.state.global_step}")

    def _fail(self, what: str) -> None:
        reason = f"Training stopped because {what}"
        raise Diverged(
            reason, f"{reason}; {self._last_good()}. Go on from there with --resume and a lower learning_rate."
        )

    def _last_good(self) -> str:
        path = last_complete(self.output)
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
