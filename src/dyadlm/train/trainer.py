"""Hugging Face's Trainer, with checkpoints that are complete or absent, and runs that stop in time.

What differs from `transformers.Trainer`: it logs, then saves, and only then evaluates; a checkpoint takes its
name when it is complete and on disk; everything is read back with `weights_only=True`; text comes in the
order of the data set; a loss that is not finite, or that rises far, ends the run.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.data.streaming import StreamedWindows
from dyadlm.errors import RunFailed, UserError
from dyadlm.evaluate.inspection import behaviour
from dyadlm.files import STAGING_PREFIX, follow_umask, in_use, staged_folder, sync
from dyadlm.model import DyadConfig, DyadForCausalLM
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
from dyadlm.train.export import CARD_NAME
from dyadlm.train.histories import CarriedState, HistoryWeightedLoss
from dyadlm.train.mechanisms import MeanMetrics, Mechanisms
from dyadlm.train.muon import muon_optimizer
from dyadlm.train.optimizer import decayed_parameters, learning_rate_factor
from dyadlm.train.settings import TrainOptions
from dyadlm.train.shards import (
    holds_shards,
    load_sharded_optimizer,
    load_sharded_weights,
    load_whole_optimizer,
    load_whole_weights,
    save_shards,
)
from dyadlm.train.validation import ValidationSample

# So many validation windows are looked at for what the mechanisms of a model do.
BEHAVIOUR_WINDOWS = 4
# What earlier versions kept of a run in shards.
FORMER_SHARDS = f"{FSDP_MODEL_NAME}.bin"
# Steps of the log-spaced checkpoints.
LOG_SPACED = frozenset(2**power for power in range(10))


def stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of windows: (T,) each becomes (B, T)."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def smoothed_loss(
    factor: float,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The `loss_function` of a causal model whose targets are smoothed: logits (B, T, V), labels (B, T) → scalar.

    factor: of each target, what is spread evenly over the vocabulary. num_items_in_batch: as in transformers.
    """
    nats = cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        labels[:, 1:],
        ignore_index=IGNORED_LABEL,
        reduction="mean" if num_items_in_batch is None else "sum",
        label_smoothing=factor,
    )
    return nats if num_items_in_batch is None else nats / num_items_in_batch


def figures(prefix: str, nats: float, tokens: float, size: float) -> dict[str, float]:
    """Loss and bits per byte of so many nats, by the names that the log has; empty where nothing was scored."""
    found = {"loss": nats / tokens} if tokens else {}
    if size:
        found["bits_per_byte"] = nats / math.log(2) / size
    return {f"{prefix}{name}": value for name, value in found.items()}


class StepsAsTold(TrainerCallback):
    """Trainer takes logging_steps, eval_steps and save_steps from the checkpoint; a resumed run may have others."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]


class LogSpacedSaves(TrainerCallback):
    """Asks for a checkpoint at the steps of `LOG_SPACED`, where most is learned in little time."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in LOG_SPACED:
            control.should_save = True


@contextmanager
def _reading(checkpoint: str | Path | None) -> Iterator[None]:
    """A manifest that agrees shows that nothing changed since, not that what was written is a checkpoint.

    A disk that fails and memory that is full say nothing against it: nobody is told to remove it for these.
    """
    try:
        yield
    except (UserError, RunFailed, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch, safetensors and json each have their own
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{checkpoint} is damaged ({reason}); remove it to go on from an earlier checkpoint."
        ) from error


def _require_sound_state(folder: Path) -> None:
    """Raise ValueError unless trainer_state.json is of the step that its folder is named for."""
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    if state.global_step != int(folder.name.rpartition("-")[2]):
        raise ValueError(f"{TRAINER_STATE_NAME} is of step {state.global_step}")
    if not isinstance(state.best_model_checkpoint, str | None):
        raise ValueError(f"best_model_checkpoint in {TRAINER_STATE_NAME} is no path")


class LanguageModelTrainer(Trainer):
    """Trains any causal LM of transformers on windows of text.

    windows: map-style, `len(windows)` = steps × global batch; item i is the i-th window that the run sees.
    bytes_per_token: of the training text, for bits per byte. identity: what a checkpoint must share to be
    resumed from. options: what `train.FIELD` says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        options: TrainOptions,
        windows: Dataset[dict[str, torch.Tensor]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        validation: ValidationSample | None = None,
        bytes_per_token: float = 1.0,
        identity: Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.output = Path(arguments.output_dir or ".")
        self.options = options
        self.tokenizer = tokenizer
        self.validation = validation
        self.bytes_per_token = bytes_per_token
        self.identity = dict(identity or {})
        self._window_tokens = windows[0]["input_ids"].numel()
        # Trainer switches the cache off in the configuration, which would end up in what is published.
        self._published_use_cache = getattr(model.config, "use_cache", None)
        self._lowest_loss: float | None = None
        self._clock_step: int | None = None
        self._paused = 0.0
        self.carried = None
        if options.carry_state:
            self.carried = CarriedState(
                cast(DyadConfig, model.config),
                arguments.process_index,
                arguments.world_size,
                arguments.gradient_accumulation_steps,
                arguments.train_batch_size,
            )
        self.weighted = HistoryWeightedLoss(options.history_weight) if options.history_weight else None
        if self.weighted is not None:
            model.loss_function = self.weighted
        self._metrics = MeanMetrics()
        self._without_target: torch.Tensor | int = 0  # steps since the last log
        self.average = WeightAverage(model, options.ema) if options.ema else None
        ours: list[TrainerCallback] = [StepsAsTold(), *[LogSpacedSaves()] * options.log_spaced_checkpoints]
        if isinstance(model, DyadForCausalLM):
            ours.append(Mechanisms(model))
        if self.average is not None:
            ours.append(self.average)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=stack,
            train_dataset=windows,
            eval_dataset=validation,  # only `evaluate`, below, reads it
            callbacks=[*ours, *(callbacks or [])],
        )
        if self.label_smoother is not None and isinstance(model, DyadForCausalLM):
            # Trainer would keep the labels from the model and its companions, and not shift them: it does so for the
            # classes that it lists alone, and others learn to repeat their input.
            self.label_smoother = None
            model.loss_function = partial(smoothed_loss, arguments.label_smoothing_factor)
        for shown_by_us in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown_by_us)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate passes over FSDP on CPUs without a word, though torch shards over gloo just as well.
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    # ---- Order of text, optimizer, schedule ----

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return decayed_parameters(model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.options.optimizer == "muon":
            self.optimizer = muon_optimizer(cast(torch.nn.Module, self.model if model is None else model), self.args)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return learning_rate_factor(step, warmup_steps=warmup, max_steps=num_training_steps, options=self.options)

        optimizer = optimizer or self.optimizer
        assert optimizer is not None, "the optimizer comes before its schedule"
        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def tokens_per_step(self) -> int:
        return self.get_total_train_batch_size(self.args) * self._window_tokens

    # ---- Loss, logs, evaluation ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._clock = time.perf_counter()
        checkpoint = kwargs.get("resume_from_checkpoint")
        if self.carried is not None and checkpoint:
            self.carried.load(Path(checkpoint), self.args.device)
        if isinstance(self.train_dataset, StreamedWindows) and checkpoint:
            self.train_dataset.load(Path(checkpoint))
        return super().train(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if self.carried is not None:
            inputs = {**inputs, "past_key_values": self.carried.current, "use_cache": True}
        loss = super().training_step(model, inputs, *args)
        if self.carried is not None:
            self.carried.advance()
        if not torch.isfinite(loss):
            self._fail(f"the loss of the step after {self.state.global_step} is {loss.item()}")
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """The batches of a step and their number of targets; weights of histories are set for the step as a whole."""
        batches, targets = super().get_batch_samples(*args, **kwargs)
        if isinstance(targets, torch.Tensor):
            # All of a step may be what others than the assistant say.
            self._without_target = self._without_target + (targets == 0).sum()
            targets = targets.clamp(min=1)
        if self.weighted is not None:
            sums = torch.stack([self.weighted.sums(batch) for batch in batches]).sum(0)
            if self.args.world_size > 1 and self.args.average_tokens_across_devices:
                sums = self.accelerator.reduce(sums, reduction="sum")
            self.weighted.mean_of_step = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), 1.0)
        return batches, targets

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch as its part of the step: its value is that of the tokens alone, its gradient also that
        of what the mechanisms of the model cost, once a step."""
        with nullcontext() if self.weighted is None else self.weighted.of(inputs):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        metrics = outputs.get("metrics") if isinstance(outputs, dict) else None
        if metrics:
            self._metrics.add(metrics)
        if metrics and "cost" in metrics:
            cost = metrics["cost"]
            # The model has added the cost, and Trainer has scaled the sum.
            summed = self.args.average_tokens_across_devices and num_items_in_batch is not None
            loss = loss - cost * (self.args.world_size if summed else 1)
            loss = loss + (cost - cost.detach()) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add bits per byte and speed; stop a run whose loss has risen far above its lowest."""
        if "loss" in logs:
            now, step = time.perf_counter(), self.state.global_step
            begin = self._initial_global_step if self._clock_step is None else self._clock_step
            rate = (step - begin) / max(now - self._clock - self._paused, 1e-9)
            per_step = self.tokens_per_step()
            # Trainer has divided by all steps; those without a target have no loss.
            counted = step - begin - int(self._without_target)
            self._without_target = 0
            if counted:
                logs["loss"] *= (step - begin) / counted
                if self.bytes_per_token:
                    logs["bits_per_byte"] = logs["loss"] / math.log(2) / self.bytes_per_token
            else:
                del logs["loss"]
            logs["tokens"] = step * per_step
            logs["tokens_per_second"] = rate * per_step
            logs["steps_per_second"] = rate
            logs |= self._metrics.take(self.args.world_size)
            self._clock, self._clock_step, self._paused = now, step, 0.0
        super().log(logs, start_time)
        if "loss" in logs:
            self._require_no_divergence(logs["loss"])

    def _require_no_divergence(self, loss: float) -> None:
        if self._lowest_loss is None:
            self._lowest_loss = min(entry["loss"] for entry in self.state.log_history if "loss" in entry)
        rise = self.options.divergence_rise
        if rise and loss > self._lowest_loss + rise:
            self._fail(
                f"the loss rose from {self._lowest_loss:.3f} to {loss:.3f} nats (train.divergence_rise={rise:g})"
            )
        self._lowest_loss = min(self._lowest_loss, loss)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation sample: `eval_loss` in nats per token, `eval_bits_per_byte`; and what the mechanisms of
        the model do on a few of its windows, by the names of `Behaviour.measures`."""
        assert self.validation is not None, "the Trainer evaluates only where there is a validation sample"
        model = cast(PreTrainedModel, self.model)
        was_training = model.training
        model.eval()  # type: ignore[no-untyped-call]
        processes = self.args.world_size
        with self.averaged():
            totals = self.validation.measure(model, self.args.process_index, processes, self.args.eval_batch_size)
            # Every process looks at the same few windows, so that nothing is to be added up.
            seen = behaviour(model, self.validation.inputs(BEHAVIOUR_WINDOWS).to(self.args.device)).measures()
        if processes > 1:
            totals = self.accelerator.reduce(totals.to(self.args.device), reduction="sum")
        model.train(was_training)
        metrics = figures("eval_", *totals.sum(0).tolist())
        if len(totals) > 1:
            for name, of_source in zip(self.validation.names, totals.tolist(), strict=True):
                metrics |= figures(f"eval_{name}_", *of_source)
        metrics |= {f"eval_{name}": value for name, value in seen.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def averaged(self) -> AbstractContextManager[None]:
        """The average of the weights in their place, where there is one."""
        return nullcontext() if self.average is None else self.average.shown()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, save, evaluate, in this order: a crash in the evaluation costs no training."""
        wanted = {name: getattr(self.control, name) for name in ("should_log", "should_save", "should_evaluate")}
        for name in wanted:
            begin = time.perf_counter()
            for other in wanted:
                setattr(self.control, other, wanted[other] and other == name)
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if name != "should_log":
                self._paused += time.perf_counter() - begin

    # ---- Checkpoints ----

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
                if self.carried is not None:
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
            raise RunFailed(
                f"The checkpoint of step {step} could not be written ({error}); {self._last_good()}. "
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
        with _reading(folder):
            _require_sound_state(folder)
            if is_adapted(cast(PreTrainedModel, self.model)):
                load_adapter(cast(PreTrainedModel, self.model), folder)
            else:
                self._load_weights(folder, cast(PreTrainedModel, model or self.model))
            if self.average is not None:
                self.average.begin()
            load_raw(cast(PreTrainedModel, self.model), folder)
            load_companions(cast(PreTrainedModel, self.model), folder)

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
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the moments and the position in the schedule, but keep the values of this run's settings."""
        groups = cast(torch.optim.Optimizer, self.optimizer).param_groups
        told = [{name: group[name] for name in group if name != "params"} for group in groups]
        if checkpoint is None:
            return
        with _reading(checkpoint):
            self._load_moments(Path(checkpoint))
            self._require_fitting_moments(checkpoint)
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

    def _require_fitting_moments(self, checkpoint: str) -> None:
        """Compiled code of the optimizer does not look where a tensor ends, nor whether its numbers are all there."""
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        wrapped = getattr(optimizer, "optimizer", optimizer)  # by accelerate
        needed = {"step", "exp_avg", "exp_avg_sq"} if isinstance(wrapped, torch.optim.Adam) else set()
        if needed and not optimizer.state:
            raise ValueError("it holds no state of the optimizer")
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            state = optimizer.state.get(weight, {})
            if state and not needed <= state.keys():
                raise ValueError(f"the optimizer's {min(needed - state.keys())} is missing")
            for name, value in state.items():
                moment = isinstance(value, torch.Tensor) and value.dim() > 0
                if moment and (value.shape != weight.shape or not value.is_floating_point()):
                    raise UserError(
                        f"The optimizer's {name} in {checkpoint} is {tuple(value.shape)} where the weight is "
                        f"{tuple(weight.shape)}; the checkpoint is damaged, remove it to go on from an earlier one."
                    )
                if moment and (value.layout != weight.layout or value.stride() != weight.stride()):
                    raise ValueError(f"the optimizer's {name} is laid out in another way than the weight")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are saved once and so are missing; anything else means another model."""
        missing = set(load_result.missing_keys) - self._tied_names()
        missing = {name for name in missing if not name.startswith(COMPANIONS)}  # they have a file of their own
        if missing or load_result.unexpected_keys:
            names = ", ".join(sorted(missing | set(load_result.unexpected_keys)))
            raise RunFailed(f"The checkpoint does not hold the weights of this model (these differ: {names}).")

    # ---- Stopping ----

    def _require_finite_weights(self) -> None:
        for name, weight in cast(PreTrainedModel, self.model).named_parameters():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            if not torch.isfinite(local).all():
                self._fail(f"the weights {name} are no longer finite after step {self.state.global_step}")

    def _fail(self, what: str) -> None:
        raise RunFailed(
            f"Training stopped because {what}; {self._last_good()}. "
            "Go on from there with --resume and a lower learning_rate."
        )

    def _last_good(self) -> str:
        path = last_complete(self.output)
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
