"""Probes while a model trains: fast, at each checkpoint, into the log of any Trainer of Hugging Face."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dyadlm.diagnose.candidates import load_subject
from dyadlm.diagnose.huggingface import HuggingFaceSubject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.probe import Budget, OverTime, Probe
from dyadlm.diagnose.result import ProbeResult
from dyadlm.diagnose.run import ask, leak_first, settled
from dyadlm.errors import UserError
from dyadlm.model.loading import is_model_folder
from dyadlm.train.checkpoint import checkpoints

logger = logging.getLogger(__name__)

FAST = Budget(tokens=0.25, fast=True)
FROM_CHECKPOINTS = ("whiteout", "theme")  # what these find follows of all checkpoints so far


class ProbeCallback(TrainerCallback):
    """Asks probes of the model at each checkpoint and logs every headline as `probe_<id>_<reading>`.

    Probes over checkpoints (`whiteout`, `theme`) are told of those before, also of those that a resumed run finds, and
    say something from the second one on. The first process alone asks; what is random in training stays as it was.
    What is not applicable, or fails, is not logged, and training goes on; one over checkpoints is then given up, with a
    warning.
    """

    def __init__(
        self,
        trainer: Trainer,
        probes: Sequence[Probe],
        material: Material,
        tokenizer: PreTrainedTokenizerBase | None = None,
        budget: Budget = FAST,
    ):
        """trainer: whose log is written to. material: text under the model's tokenizer. Raises `UserError` for a model
        that trains in shards: no process has all of it."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UserError("Probes need a model that is whole in one process; leave --probe or the shards out.")
        self.trainer, self.probes, self.material, self.budget = trainer, leak_first(probes), material, budget
        self.tokenizer = tokenizer or cast(PreTrainedTokenizerBase | None, trainer.processing_class)
        self.steps: list[int] = []
        self.seen: dict[str, list[Any]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the checkpoints of the run that is gone on with."""
        watched = [probe for probe in self.probes if _over(probe)]
        if not watched or not state.global_step or not state.is_world_process_zero:
            return
        for step, path in checkpoints(Path(args.output_dir or ".")).items():
            if step <= state.global_step and is_model_folder(path):
                with torch.random.fork_rng():
                    self._observe(HuggingFaceSubject(load_subject(str(path), "cpu").model, self.tokenizer), step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        model = cast(
            PreTrainedModel, self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        )
        was_training = model.training
        try:
            # Of what the checkpoint holds: the average of the weights, where there is one.
            with torch.random.fork_rng(), getattr(self.trainer, "averaged", nullcontext)():
                subject = HuggingFaceSubject(model, self.tokenizer)
                self._observe(subject, state.global_step)
                results = [self._ask(probe, subject) for probe in self.probes]
        finally:
            model.train(was_training)
        found = {}
        for result in results:
            if result.readings:
                name, reading = next(iter(result.readings.items()))
                found[f"probe_{result.probe}_{name}"] = reading.value
        if found:
            self.trainer.log(found)

    def _observe(self, subject: HuggingFaceSubject, step: int) -> None:
        if step in self.steps:
            return
        self.steps.append(step)
        for probe in self.probes:
            if isinstance(probe, OverTime) and _over(probe):
                try:
                    self.seen.setdefault(probe.id, []).append(probe.observe(subject, self.material, self.budget))
                except Exception as reason:  # no probe may end a training
                    logger.warning("The probe %s is not asked again in this run: %s.", probe.id, reason)
                    self.seen[probe.id] = []
                    self.probes = [other for other in self.probes if other.id != probe.id]

    def _ask(self, probe: Probe, subject: HuggingFaceSubject) -> ProbeResult:
        if not isinstance(probe, OverTime) or not _over(probe):
            return ask(probe, subject, self.material, self.budget)
        if len(self.steps) < 2:
            return ProbeResult(probe.id, not_applicable="this is the first checkpoint")
        return settled(probe, lambda: probe.conclude(self.steps, self.seen[probe.id], self.budget))


def _over(probe: Probe) -> bool:
    return probe.id in FROM_CHECKPOINTS
