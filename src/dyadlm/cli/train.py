"""`dyadlm train`: a model from a preset, or on from the weights of another."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dyadlm.cli.shared import errors
from dyadlm.files import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerCallback

    from dyadlm.train import TrainResult, TrainSettings
    from dyadlm.train.trainer import LanguageModelTrainer


def train(
    output: Annotated[Path, typer.Option(metavar="RUN", help="The folder of the run. It becomes the model.")],
    preset: Annotated[
        str | None, typer.Option(help="Train a new model: tiny, small, base, large, xl or paper.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Continue from the weights of a model (fine-tuning): its folder, or tiny-en."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|CORPUS|FILE[:weight] ...",
            help="The training text. Several sources are mixed, by their weights.",
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="With --model: leave its weights as they are, and train a small LoRA adapter beside them.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings in a YAML or JSON file.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="key=value ...",
            help="TrainingArguments by name (max_steps=500), or model.FIELD, data.FIELD, train.FIELD, twin.FIELD, "
            "fingerprint.FIELD, planner.FIELD, lora.FIELD.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(metavar="ID ...", help="Run these probes of `diagnose` at each checkpoint and log their figures."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time a few steps and print the cost of the run. Writes nothing.")
    ] = False,
) -> None:
    """Train a model and leave it in RUN, a Hugging Face model folder. Ctrl-C saves; --resume goes on.

    The keys of --set are listed in docs/settings.md.
    """
    from dyadlm.train import RunInterrupted, TrainSettings
    from dyadlm.train import dry_run as measure
    from dyadlm.train import train as run
    from dyadlm.train.run import is_first_process

    _require_no_shards_of_accelerate()
    settings = TrainSettings.create(
        output,
        preset=preset,
        model=model,
        data=data or (),
        resume=resume,
        config=config,
        assignments=assignments or (),
        device=device,
        dtype=dtype,
        lora=lora,
    )
    if dry_run:
        _print_cost(measure(settings, progress=lambda text: errors.print(f"Dry run: {text} ...")))
        return
    speaks = is_first_process()  # of several, one
    try:
        result = run(settings, console=errors, callbacks=[_probes(settings, probe)] if probe else ())
    except RunInterrupted as error:
        if speaks:
            raise
        raise typer.Exit(error.exit_code) from None
    if speaks:
        _print_result(result)


def _require_no_shards_of_accelerate() -> None:
    """Raise `UserError` where accelerate was told to shard: on CPUs it passes over that, and elsewhere it does not know
    what our runs in shards need."""
    from dyadlm.errors import UserError

    if any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("FSDP", "DEEPSPEED")):
        raise UserError(
            "accelerate was told to shard, by --use_fsdp, --use_deepspeed or its configuration file; leave that out "
            "and give --set fsdp=true."
        )


def _probes(settings: "TrainSettings", names: list[str]) -> "Callable[[LanguageModelTrainer], TrainerCallback]":
    """What makes the callback that asks them. Raises `UserError` at once for a name that there is not."""
    from dyadlm.data import resolve_data
    from dyadlm.data.canaries import CANARIES_NAME
    from dyadlm.diagnose import Material, chosen
    from dyadlm.diagnose.callback import ProbeCallback
    from dyadlm.evaluate.memorisation import canaries_of_run
    from dyadlm.train.settings import reading_options
    from dyadlm.train.training_data import held_out_of

    probes = chosen(list(dict.fromkeys(names)))

    def make(trainer: "LanguageModelTrainer") -> "TrainerCallback":
        flat, train = settings.to_dict(), None
        validation = held_out_of(flat, trainer.tokenizer)
        if validation is None:
            resolved = resolve_data(settings.sources, trainer.tokenizer, **reading_options(flat))
            validation, train = resolved.split("validation"), [stream for stream, _ in resolved.train]
        planted = (settings.output / CANARIES_NAME).is_file()
        material = Material(
            validation,
            train,
            " ".join(settings.sources),
            canaries_of_run(settings.output) if planted else None,
        )
        return ProbeCallback(trainer, probes, material, trainer.tokenizer)

    return make


def _print_cost(cost: dict[str, Any]) -> None:
    for choice in cost["choices"]:
        typer.echo(choice)
    beside = cost["parameters_in_training_alone"]
    typer.echo(f"parameters: {cost['parameters']:,}" + (f", and {beside:,} in training alone" if beside else ""))
    few = cost["windows_timed"] < cost["windows_per_step"]
    estimated = f", estimated from steps of {cost['windows_timed']} of {cost['windows_per_step']} windows" * few
    typer.echo(
        f"memory: {_mebibytes(cost['static_memory_bytes'])} for weights and optimizer, "
        f"{_mebibytes(cost['peak_memory_bytes'])} at the peak{estimated}"
    )
    typer.echo(f"tokens: {cost['tokens']:,} in {cost['steps']:,} steps of {cost['tokens_per_step']:,}")
    if cost["flops"] is not None:
        typer.echo(f"matrix products: {cost['flops']:.2e} floating-point operations")
    typer.echo(f"time: about {duration(cost['seconds'])} ({1000 * cost['seconds_per_step']:.0f} ms a step{estimated})")


def _print_result(result: "TrainResult") -> None:
    from dyadlm.model.adapters import ADAPTER_CONFIG

    figures = [
        f"{title} {loss:.4f} nats" + ("" if bits is None else f", {bits:.4f} bits per byte")
        for title, loss, bits in (
            ("training loss", result.loss, result.bits_per_byte),
            ("validation", result.validation_loss, result.validation_bits_per_byte),
        )
        if loss is not None
    ]
    typer.echo("; ".join([f"{result.steps:,} steps, {result.tokens:,} tokens", *figures]))
    what = "adapter" if (result.output / ADAPTER_CONFIG).is_file() else "model"
    typer.echo(f"The {what} is in {printable(str(result.output))}.")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they count."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(hours or minutes) + [f"{rest} s"] * (not hours)
    return " ".join(parts)
