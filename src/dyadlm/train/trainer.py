"""Hugging Face's Trainer for windows of text, and runs that stop in time.

What differs from `transformers.Trainer`, beside the checkpoints (`dyadlm.train.checkpointing`): it logs, then saves,
and only then evaluates; text comes in the order of the data set; a loss that is not finite, or that rises far, ends the
run.
"""

import math
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.evaluate.inspection import behaviour
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.train.average import WeightAverage
from dyadlm.train.checkpointing import CheckpointingTrainer, LogSpacedSaves
from dyadlm.train.histories import CarriedState, HistoryWeightedLoss
from dyadlm.train.mechanisms import MeanMetrics, Mechanisms
from dyadlm.train.muon import muon_optimizer
from dyadlm.train.optimizer import (
    decayed_parameters,
    learning_rate_factor,
    matrix_parameters,
    matrix_rate,
    scale_rates,
)
from dyadlm.train.options import TrainOptions
from dyadlm.train.validation import ValidationSample

# So many validation windows are looked at for what the mechanisms of a model do.
BEHAVIOUR_WINDOWS = 4


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


class LanguageModelTrainer(CheckpointingTrainer):
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
        self.carried, self.carried_from = None, options.steps_before_carrying(arguments.max_steps)
        if options.carry_state:
            self.carried = CarriedState(
                cast(DyadConfig, model.config),
                arguments.process_index,
                arguments.world_size,
                arguments.gradient_accumulation_steps,
                arguments.train_batch_size,
                options.carry_lanes,
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
        if self.optimizer is not None:
            return self.optimizer
        trained = cast(torch.nn.Module, self.model if model is None else model)
        if self.options.optimizer == "muon":
            self.optimizer = muon_optimizer(trained, self.args)
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.options.base_width:
            matrices = [trained.get_parameter(name) for name in matrix_parameters(trained)]
            scale_rates(optimizer, matrices, matrix_rate(self.options, cast(Any, self.model).config.hidden_size))
        return optimizer

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
        if checkpoint:
            self._load_place(Path(checkpoint))
        with warnings.catch_warnings():
            # Blocks hand on states, which are views. In training nothing writes into them.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
            return super().train(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        carried = self.carried if self.state.global_step >= self.carried_from else None
        if carried is not None:
            inputs = {**inputs, "past_key_values": carried.current, "use_cache": True}
        loss = super().training_step(model, inputs, *args)
        if carried is not None:
            carried.advance()
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
            if self.options.base_width:  # Trainer tells the rate of the first group, which may hold the matrices
                logs["learning_rate"] = float(max(cast(LRScheduler, self.lr_scheduler).get_last_lr()))
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
