"""All that a run consists of, put together before anything is written: model, text, arguments, identity."""

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from dyadlm.causal_lm import Continuation, context_of, require_causal
from dyadlm.data import TrainingWindows, byte_tokenizer, tokenizer_identity
from dyadlm.data.canaries import CanaryPlan, PlantedWindows, plan_canaries
from dyadlm.data.encoding import prefix_token
from dyadlm.data.progress import Progress
from dyadlm.data.streaming import StreamedWindows
from dyadlm.errors import UserError
from dyadlm.evaluate.evaluation import require_vocabulary
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.adapters import add_adapter, base_identity, base_of_adapter, require_peft
from dyadlm.model.loading import load_weights, require_model_folder
from dyadlm.shipped import place_of_model
from dyadlm.train.arguments import require_optimizer, training_arguments
from dyadlm.train.companions import add_companions, set_of_companions
from dyadlm.train.defaults import PRESET_DEFAULTS
from dyadlm.train.fingerprint import FingerprintedWindows
from dyadlm.train.goldfish import GoldfishWindows
from dyadlm.train.histories import require_carriable
from dyadlm.train.optimizer import matrix_rate
from dyadlm.train.planner import TaughtWindows
from dyadlm.train.settings import TrainSettings
from dyadlm.train.trainer import LanguageModelTrainer
from dyadlm.train.training_data import (
    TrainingData,
    bytes_per_token,
    first_words,
    require_streamable,
    resolve_training_data,
)
from dyadlm.train.validation import ValidationSample

log = logging.getLogger("dyadlm")

# How `generate` of transformers is to draw from a trained model: as `dyadlm generate` does.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
MOST_WINDOWS = 2**31  # of a step
# A text that is read so often is remarked upon.
MANY_EPOCHS = 10
# Fields of a configuration that say nothing of what is computed.
INCIDENTAL_FIELDS = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")


@dataclass(frozen=True)
class PreparedRun:
    """A run that could begin. identity: what a checkpoint must agree with to be resumed from."""

    arguments: TrainingArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Dataset[dict[str, torch.Tensor]]
    validation: ValidationSample | None
    bytes_per_token: float
    canaries: CanaryPlan | None
    licences: Sequence[str]
    identity: dict[str, Any]
    choices: list[str]
    prompt: str  # a few words of the text, for examples

    def trainer(self, settings: TrainSettings, callback: TrainerCallback) -> LanguageModelTrainer:
        """Raises `UserError` if Trainer finds that the settings contradict each other."""
        try:
            return LanguageModelTrainer(
                self.model,
                self.arguments,
                settings.train,
                self.windows,
                self.tokenizer,
                validation=self.validation,
                bytes_per_token=self.bytes_per_token,
                identity=self.identity,
                callbacks=[callback],
            )
        except ValueError as error:
            raise UserError(f"These settings do not fit together: {error}") from error


def prepare_run(
    settings: TrainSettings,
    data: TrainingData | None,
    output: Path,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> PreparedRun:
    """data: instead of resolving `settings.sources`. output: for Trainer; nothing is written to it yet. model: instead
    of that of the settings, as it is: whether it is causal is not asked. progress: told how far the text is that is
    prepared here.

    Raises `UserError` for whatever is wrong with the request, the model first: preparing text takes longest.
    """
    arguments, choices = training_arguments(settings, output)
    if settings.train.history_weight and arguments.label_smoothing_factor:
        raise UserError("train.history_weight and label_smoothing_factor exclude each other; leave one of them out.")
    if settings.model is None:
        configuration_of(settings)
    else:
        require_model_folder(Path(place_of_model(settings.model)))
        if Path(settings.model) == output:  # of that name there would be two models from then on
            raise UserError(f"The run cannot be called {output}, as the model it begins with; choose another --output.")
    if settings.lora.rank:
        _require_adaptable(settings, arguments)
    if settings.data.stream:
        require_streamable(settings, arguments)
    with arguments.main_process_first(local=False, desc="preparing the data"):
        # One process of each machine reads prepared text for its checksums: all would read all of it.
        data = data or resolve_training_data(settings, arguments.seed, progress, arguments.local_process_index == 0)
    options = settings.data
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if "max_steps" not in settings.arguments:
        tokens = sum(len(stream) for stream, _ in data.train) * arguments.num_train_epochs
        arguments.max_steps = max(1, math.ceil(tokens / (batch * options.sequence_length)))
    require_countable(arguments.max_steps, batch, options.sequence_length)

    choices += _remarks(settings, data, arguments.max_steps * batch * options.sequence_length)
    set_seed(arguments.seed)
    model = model or _model(settings, data.tokenizer)
    if settings.train.carry_state:
        require_carriable(model)
    adapter = _adapt(model, settings, choices)
    add_companions(model, settings, arguments)
    require_optimizer(arguments, model, settings.train)
    if arguments.fsdp and arguments.world_size == 1:
        arguments.fsdp = arguments.fsdp_plugin_args = None
        choices.append("fsdp: one process holds everything, so that nothing is sharded")
    number, steps_anew = arguments.max_steps * batch, settings.train.steps_before_carrying(arguments.max_steps)
    windows = _windows(settings, data, arguments.seed, number, batch, batch * steps_anew)
    canaries = None
    if options.canaries:
        canaries = plan_canaries(options.canaries, arguments.seed, data.tokenizer, number, options.sequence_length)
        windows = PlantedWindows(windows, canaries)
    if settings.train.goldfish:
        windows = GoldfishWindows(windows, settings.train.goldfish)
    if settings.fingerprint.shown:
        windows = FingerprintedWindows(windows, settings.fingerprint, arguments.seed)
    if settings.planner.teacher:
        windows = TaughtWindows(windows, arguments.seed)
    validation = None
    if streams := [stream for stream in data.validation if len(stream)]:
        validation = ValidationSample.draw(
            streams, options.sequence_length, options.validation_tokens, prefix_token(data.tokenizer)
        )
        if not validation.has_targets:
            choices.append(
                "validation: the sample holds nothing that the assistant says, so that nothing is scored; raise "
                "data.validation_tokens"
            )
            validation = None
    evaluated = validation is not None and bool(arguments.eval_steps)
    if evaluated and (mass := getattr(model.config, "consensus", 0)):
        choices.append(f"validation: scored with consensus {mass:g}; the loss in training is the engineer's alone")
    arguments.eval_strategy = transformers.IntervalStrategy("steps" if evaluated else "no")
    arguments.eval_on_start = evaluated and arguments.eval_on_start
    if base := settings.train.base_width:
        width = model.config.hidden_size
        share = matrix_rate(settings.train, width)
        choices.append(
            f"learning rate: matrices get {share:.3g} of it, for a width of {width} where it was found with {base}"
        )
    order = {
        "seed": arguments.seed,
        "sequence_length": options.sequence_length,
        "windows_per_step": batch,
        "document_reset": options.document_reset,
        "canaries": options.canaries and [options.canaries, arguments.max_steps],
    }
    if settings.train.carry_state:
        order["rows_carried"] = True
        if settings.train.carry_lanes > 1:
            order["lanes_of_a_row"] = settings.train.carry_lanes
        if steps_anew:
            order["carried_from_step"] = steps_anew
    configuration = {name: value for name, value in model.config.to_dict().items() if name not in INCIDENTAL_FIELDS}
    identity: dict[str, Any] = {"order of text": order, "data": data.id, "model": configuration} | adapter
    # Checkpoints from before there was a choice name none.
    identity["optimizer"] = None if settings.train.optimizer == "adamw" else settings.train.optimizer
    identity["base width"] = settings.train.base_width or None
    if isinstance(model, DyadForCausalLM):
        identity["set of companions"] = set_of_companions(model, settings)
    return PreparedRun(
        arguments=arguments,
        model=model,
        tokenizer=data.tokenizer,
        windows=windows,
        validation=validation,
        bytes_per_token=bytes_per_token(data.train),
        canaries=canaries,
        licences=data.licences,
        identity=json.loads(json.dumps(identity)),  # as it will be read back
        choices=choices,
        prompt=first_words(data),
    )


def require_countable(steps: int, windows: int, length: int) -> None:
    """Raise `UserError` for a run of more windows in a step, or more tokens in all, than can be counted."""
    if windows >= MOST_WINDOWS or steps * windows * length > sys.maxsize:
        raise UserError(
            f"A run of {steps} steps of {windows} windows of {length} tokens is beyond what can be counted; give a "
            "smaller max_steps, per_device_train_batch_size, train.windows_per_step or data.sequence_length."
        )


def _windows(
    settings: TrainSettings, data: TrainingData, seed: int, number: int, batch: int, anew: int
) -> Dataset[dict[str, torch.Tensor]]:
    """All windows of a run in their order, `batch` a step. anew: of them, those before states are carried."""
    options = settings.data
    if data.streamed is not None:
        return StreamedWindows(data.streamed.passages, data.streamed.encoder, options.sequence_length, number, batch)
    if not settings.train.carry_state:
        anew = number
    parts = [
        TrainingWindows(
            data.train,
            options.sequence_length,
            length=length,
            seed=seed,
            document_reset=options.document_reset,
            with_index=settings.fingerprint.shown,
            with_tags=settings.fingerprint.shown and settings.fingerprint.tags,
            lanes=lanes,
        )
        for length, lanes in ((anew, 0), (number - anew, batch * settings.train.carry_lanes))
        if length
    ]
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _model(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model of the preset, or the weights of a folder, in float32."""
    model: PreTrainedModel
    if settings.model is None:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(tokenizer, name) for name in special}
        model = DyadForCausalLM(configuration_of(settings, vocab_size=len(tokenizer), **ids))
        model.generation_config.update(**SAMPLING)  # type: ignore[no-untyped-call]
        if tokenizer_identity(tokenizer) != tokenizer_identity(byte_tokenizer()):
            model.use_tokenizer(tokenizer)
    else:
        model = load_weights(settings.model, torch.float32, settings.model_fields, prefix="model.")
        require_causal(model, settings.model)
        _require_positions(model, settings.data.sequence_length)
    require_vocabulary(model, tokenizer)
    return model


def _require_adaptable(settings: TrainSettings, arguments: TrainingArguments) -> None:
    """Raise `UserError` where no adapter can be trained."""
    if settings.model is None:
        raise UserError("An adapter is trained beside a trained model; give --model DIR with --lora, and no --preset.")
    require_peft()
    if base_of_adapter(settings.model) is not None:
        raise UserError(
            f"{settings.model} is an adapter itself; merge it first "
            f"(`dyadlm export {settings.model} --output DIR`), and train beside that."
        )
    if changed := [name for name in settings.model_fields if name != "dropout"]:
        raise UserError(
            f"An adapter keeps no fields of the model, so that model.{changed[0]} would be lost; leave it out, or "
            "leave --lora out."
        )
    if arguments.fsdp:
        raise UserError("FSDP cannot shard an adapter beside frozen weights; leave fsdp out, or --lora.")


def _adapt(model: PreTrainedModel, settings: TrainSettings, choices: list[str]) -> dict[str, Any]:
    """Add the adapter that the settings ask for, and return what identifies it, if there is one."""
    options = settings.lora
    if not options.rank:
        return {}
    alpha = options.alpha or 2.0 * options.rank
    kinds = add_adapter(model, cast(str, settings.model), options.rank, alpha, options.dropout)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    choices.append(
        f"adapter of rank {options.rank} beside {', '.join(kinds)}: {trained:,} of {total:,} parameters are trained"
    )
    return {"adapter": {"rank": options.rank, "alpha": alpha, "base": base_identity(model)}}


def _remarks(settings: TrainSettings, data: TrainingData, tokens: int) -> list[str]:
    """What a reader of the plan may not expect. tokens: that the run will read."""
    remarks = []
    if settings.model is not None:
        taken = {**PRESET_DEFAULTS[None], "data.sequence_length": settings.data.sequence_length}
        told = ", ".join(f"{name}={settings.to_dict()[name]}" for name in taken if name in settings.to_dict())
        remarks.append(f"going on from {settings.model}: {told}; --set changes these")
    epochs = tokens / max(1, sum(len(stream) for stream, _ in data.train))
    if epochs >= MANY_EPOCHS and data.streamed is None:
        remarks.append(
            f"the text is read {epochs:,.0f} times, so that the model will know it by heart; give more text, or fewer "
            "steps (--set max_steps=N)"
        )
    return remarks


def _require_positions(model: PreTrainedModel, length: int) -> None:
    """Raise `UserError` if windows of so many tokens are longer than the model's positions."""
    context = context_of(model)
    if context is not None and length > context:
        try:
            Continuation(model).read_all(torch.zeros(1, length, dtype=torch.long))
        except UserError as error:
            raise UserError(
                f"A {model.config.model_type} model of this size reads at most {context} tokens, fewer than a window; "
                f"add --set data.sequence_length={context}, or less."
            ) from error
        log.warning("Windows of %d tokens are longer than the %d the model was made for.", length, context)


def configuration_of(settings: TrainSettings, **fields: Any) -> DyadConfig:
    """Of a new model; what was asked for wins over `fields`."""
    fields = {"max_position_embeddings": settings.data.sequence_length} | fields | settings.model_fields
    return DyadConfig.from_preset(settings.preset or "", **fields)
